"""Property tests draw the same examples every time where CI is set, and take the time they take.

Torch computes with one thread, as emulated devices do: several would wait for each other wherever the machine does
something else, and the models of tests are too small to gain from them.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
