"""`Adapter`: takes the place of its target in a tree, holds the target inside, and gives the place back.

An adapter is transparent in names. In the slot `Linear_1`, the target's parameters are `Linear_1.weight` and
`Linear_1.bias` before, during and after adaptation; the adapter's own are `Linear_1.<its class>.…`. So checkpoints of
the base load into an adapted model, and the other way round the base's keys are there unchanged.

The place inside the adapter where the target sits is called its hole. Adapters stack: one that is injected later on
the same target goes into the hole of the one that is there. They can be ejected in any order.
"""

import re
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar, cast

from torch import Tensor, nn

from refiners.fluxion.layers import ownership, slots
from refiners.fluxion.layers.chain import Chain, ContextModule
from refiners.fluxion.layers.module import Return
from refiners.fluxion.layers.transaction import record, transaction, whole_or_not_at_all

T = TypeVar("T", bound=nn.Module)


class Adapter(ContextModule, Generic[T]):
    """Mixin for chains that adapt a target: `class MyAdapter(fl.Chain, Adapter[fl.Linear])`.

    The constructor builds the chain with the target somewhere in it, inside `with self.setup_adapter(target):`. A chain
    that leaves the target out replaces it; the target is then kept behind a `Return`, where it does not run.
    Overrides of `inject` and `eject` may edit more of the tree: what they do happens whole or not at all.

    >>> import refiners.fluxion.layers as fl
    >>> class Doubled(fl.Chain, Adapter[fl.Linear]):
    ...     def __init__(self, target: fl.Linear) -> None:
    ...         with self.setup_adapter(target):
    ...             super().__init__(target, fl.Multiply(2.0))
    >>> model = fl.Chain(fl.Linear(4, 4), fl.ReLU())
    >>> adapter = Doubled(model.Linear).inject(model)
    >>> list(model.state_dict())
    ['Linear.weight', 'Linear.bias']
    >>> adapter.eject()
    """

    is_adapter = True
    _target: tuple[()] | tuple[T] = ()
    _hole: tuple[str, ...] = ()  # slots from the adapter down to where the target sits
    _is_injected: bool = False
    _name: str = ""  # what the adapter's own parameters are below, in the slot of the target

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in ("inject", "eject"):
            if method in cls.__dict__:
                setattr(cls, method, whole_or_not_at_all(cls.__dict__[method]))

    @contextmanager
    def setup_adapter(self, target: T) -> Generator[None]:
        """Wrap `super().__init__`: lets the new chain hold `target`, which stays in its own tree as well."""
        if not isinstance(self, Chain):
            name = type(self).__name__
            raise TypeError(f"{name} must be a Chain: class {name}(fl.Chain, Adapter[...])")
        if "_modules" in self.__dict__:
            raise RuntimeError(f"{type(self).__name__}: setup_adapter must wrap super().__init__, not come after it")
        if not isinstance(target, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{type(self).__name__} adapts a module, not {type(target).__name__}: {target!r}")
        self.__dict__.update(_target=(target,), _name=type(self).__name__)
        with ownership.hosting(target):
            yield
            if self.find_parent(target) is None:
                self.append(Return())
                self.append(target)
            _make_slots_distinct(self, target)
        self.__dict__.update(_hole=_slots_down_to(self, target), _name=_free_name(self, None))
        self.register_load_state_dict_post_hook(_present_names)

    @property
    def target(self) -> T:
        """The module that this adapter adapts; it may be an adapter itself."""
        if not self._target:
            raise AttributeError(f"{type(self).__name__} has no target: its constructor must use setup_adapter")
        return self._target[0]

    @property
    def base(self) -> nn.Module:
        """What is adapted, below this adapter and all those in its hole."""
        module = self._occupant()
        while isinstance(module, Adapter):
            module = module._occupant()
        return module

    # -- inject and eject

    def inject(self, parent: Chain | None = None) -> Self:
        """Take the target's place in `parent`, or below it where other adapters came first, and return the adapter.

        parent: may be left out if the target sits in one tree only. A target that is itself the root of a tree has no
            parent; the adapter becomes the root.
        Raises ValueError if the target is not there, RuntimeError if the adapter is injected already.
        """
        if self._is_injected:
            raise RuntimeError(f"{type(self).__name__} is injected already, at {self.get_path()}: eject it first")
        target = self.target
        place = self._find_place() if parent is None else parent.ensure_find_parent(target)
        self._check_can_inject(place)
        with transaction():
            self._set_state(_name=_free_name(self, place))
            if place is not None:
                record(lambda: place._connect(target))
                place._set_children({**place._modules, place.slot_of(target): self})
                if any(child is target for child in place):  # it stays in another slot, where it may be adapted too
                    ownership.share(target)
            self._settle(target)
            self._set_state(_is_injected=True)
        return self

    def eject(self) -> None:
        """Give the place back: the very same target (or the adapters injected on it later) sits there again.

        Raises RuntimeError if the adapter is not injected.
        """
        if not self._is_injected:
            raise RuntimeError(f"{type(self).__name__} is not injected, so it cannot be ejected")
        parent, occupant = self.parent, self._occupant()
        with transaction():
            self._unsettle(occupant)
            if parent is not None:
                parent._set_children({**parent._modules, parent.slot_of(self): occupant})
                parent._connect(occupant)  # `_set_children` does so unless it sits in another slot there already
                for outer in (parent, *parent.get_parents()):
                    if isinstance(outer, Adapter) and outer._target == (self,):
                        outer._set_state(_target=(occupant,))
            self._set_state(_is_injected=False)

    def _check_can_inject(self, place: Chain | None) -> None:
        target, base = cast(Any, self.target), self.base
        is_waiting = place is None and getattr(target, "is_adapter", False) and not target._is_injected
        if is_waiting or (place is not None and place not in ownership.holders(target)):
            name = type(target).__name__
            raise ValueError(f"the target, a {name}, is or sits in an adapter that is not injected: inject that first")
        for name in (*self._parameters, *self._buffers):
            if name in base._parameters or name in base._buffers or name in base._modules:
                ours, theirs = type(self).__name__, type(base).__name__
                raise ValueError(f"{ours} has a tensor {name!r} and so has what it adapts, a {theirs}: rename it")

    def _find_place(self) -> Chain | None:
        target = self.target
        if isinstance(target, ContextModule):
            return target.parent
        places = [holder for holder in ownership.holders(target) if isinstance(holder, Chain)]
        if len(places) != 1:
            where = ", ".join(place.get_path() for place in places) or "no Chain"
            raise ValueError(f"the target, a {type(target).__name__}, sits in {where}: say which parent to inject into")
        return places[0]

    def _holder_and_slot(self) -> tuple[Chain, str]:
        holder = cast(Chain, self)
        for slot in self._hole[:-1]:
            child = holder._modules[slot]
            holder = cast(Chain, child.base if isinstance(child, Adapter) else child)
        return holder, self._hole[-1]

    def _occupant(self) -> nn.Module:
        holder, slot = self._holder_and_slot()
        return cast(nn.Module, holder._modules[slot])

    def _settle(self, target: nn.Module) -> None:
        """Let the guest in the hole become a resident, whose parent is in the adapter."""
        holder, _ = self._holder_and_slot()
        holder._connect(target)
        record(lambda: holder._disconnect(target))
        holder._refresh_up()

    def _unsettle(self, occupant: nn.Module) -> None:
        """Let whoever sits in the hole go, and have the target there as a guest."""
        holder, slot = self._holder_and_slot()
        holder._disconnect(occupant)
        holder._modules[slot] = self.target

        def undo() -> None:
            holder._modules[slot] = occupant
            holder._connect(occupant)
            holder._refresh_up()

        record(undo)
        holder._refresh_up()

    def _set_state(self, **values: Any) -> None:
        before = {name: getattr(self, name) for name in values}
        self.__dict__.update(values)
        record(lambda: self.__dict__.update(before))

    def _restored(self) -> None:
        if not self._is_injected and self._hole:
            self._holder_and_slot()[0]._disconnect(self._occupant())

    def _copied_from(self, source: Any) -> None:
        theirs, ours = source._occupant(), self._occupant()
        while theirs is not source.target and isinstance(theirs, Adapter) and isinstance(ours, Adapter):
            theirs, ours = theirs._occupant(), ours._occupant()
        self.__dict__["_target"] = (ours,)
        self._restored()

    # -- transparent names

    def _present(self, raw: str, prefix: str = "") -> str:
        """The name of a module or tensor below this adapter as seen from outside; `raw` goes by what holds what."""
        hole = prefix + ".".join(self._hole)
        if raw == hole:
            return prefix.removesuffix(".")
        if raw.startswith(f"{hole}."):
            return prefix + raw.removeprefix(f"{hole}.")
        return f"{prefix}{self._name}.{raw.removeprefix(prefix)}"

    def _raw(self, presented: str, prefix: str) -> str:
        rest = presented.removeprefix(prefix)
        if rest.startswith(f"{self._name}."):
            return prefix + rest.removeprefix(f"{self._name}.")
        return f"{prefix}{'.'.join(self._hole)}.{rest}"

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], Any, None]:
        """As in torch, with the names that the tree has for its users."""
        outside = f"{prefix}." if prefix else ""
        modules = cast("Iterator[tuple[str, nn.Module]]", super().named_modules(memo, prefix, remove_duplicate))
        for name, module in modules:
            yield (f"{outside}{self._name}" if module is self else self._present(name, outside)), module

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As in torch, with the names that the tree has for its users."""
        tensors = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            destination = OrderedDict[str, Any]()
            destination._metadata = OrderedDict[str, Any]()
        for raw, tensor in tensors.items():
            destination[self._present(raw, prefix)] = tensor
        for raw, metadata in getattr(tensors, "_metadata", {}).items():
            own = f"{prefix}{self._name}"
            destination._metadata[own if raw == prefix[:-1] else self._present(raw, prefix)] = metadata
        return destination

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch calls it by position
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        renamed = {self._raw(key, prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        state_dict.update(renamed)
        self.__dict__["_loading"] = (prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(type(self), name, None), property):
            return super().__getattr__(name)
        if self._hole and name == self._name:
            return self
        own = self.__dict__
        if any(name in own.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules")) or not self._hole:
            return super().__getattr__(name)
        occupant = self._occupant()
        if name.startswith("_") and name not in dict(occupant.named_parameters(recurse=False)):
            return super().__getattr__(name)
        return getattr(occupant, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; an attribute of that name of the target does not count as one of the adapter."""
        with self._apart():
            super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in torch; an attribute of that name of the target does not count as one of the adapter."""
        with self._apart():
            super().register_buffer(name, tensor, persistent)

    @contextmanager
    def _apart(self) -> Generator[None]:
        """Look nothing up in the target."""
        hole, self.__dict__["_hole"] = self._hole, ()
        try:
            yield
        finally:
            self.__dict__["_hole"] = hole

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self._owner_below(name)
        if owner is None:
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and name in owner._parameters:
            owner._parameters[name] = cast(Any, value)  # torch.func.functional_call swaps tensors in this way
        else:
            setattr(owner, name, value)

    def _owner_below(self, name: str) -> nn.Module | None:
        """The adapted module, if it (and not the adapter) has a parameter or buffer of that name."""
        if not self._is_injected or name in self.__dict__ or name in self._parameters or name in self._buffers:
            return None
        base = self.base
        return base if name in base._parameters or name in base._buffers else None


def _slots_down_to(top: Chain, target: nn.Module) -> tuple[str, ...]:
    holder = top.ensure_find_parent(target)
    path = [holder.slot_of(target)]
    while holder is not top:
        parent = holder.ensure_parent
        path.append(parent.slot_of(holder))
        holder = parent
    return tuple(reversed(path))


def _make_slots_distinct(adapter: Chain, target: nn.Module) -> None:
    """Number the adapter's own slots past those of what it adapts, as names of both are looked up at one place."""
    below = _names_below(target)
    renamed: dict[str, Any] = {}
    for slot, child in adapter._modules.items():
        taken = (*below, *adapter._modules, *renamed)
        renamed[slots.free_slot(type(child).__name__, taken) if slot in below else slot] = child
    if renamed.keys() != adapter._modules.keys():
        adapter._set_children(renamed)


