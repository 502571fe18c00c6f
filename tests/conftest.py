"""Settings that hold for every test, and for the processes that tests start."""

import os

from hypothesis import settings

# Set before torch is imported. Tests are many small processes, each of which is to keep to itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run; and a busy machine is no failure.
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")
