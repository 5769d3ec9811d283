import os
import sys
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("SSAH_PROGRESS", "0")  # before ssah_nb is imported
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what needs a GPU: benchmarks/gpu.sh
sys.path.append(str(Path(__file__).parent.parent / "workflow"))  # its scripts can be imported
LONGEST = ("test_smoke.py", "test_readme.py", "test_drill.py", "test_users_model.py")


def pytest_collection_modifyitems(items):
    "The longest files come first: at the end no worker waits for another one."
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def same_environment():
    "What a test sets in the environment is gone after it."
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def scored():
    "Pairs, classes and importances of the tiny model, for `run_way`."
    from helpers_ways import scored_units

    return scored_units()


@pytest.fixture
def own_way():
    "Registers a way, and takes it back."
    from ssah_nb.engine.ways import WAYS, Way

    yield lambda **how: WAYS.update(mine=Way("a way of one's own", "nobody", **how))
    WAYS.pop("mine", None)
