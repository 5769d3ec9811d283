import os

os.environ.setdefault("SSAH_PROGRESS", "0")  # before ssah_nb is imported