def _names_below(module: nn.Module) -> set[str]:
    """What is looked up by name in a module and, if it is an adapter, in what it adapts."""
    names: set[str] = set()
    while isinstance(module, Adapter):
        names.update((module._name, *module._modules))
        module = module._occupant()
    return names.union(module._modules, module._parameters)


def _free_name(adapter: Adapter[Any], place: Chain | None) -> str:
    """A name for the adapter's own parameters that no other adapter in the same slot has, nor a child of the base."""
    taken = _names_below(adapter.target).union(adapter._modules, adapter._parameters, adapter._buffers)
    slot = None if place is None else place.slot_of(adapter.target)
    for outer in () if place is None else (place, *place.get_parents()):
        if isinstance(outer, Adapter) and outer._holder_and_slot() == (place, slot):
            taken.update((outer._name, *outer._modules, *outer._parameters, *outer._buffers))
            place = outer.parent
            slot = None if place is None else place.slot_of(outer)
    return slots.free_slot(type(adapter).__name__, taken)


def _present_names(adapter: nn.Module, keys: Any) -> None:
    """Hook after loading: put the names in torch's report into the form that users know."""
    prefix, errors = adapter.__dict__.pop("_loading")
    present = cast("Adapter[Any]", adapter)._present
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [present(name, prefix) if name.startswith(prefix) else name for name in names]
    named = re.compile(r'(size mismatch for |parameter named ")' + re.escape(prefix) + r"[\w.]+")
    for index, error in enumerate(errors):
        errors[index] = named.sub(lambda found: found[1] + present(found[0].removeprefix(found[1]), prefix), error)
