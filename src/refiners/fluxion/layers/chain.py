"""`Chain`: a tree of layers that runs top to bottom, and `ContextModule`, a layer that knows the tree it sits in.

A chain calls its children in order; a tuple is spread over the arguments of the next child. Everything that happens
per layer when a model runs is in `Chain.forward`: the rest of this file builds, searches and edits trees.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self, cast, overload

import torch
from torch import Tensor, nn

from refiners.fluxion import tree
from refiners.fluxion.context import Context, ContextError, Contexts
from refiners.fluxion.layers import ownership, slots
from refiners.fluxion.layers.compiling import own_entry, own_forward_entry
from refiners.fluxion.layers.module import Module, Return, has_single_output, shell_copy
from refiners.fluxion.layers.searching import Searchable
from refiners.fluxion.layers.transaction import record, whole_or_not_at_all


class ContextModule(Module):
    """A layer that knows its parent, and so can read and write the contexts at the root of its tree."""

    # Empty or one chain. In a tuple, so that torch does not take the parent for a child; never saved nor copied.
    _parent: "tuple[()] | tuple[Chain]" = ()

    @property
    def parent(self) -> "Chain | None":
        """The chain this module sits in."""
        return self._parent[0] if self._parent else None

    @property
    def ensure_parent(self) -> "Chain":
        """The chain this module sits in. Raises AttributeError if there is none."""
        if not self._parent:
            raise AttributeError(f"{type(self).__name__} sits in no Chain: put it into one first")
        return self._parent[0]

    @property
    def root(self) -> "ContextModule":
        """The top of the tree: this module itself if it has no parent."""
        node = self
        while parent := node._parent:
            node = parent[0]
        return node

    def get_parents(self) -> "list[Chain]":
        """The chains above this module, nearest first."""
        parents: list[Chain] = []
        parent = self.parent
        while parent is not None:
            parents.append(parent)
            parent = parent.parent
        return parents

    def get_path(self, top: "Chain | None" = None) -> str:
        """Slots from the root (or from `top`) down to this module, as in `"ViT.Chain_1.Residual"`.

        Raises ValueError if `top` is not above this module.
        """
        names: list[str] = []
        node: ContextModule = self
        while node is not top and node._parent:
            parent = node._parent[0]
            names.append(parent.slot_of(node))
            node = parent
        if top is not None and node is not top:
            raise ValueError(f"{type(self).__name__} does not sit below the given top, a {type(top).__name__}")
        return ".".join([type(node).__name__, *reversed(names)])

    def use_context(self, context_name: str) -> Context:
        """The context of that name: a dict that lives at the root and may be written to.

        Raises ContextError (a KeyError) if no such context was set since the last call of the root.
        """
        root = self.root
        contexts = root.contexts if isinstance(root, Chain) else {}
        if context_name not in contexts:
            known = ", ".join(map(repr, contexts)) or "none"
            raise ContextError(
                f"no context {context_name!r} at {type(root).__name__} (set: {known}): contexts are gone after a call, "
                f"so call set_context({context_name!r}, {{...}}) before each"
            )
        return contexts[context_name]

    def structural_copy(self) -> Self:
        """Return a copy of this node that sits in no tree; weights are shared."""
        clone = shell_copy(self)
        clone.__dict__.pop("_parent", None)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_parent", None)
        return state

    def __copy__(self) -> Self:
        return self.structural_copy()

    def __getattr__(self, name: str) -> Any:
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)  # it raised AttributeError: let that be seen, not "no such attribute"
        return super().__getattr__(name)


class Chain(ContextModule, Searchable):
    """Layers called in order, each with the output of the one before it.

    Args:
        *args: the layers (any `torch.nn.Module`), or a single iterable of layers.

    >>> chain = Chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [name for name, _ in chain.named_children()]
    ['Linear_1', 'ReLU', 'Linear_2']
    """

    _looks_below: ClassVar[bool] = False  # whether `_refresh` reads more than the children and their context sources
    _plan: tuple[nn.Module, ...] = ()  # the children that run: those before the first Return
    _is_straight: bool = False  # no layer but the last can return a tuple, so none is looked for
    _contexts: Any  # Contexts, of which only the root's count; None: nothing set or read since the last call
    _has_initial_contexts: bool = False  # whether what the `init_context` of the tree give is in `_contexts`
    _context_sources: "tuple[Chain, ...]" = ()  # the chains from here down with an `init_context`, inner ones first

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:  # a constructor that fails lets go of the children it had taken
            cls.__init__ = whole_or_not_at_all(cls.__init__)

    def __init__(self, *args: nn.Module | Iterable[nn.Module]) -> None:
        super().__init__()
        layers = slots.unpack(args)
        names = slots.number(type(layer).__name__ for layer in layers)
        self._set_children(dict(zip(names, layers, strict=True)))

    # -- running

    def forward(self, *args: Any) -> Any:
        """Call the layers in order; a tuple is spread over the next layer's arguments."""
        tensor, x = Tensor, args
        if self._is_straight and len(args) == 1 and args[0].__class__ is tensor:
            (x,) = args
            for layer in self._plan:
                x = layer(x)
            return x
        if not self._plan:
            return args[0] if len(args) == 1 else args
        for layer in self._plan:
            x = layer(x) if x.__class__ is tensor or not isinstance(x, tuple) else layer(*x)
        return x

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the chain in place; the arguments are those of `torch.compile`."""
        self._compiled_call_impl = torch.compile(own_forward_entry(self), *args, **kwargs)

    # -- contexts

    def _end_call(self) -> None:
        if not self._parent:
            object.__setattr__(self, "_contexts", None)
            object.__setattr__(self, "_has_initial_contexts", False)

    def init_context(self) -> Contexts:
        """Contexts that every call starts with. Override it; it is called anew each time."""
        return {}

    @property
    def contexts(self) -> Contexts:
        """The contexts of the tree, by name."""
        root = cast("Chain", self.root)
        if root._contexts is None:
            object.__setattr__(root, "_contexts", {})
        if not root._has_initial_contexts:
            root._add_initial_contexts()
        return cast(Contexts, root._contexts)

    def set_context(self, context: str, value: Context) -> None:
        """Set keys of the named context, for the next call of the root; other keys set so far stay."""
        if not isinstance(value, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the value of context {context!r} must be a dict of named values, not {type(value)}")
        root = cast("Chain", self.root)
        if root._contexts is None:
            object.__setattr__(root, "_contexts", {})
        cast(Contexts, root._contexts).setdefault(context, {}).update(value)

    def _add_initial_contexts(self) -> None:
        """Fill in what was not set; what outer chains give counts more than what inner ones do."""
        contexts: Contexts = self._contexts
        for source in reversed(self._context_sources):
            for name, values in source.init_context().items():
                context = contexts.setdefault(name, {})
                for key, value in values.items():
                    context.setdefault(key, value)
        object.__setattr__(self, "_has_initial_contexts", True)

    # -- looking up children

    def __iter__(self) -> Iterator[Any]:
        return iter([module for module in self._modules.values() if module is not None])

    def __len__(self) -> int:
        return len(self._modules)

    @overload
    def __getitem__(self, key: int | str) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> "Chain": ...
    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return _gather([self], keep=lambda names: names[key])
        if isinstance(key, int):
            try:
                return list(self)[key]
            except IndexError:
                raise IndexError(f"{type(self).__name__} has {len(self)} children, so no index {key}") from None
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a Chain is indexed by int, str or slice, not {type(key).__name__}")
        child = self._lookup(key)
        if child is None:
            raise KeyError(f"{type(self).__name__} has no child {key!r}; its children are {', '.join(self._modules)}")
        return child

    def __getattr__(self, name: str) -> Any:
        modules = cast("dict[str, nn.Module | None]", self.__dict__.get("_modules", {}))
        if modules.get(name) is not None:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            child = slots.by_class(modules).get(name)
            if child is None:
                raise
            return child

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *slots.by_class(self._modules)]

    def __setattr__(self, name: str, value: Any) -> None:
        has_slot = name in self.__dict__.get("_modules", ())
        if isinstance(value, nn.Module) or has_slot:
            slots.check_is_module(value)
            if not has_slot:
                raise ValueError(
                    f"{type(self).__name__} has no slot {name!r} to set: add children with append or insert, or keep "
                    f"a module that is no child in a list, as in self.{name} = [module]"
                )
            self._set_children({**self._modules, name: value})
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("_modules", ()):
            self._set_children({slot: child for slot, child in self._modules.items() if slot != name})
        else:
            super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refused: slots name themselves. Use `append` or `insert`."""
        raise ValueError(f"a Chain names its children itself: use append or insert to add {name!r}")

    def _lookup(self, name: str) -> nn.Module | None:
        modules = cast("dict[str, nn.Module | None]", self.__dict__.get("_modules", {}))
        found = modules.get(name)
        return slots.by_class(modules).get(name) if found is None else found

    def slot_of(self, module: nn.Module) -> str:
        """The name of the slot that a direct child sits in. Raises ValueError if it is none."""
        for slot, child in self._modules.items():
            if child is module:
                return slot
        raise ValueError(
            f"{type(module).__name__} is not a child of this {type(self).__name__}: {self.children_in_words()}"
        )

    @property
    def device(self) -> torch.device | None:
        """Where the first parameter (or else buffer) lies; None for a tree without any."""
        first = self._first_tensor()
        return None if first is None else first.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The number format of the first parameter (or else buffer); None for a tree without any."""
        first = self._first_tensor()
        return None if first is None else first.dtype

    def _first_tensor(self) -> Tensor | None:
        return next(self.parameters(), next(self.buffers(), None))

    # -- editing

    def insert(self, index: int, module: nn.Module) -> None:
        """Put `module` before the child at `index`; -1 puts it last. Raises IndexError beyond the ends."""
        length = len(self)
        if not -length - 1 <= index <= length:
            raise IndexError(f"cannot insert at {index}: {type(self).__name__} has {length} children")
        slots.check_is_module(module)
        items = list(self._modules.items())
        slot = slots.free_slot(type(module).__name__, self._modules)
        items.insert(index if index >= 0 else length + 1 + index, (slot, module))
        self._set_children(dict(items))

    def append(self, module: nn.Module) -> None:
        """Put `module` last."""
        self.insert(len(self), module)

    def insert_before_type(self, module_type: type[nn.Module], new_module: nn.Module) -> None:
        """Put `new_module` before the first child of a class. Raises ValueError if there is none."""
        self.insert(self._index_of_type(module_type), new_module)

    def insert_after_type(self, module_type: type[nn.Module], new_module: nn.Module) -> None:
        """Put `new_module` after the first child of a class. Raises ValueError if there is none."""
        self.insert(self._index_of_type(module_type) + 1, new_module)

    def pop(self, key: int | str = -1) -> Any:
        """Take the child at an index, or of a name, out of the chain and return it.

        Raises IndexError or KeyError if there is none, TypeError for several, by a slice.
        """
        if not isinstance(key, int | str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"pop takes one child, by its index or name, not {key!r}")
        module = self[key]
        slot = list(self._modules)[key] if isinstance(key, int) else key
        if slot not in self._modules:  # the name of a class
            slot = self.slot_of(module)
        self._set_children({name: child for name, child in self._modules.items() if name != slot})
        return module

    def remove(self, module: nn.Module) -> None:
        """Take a child out of the chain. Raises ValueError if it is none."""
        slot = self.slot_of(module)
        self._set_children({name: child for name, child in self._modules.items() if name != slot})

    def replace(self, old_module: nn.Module, new_module: nn.Module) -> None:
        """Put `new_module` into the slot of a child; the slot keeps its name. Raises ValueError if it is no child."""
        slot = self.slot_of(old_module)
        slots.check_is_module(new_module)
        self._set_children({**self._modules, slot: new_module})

    def __add__(self, other: Any) -> "Chain":
        """A chain that runs both, one after the other: structural copies, so both stay as they are."""
        if not isinstance(other, Chain | nn.Sequential | list | tuple):
            return NotImplemented
        return _gather([self, other])

    def structural_copy(self) -> Self:
        """Copy the tree, share the leaves: same weights, but edits of the copy never show in the original, nor back.

        Two copies can be adapted differently, and can run at the same time (each has contexts of its own).
        """
        clone = super().structural_copy()
        clone.__dict__.update(_contexts=None)
        clone._modules.clear()
        clone._attach_copies(self._modules)
        clone._copied_from(self)
        return clone

    def _attach_copies(self, modules: dict[str, nn.Module | None]) -> None:
        for slot, module in modules.items():
            child = module.structural_copy() if isinstance(module, Module) else cast(nn.Module, module)
            if child is module:
                ownership.share(child)
            self._modules[slot] = child
            self._connect(child)
        self._refresh()

    def _index_of_type(self, module_type: type[nn.Module]) -> int:
        for index, child in enumerate(self):
            if isinstance(child, module_type):
                return index
        raise ValueError(
            f"no {module_type.__name__} among the children of this {type(self).__name__}: {self.children_in_words()}"
        )

    def _set_children(self, children: dict[str, Any]) -> None:
        """Every edit comes through here: check all, then change all."""
        present = {id(child) for child in self._modules.values()}
        for child in children.values():
            if id(child) not in present:
                ownership.check_can_hold(self, child, above=self.get_parents())
        before = dict(self._modules)
        guests = {id(child) for child in before.values() if child is not None and self not in ownership.holders(child)}
        self._swap_children(children, guests=set())
        record(lambda: self._swap_children(before, guests))

    def _swap_children(self, children: dict[str, Any], guests: set[int]) -> None:
        before = {id(child): child for child in self._modules.values()}
        after = {id(child): child for child in children.values()}
        self._modules.clear()
        self._modules.update(children)
        for key in before.keys() - after.keys():
            self._disconnect(cast(nn.Module, before[key]))
        for key in [key for key in after if key not in before]:
            if key not in guests and not ownership.is_guest(after[key]):
                self._connect(after[key])
        self._refresh_up()

    def _connect(self, child: nn.Module) -> None:
        ownership.own(child, self)
        if isinstance(child, ContextModule):
            child.__dict__["_parent"] = (self,)
        if isinstance(child, Chain) and child._contexts is not None:
            contexts, root = child._contexts, cast("Chain", self.root)
            before = root._contexts and {name: dict(value) for name, value in root._contexts.items()}
            record(lambda: root.__dict__.update(_contexts=before))
            record(lambda: child.__dict__.update(_contexts=contexts))
            child.__dict__["_contexts"] = None
            for name, value in contexts.items():
                self.set_context(name, value)

    def _disconnect(self, child: nn.Module) -> None:
        ownership.disown(child, self)
        if isinstance(child, ContextModule) and child.parent is self:
            del child.__dict__["_parent"]

    def _refresh_up(self) -> None:
        """Refresh this chain after an edit of it, and those above that see something of the edit."""
        is_hidden = False
        for chain in (self, *self.get_parents()):
            if not is_hidden or chain._looks_below:
                before = chain._context_sources
                chain._refresh()
                is_hidden = chain._context_sources == before

    def _refresh(self) -> None:
        """Work out anew what follows from the children."""
        plan: list[nn.Module] = []
        for child in self:
            if isinstance(child, Return):
                break
            plan.append(child)
        sources = [source for child in self if isinstance(child, Chain) for source in child._context_sources]
        self.__dict__.update(
            _plan=tuple(plan),
            _is_straight=bool(plan) and all(has_single_output(layer) for layer in plan[:-1]),
            _context_sources=(*sources, self) if type(self).init_context is not Chain.init_context else tuple(sources),
            _has_initial_contexts=False,
        )
        self.__dict__.setdefault("_contexts", None)
        if "__call__" not in self.__dict__:
            self.__dict__["__call__"] = own_entry(self)

    # -- copying, saving, printing

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; a checkpoint without a tensor of any adapter loads into the base and leaves adapters alone."""
        modules = cast("Iterator[tuple[str, nn.Module]]", self.named_modules())
        own = tuple(f"{name}." for name, module in modules if getattr(module, "is_adapter", False))
        if own and not any(key.startswith(own) for key in state_dict):
            kept = {key: tensor for key, tensor in self.state_dict(keep_vars=True).items() if key.startswith(own)}
            filled = OrderedDict({**state_dict, **kept})
            filled.__dict__.update(getattr(state_dict, "__dict__", {}))  # torch's metadata of the checkpoint
            state_dict = filled
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_plan", "_contexts", "_context_sources", "_has_initial_contexts", "__call__"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for child in self:
            self._connect(child)
        self._refresh()
        self._restored()

    def __repr__(self) -> str:
        return tree.render(self)


def _gather(parts: "list[Any]", keep: Callable[[list[nn.Module]], list[nn.Module]] = list) -> Chain:
    """A chain over structural copies of the children of `parts`."""
    children = keep([child for part in parts for child in part])
    for child in children:
        slots.check_is_module(child)
    chain = Chain()
    names = slots.number(type(child).__name__ for child in children)
    chain._attach_copies(dict(zip(names, children, strict=True)))  # pyright: ignore[reportPrivateUsage]
    return chain
