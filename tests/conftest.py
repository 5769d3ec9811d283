import os

os.environ.setdefault("SSAH_PROGRESS", "0")  # before ssah_nb is imported


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: minutes rather than seconds; deselect with -m 'not slow'"
    )
    config.addinivalue_line("markers", "network: needs a package index")
