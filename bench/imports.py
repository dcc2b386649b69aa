"""What imports cost, each in a fresh interpreter, in turn with the peer's: the median of several."""

import statistics
import subprocess
import sys

from bench.timing import Row

ROUNDS = 7
SCRIPT = """
import time
{before}
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""
PAIRS = {
    "import refiners": ("import refiners", "import diffusers"),
    "a pipeline's imports": (
        "from refiners.foundationals.latent_diffusion import StableDiffusion_1",
        "from diffusers import StableDiffusionPipeline",
    ),
}
BOUND = 0.5


def seconds(statement: str, before: str = "") -> float:
    """The time that a statement takes in an interpreter of its own."""
    script = SCRIPT.format(before=before, statement=statement)
    return float(subprocess.check_output([sys.executable, "-c", script], stderr=subprocess.DEVNULL))


def pair_row(name: str, ours: str, peer: str) -> Row:
    """Both statements in turn, after one round that fills the caches of files."""
    measured = [(seconds(ours), seconds(peer)) for _ in range(ROUNDS + 1)][1:]
    value = statistics.median(mine / theirs for mine, theirs in measured)
    medians = [statistics.median(side) * 1e3 for side in zip(*measured, strict=True)]
    return Row(name, medians[0], medians[1], "ms", BOUND, value)


def rows() -> list[Row]:
    added = statistics.median(seconds("import refiners.fluxion.layers", before="import torch") for _ in range(ROUNDS))
    layers = Row("import refiners.fluxion.layers after torch, seconds", added * 1e3, 0.0, "ms", 0.15, added)
    return [layers, *(pair_row(name, *statements) for name, statements in PAIRS.items())]
