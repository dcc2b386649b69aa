"""Optimizers by name: torch's, and those of three libraries, which are imported when they are asked for.

- `AdamW8bit`, `Lion8bit`: bitsandbytes (arXiv 2110.02861), states in 8 bits.
- `Prodigy`: prodigyopt (arXiv 2306.06101), finds its own step size; give it a learning rate of 1.
- `AdamWScheduleFree`, `SGDScheduleFree`: schedulefree (arXiv 2405.15682), need no falling learning rate.
"""

import importlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import nn
from torch.optim import Optimizer


class Source(NamedTuple):
    """Where an optimizer comes from."""

    module: str
    name: str
    package: str


def _sources(module: str, package: str, *names: str) -> dict[str, Source]:
    return {name: Source(module, name, package) for name in names}


OPTIMIZERS: dict[str, Source] = {
    **_sources("torch.optim", "torch", "AdamW", "Adam", "SGD", "RAdam", "NAdam", "Adagrad", "RMSprop", "Adamax"),
    **_sources("bitsandbytes.optim", "bitsandbytes", "AdamW8bit", "Adam8bit", "Lion8bit", "SGD8bit"),
    **_sources("prodigyopt", "prodigyopt", "Prodigy"),
    **_sources("schedulefree", "schedulefree", "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"),
}


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], learning_rate: float, **values: Any
) -> Optimizer:
    """An optimizer by its name in `OPTIMIZERS`.

    parameters: as torch's optimizers take them.
    values: settings such as `betas`; those that are None are left to the optimizer.
    Raises ModuleNotFoundError if its library is not installed, ValueError for a setting that it does not have.
    """
    source = OPTIMIZERS[name]
    try:
        make = getattr(importlib.import_module(source.module), source.name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the optimizer {name} comes with {source.package}, which is not installed: pip install {source.package}"
        ) from error
    given = {key: value for key, value in values.items() if value is not None}
    known = inspect.signature(make).parameters
    for key in given:
        if key not in known:
            raise ValueError(f"the optimizer {name} has no setting {key!r}; it has {', '.join(list(known)[1:])}")
    return cast(Optimizer, make(parameters, lr=learning_rate, **given))
