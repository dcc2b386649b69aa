"""`python -m bench [SUITE ...]`: print figures beside their bounds; exit 1 if one is not kept."""

import sys

import torch

from bench import adapters, chains, conditioning, deltas, diffusion, imports, loras, training
from bench.timing import print_rows

SUITES = {
    "chains": chains.rows,
    "loras": loras.rows,
    "deltas": deltas.rows,
    "imports": imports.rows,
    "diffusion": diffusion.rows,
    "adapters": adapters.rows,
    "conditioning": conditioning.rows,
    "training": training.rows,
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(SUITES)}")
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, one thread; ours / peer, medians of interleaved rounds")
    is_within = True
    for name in names or list(SUITES):
        is_within = print_rows(name, SUITES[name]()) and is_within
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
