"""Optimizers by name: torch's, and those of three libraries, which are imported when they are asked for.

- `AdamW8bit`, `Lion8bit`: bitsandbytes (arXiv 2110.02861), states in 8 bits.
- `Prodigy`: prodigyopt (arXiv 2306.06101), finds its own step size; give it a learning rate of 1.
- `AdamWScheduleFree`, `SGDScheduleFree`: schedulefree (arXiv 2405.15682), need no falling learning rate.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from torch import nn
from torch.optim import Optimizer

from refiners.training.settings import ConfigError


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


def find_optimizer(name: str) -> Callable[..., Optimizer]:
    """The class of an optimizer by its name in `OPTIMIZERS`. Raises ModuleNotFoundError if it is not installed."""
    source = OPTIMIZERS[name]
    try:
        return cast("Callable[..., Optimizer]", getattr(importlib.import_module(source.module), source.name))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the optimizer {name} comes with {source.package}, which is not installed: pip install {source.package}"
        ) from error


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], learning_rate: float, **values: Any
) -> Optimizer:
    """An optimizer by its name in `OPTIMIZERS`.

    parameters: as torch's optimizers take them.
    values: settings such as `betas`; those that are None are left to the optimizer.
    Raises ModuleNotFoundError if its library is not installed, ValueError for a setting that it does not have.
    """
    make = checked_optimizer(name, **values)
    return make(parameters, lr=learning_rate, **{key: value for key, value in values.items() if value is not None})


def checked_optimizer(name: str, **values: Any) -> Callable[..., Optimizer]:
    """The class of an optimizer that has all settings that are not None. Raises as `make_optimizer`."""
    make = find_optimizer(name)
    known = inspect.signature(make).parameters
    for key, value in values.items():
        if value is not None and key not in known:
            raise ValueError(f"the optimizer {name} has no setting {key!r}; it has {', '.join(list(known)[1:])}")
    return make


def groups_by_rate(parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """What `make_optimizer` takes: the parameters of each model that has a rate of its own, after all others.

    rates: by the name of the model, which the names of its parameters start with; None for the common rate.
    Raises ConfigError if a model has a rate, but no parameter.
    """
    own = {model: rate for model, rate in rates.items() if rate is not None}
    members: dict[str, list[nn.Parameter]] = {"": [], **{model: [] for model in own}}
    for name, parameter in parameters.items():
        model = name.partition(".")[0]
        members[model if model in own else ""].append(parameter)
    for model in own:
        if not members[model]:
            raise ConfigError(
                f"optimizer.{model}_learning_rate = {own[model]}, but no parameter of {model} trains; choose what "
                "should train there, or leave the rate out"
            )
    groups = [{"params": found, **({"lr": own[model]} if model else {})} for model, found in members.items()]
    return [group for group in groups if group["params"]]
