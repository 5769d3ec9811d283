import os
import sys
from pathlib import Path

os.environ.setdefault("SSAH_PROGRESS", "0")  # before ssah_nb is imported
sys.path.append(str(Path(__file__).parent.parent / "workflow"))  # its scripts can be imported
