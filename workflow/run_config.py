"""What Snakemake's --config needs for a run: `python workflow/run_config.py PROFILE [RUN]`.

It is what the profile's config.yaml says, but the run has its own name: a copied profile says the
name of the one that it was copied from.
"""

import sys
from pathlib import Path

import yaml


def config_of(profile: str, run: str) -> list[str]:
    """The names and values of the profile, for this run."""
    path = Path(f"workflow/profiles/{profile}/config.yaml")
    own = yaml.safe_load(path.read_text()).get("config") or []  # a file of the repository
    return [f"profile={run}", *(entry for entry in own if not entry.startswith("profile="))]


if __name__ == "__main__":
    print(*config_of(sys.argv[1], sys.argv[-1]))
