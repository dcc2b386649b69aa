"""What importing the layers adds to importing torch, each in a fresh interpreter."""

import statistics
import subprocess
import sys

from bench.timing import Row

SCRIPT = """
import time, torch
start = time.perf_counter()
import refiners.fluxion.layers
print(time.perf_counter() - start)
"""


def rows() -> list[Row]:
    seconds = [float(subprocess.check_output([sys.executable, "-c", SCRIPT])) for _ in range(7)]
    added = statistics.median(seconds)
    return [Row("import refiners.fluxion.layers after torch, seconds", added * 1e3, 0.0, "ms", 0.15, added)]
