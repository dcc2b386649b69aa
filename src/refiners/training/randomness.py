"""Chance that can be repeated: seeds worked out from what they are for, and the state of the global generators.

Whatever is drawn for a sample (noise, time step, flip, caption) comes from a generator seeded by where in training the
sample stands. So it depends neither on what was drawn before nor on how many processes there are.
"""

import hashlib
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from refiners.fluxion.utils import manual_seed


def mix(*parts: int | str) -> int:
    """A seed, 0 … 2**63 - 1, that follows from all the parts.

    >>> mix(0, "noise", 7) == mix(0, "noise", 7), mix(0, "noise", 7) == mix(0, "noise", 8)
    (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by `mix`."""
    return torch.Generator().manual_seed(mix(*parts))


def get_randomness() -> dict[str, Any]:
    """The state of all global generators: tensors, numbers and strings."""
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "state": torch.tensor(python), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": numpy_gauss,
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_randomness(state: dict[str, Any]) -> None:
    """Bring all global generators to a state that `get_randomness` gave."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def apart(seed: int | None = None) -> Generator[None]:
    """Draw inside, from `seed` on if given, without any effect on what is drawn afterwards."""
    state = get_randomness()
    try:
        if seed is not None:
            manual_seed(seed)
        yield
    finally:
        set_randomness(state)
