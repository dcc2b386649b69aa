"""Who holds whom: a module sits in one chain, unless it is shared on purpose.

Kept beside the modules, in weak references, so that it is neither saved nor copied with them and costs nothing when a
model runs. Sharing on purpose is `structural_copy` (and what builds on it: slices and `+`); an adapter that is not
injected yet is a host of its target: it holds the target without owning it.
"""

import gc
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

_holders: "WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]" = WeakKeyDictionary()
_shared: "WeakSet[nn.Module]" = WeakSet()
_guests: ContextVar[tuple[nn.Module, ...]] = ContextVar("guests", default=())


def holders(module: nn.Module) -> list[nn.Module]:
    """The live chains that own `module`."""
    return list(_holders.get(module, ()))


def own(module: nn.Module, holder: nn.Module) -> None:
    """Record that `holder` owns `module`."""
    _holders.setdefault(module, WeakSet()).add(holder)


def disown(module: nn.Module, holder: nn.Module) -> None:
    """Record that `holder` no longer owns `module`."""
    if module in _holders:
        _holders[module].discard(holder)


def share(module: nn.Module) -> None:
    """Record that `module` is shared by several trees on purpose."""
    _shared.add(module)


def is_guest(module: nn.Module) -> bool:
    """Whether `module` is the target of an adapter that is being built right now."""
    return any(module is guest for guest in _guests.get())


@contextmanager
def hosting(target: nn.Module) -> Generator[None]:
    """While an adapter is built: its chains may hold `target` although another chain owns it."""
    token = _guests.set((*_guests.get(), target))
    try:
        yield
    finally:
        _guests.reset(token)


def check_can_hold(holder: nn.Module, child: nn.Module, above: Sequence[nn.Module]) -> None:
    """Raises ValueError if `holder`, which sits below the modules `above`, must not take `child`.

    It may take what is free, a guest, or shared on purpose, but neither itself nor what it sits in.
    """
    inside = set(child.modules())
    if any(module in inside for module in (holder, *above)):
        raise ValueError(f"{type(child).__name__} cannot be put into itself or below itself")
    other = _other_holder(child, holder)
    if other is not None:
        raise ValueError(
            f"{type(child).__name__} already sits in {_path_of(other)} and cannot sit in two trees: take it out of "
            "there first (pop, remove, eject), or share its weights on purpose (structural_copy, copy.copy of a leaf)"
        )


def _other_holder(module: nn.Module, holder: nn.Module) -> nn.Module | None:
    if module in _shared or is_guest(module) or all(other is holder for other in holders(module)):
        return None
    gc.collect()  # dropped trees are reference cycles: they must not count as holders
    return next((other for other in holders(module) if other is not holder), None)


def _path_of(holder: nn.Module) -> str:
    names = [type(holder).__name__]
    while above := holders(holder):
        holder = above[0]
        names.append(type(holder).__name__)
    return ".".join(reversed(names))
