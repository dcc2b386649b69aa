"""Slots: the names of a chain's children.

A child gets its slot when it joins the chain, from its class: `Linear` when it is the only one, `Linear_1`, `Linear_2`
when the chain is built with several. From then on the slot keeps its name, whatever happens to the child (an adapter
takes over the slot) or to its neighbours. So parameter names never move.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

from torch import nn


def number(class_names: Iterable[str]) -> list[str]:
    """Name children in order: the class alone if it occurs once, else numbered from 1.

    >>> number(["Linear", "ReLU", "Linear"])
    ['Linear_1', 'ReLU', 'Linear_2']
    """
    names = list(class_names)
    total, seen = Counter(names), Counter[str]()
    taken = {name for name in names if total[name] == 1}
    numbered: list[str] = []
    for name in names:
        slot = name
        while total[name] > 1 and (slot == name or slot in taken):
            seen[name] += 1
            slot = f"{name}_{seen[name]}"
        taken.add(slot)
        numbered.append(slot)
    return numbered


def free_slot(class_name: str, taken: Iterable[str]) -> str:
    """Name one more child without touching the names that are taken.

    >>> free_slot("Linear", ["Linear_1", "Linear_2"]), free_slot("Linear", ["Linear"]), free_slot("Linear", [])
    ('Linear_3', 'Linear_2', 'Linear')
    """
    highest = 0
    for name in taken:
        stem, _, digits = name.rpartition("_")
        if name == class_name:
            highest = max(highest, 1)
        elif stem == class_name and digits.isdigit():
            highest = max(highest, int(digits))
    return class_name if highest == 0 else f"{class_name}_{highest + 1}"


def by_class(modules: dict[str, nn.Module | None]) -> dict[str, nn.Module]:
    """The same children named by the classes that sit in the slots now: how `chain.LoraAdapter` finds an adapter."""
    present = [module for module in modules.values() if module is not None]
    return dict(zip(number(type(module).__name__ for module in present), present, strict=True))


def unpack(args: tuple[Any, ...]) -> list[nn.Module]:
    """The children that a constructor got: modules, or a single iterable of modules. Raises TypeError for others."""
    is_iterable = len(args) == 1 and not isinstance(args[0], nn.Module) and isinstance(args[0], Iterable)
    modules = list(cast("Iterable[nn.Module]", args[0] if is_iterable else args))
    for module in modules:
        check_is_module(module)
    return modules


def check_is_module(module: object) -> None:
    """Raises TypeError if `module` is no `torch.nn.Module`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"a Chain holds modules, not {type(module).__name__}: {module!r}")
