import os
import sys
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("SSAH_PROGRESS", "0")  # before ssah_nb is imported
sys.path.append(str(Path(__file__).parent.parent / "workflow"))  # its scripts can be imported


@pytest.fixture(autouse=True)
def same_environment():
    "What a test sets in the environment is gone after it."
    with mock.patch.dict(os.environ):
        yield
