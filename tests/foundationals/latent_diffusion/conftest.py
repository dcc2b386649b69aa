"""Lets the tests of this folder import `diffusion_specimens` and the like, and those of `control` too."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "control")]
