"""Finding modules in a tree."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast, overload

from torch import nn

T = TypeVar("T", bound=nn.Module)
Predicate = Callable[[nn.Module, Any], bool]


class Searchable:
    """Mixin for a module that iterates over its children; the parents it speaks of are such modules."""

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def children_in_words(self) -> str:
        """What a message says of the children of this module."""
        return f"its children are {', '.join(self.__dict__['_modules']) or 'none'}"

    @overload
    def walk(self, predicate: type[T], recurse: bool = False) -> Iterator[tuple[T, Any]]: ...
    @overload
    def walk(
        self, predicate: tuple[type[nn.Module], ...] | Predicate | None = None, recurse: bool = False
    ) -> Iterator[tuple[Any, Any]]: ...
    def walk(
        self, predicate: type[T] | tuple[type[nn.Module], ...] | Predicate | None = None, recurse: bool = False
    ) -> Iterator[tuple[T, Any]]:
        """Go through the tree depth first, and give each module that fits, with its parent.

        predicate: a class, several, or `f(module, parent) -> bool`; it may raise StopIteration to skip a sub-tree.
        recurse: whether to go on below a module that fits.

        The tree may be edited on the way: the walk gives the children that a chain had when it got there, less those
        that have left it since, and none that came.
        """
        fits = _as_predicate(predicate)
        for child in self:
            if all(child is not present for present in self.__dict__["_modules"].values()):
                continue
            try:
                found = fits(child, self)
            except StopIteration:
                continue
            if found:
                yield child, self
            if isinstance(child, Searchable) and (recurse or not found):
                yield from child.walk(fits, recurse)

    def layers(self, layer_type: type[T], recurse: bool = False) -> Iterator[T]:
        """The modules of a class, depth first; with `recurse` also those inside another of the same class."""
        return (module for module, _ in self.walk(layer_type, recurse))

    def find(self, layer_type: type[T]) -> T | None:
        """The first module of a class, depth first, or None."""
        return next(self.layers(layer_type), None)

    def ensure_find(self, layer_type: type[T]) -> T:
        """The first module of a class, depth first. Raises ValueError if there is none."""
        found = self.find(layer_type)
        if found is None:
            raise ValueError(f"no {layer_type.__name__} in this {type(self).__name__}: {self.children_in_words()}")
        return found

    def find_parent(self, module: nn.Module) -> Any:
        """The chain in this tree that `module` is a direct child of, or None."""
        if any(module is child for child in self):
            return self
        return next((parent for _, parent in self.walk(lambda child, _: child is module)), None)

    def ensure_find_parent(self, module: nn.Module) -> Any:
        """The chain in this tree that `module` is a direct child of. Raises ValueError if there is none."""
        parent = self.find_parent(module)
        if parent is None:
            raise ValueError(
                f"{type(module).__name__} is not in this {type(self).__name__}: {self.children_in_words()}"
            )
        return parent

    def layer(self, key: int | str | Sequence[int | str], layer_type: type[T] = nn.Module) -> T:
        """The module at a key, or at a path of keys, checked to be of a class. Raises TypeError if it is not."""
        module: Any = self
        for step in [key] if isinstance(key, int | str) else key:
            module = module[step]
        if not isinstance(module, layer_type):
            raise TypeError(f"the layer at {key!r} is a {type(module).__name__}, not a {layer_type.__name__}")
        return module


def _as_predicate(predicate: Any) -> Predicate:
    if predicate is None:
        return lambda module, parent: True
    if isinstance(predicate, type | tuple):
        types = cast("type[nn.Module]", predicate)
        return lambda module, parent: isinstance(module, types)
    if not callable(predicate):
        raise TypeError(f"walk takes a class, a tuple of classes or a function, not {predicate!r}")
    return cast(Predicate, predicate)
