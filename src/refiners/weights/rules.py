"""Names as rules: how the parameters of a tree are called in another format, both ways, from a few nested patterns.

A block states the names of its children once; parents compose blocks. A rule maps a path of ours to a path of theirs:

    ATTENTION = Names({"Distribute.Linear_1": "q_proj", "Linear": "out_proj"})
    ENCODER = Names({"Layer_{n}": ("layers.{n-1}", ATTENTION), "Cache": None})

`{n}` stands for a whole number and may be shifted on the right. What follows the path is mapped by the nested names if
there are any, and else stays as it is (`weight`, `bias`). None: known, and left out on purpose.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Union

Target = Union[str, None, "tuple[str, Names]"]
_VARIABLE = re.compile(r"\{(\w+?)(?:([+-])(\d+))?\}")
_NUMBER = "(0|[1-9][0-9]{0,8})"  # written in the one way in which we write it


class UnknownNameError(KeyError):
    """A name that no rule covers."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class _Pattern:
    """A path with whole-number variables, each shifted by a constant: `layers.{n-1}`."""

    text: str

    @cached_property
    def variables(self) -> list[tuple[str, int]]:
        return [(name, int(f"{sign}{digits}") if sign else 0) for name, sign, digits in _VARIABLE.findall(self.text)]

    @cached_property
    def regex(self) -> re.Pattern[str]:
        if not self.text:
            return re.compile(r"(.+)", re.DOTALL)  # an empty path: all is what follows
        literals = _VARIABLE.split(self.text)[::4]
        return re.compile(_NUMBER.join(map(re.escape, literals)) + r"(?:\.(.+))?", re.DOTALL)

    def match(self, name: str) -> tuple[dict[str, int], str | None] | None:
        """The values of the variables and what follows the path (None if nothing does), or None if it does not fit."""
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        *numbers, rest = found.groups()
        values: dict[str, int] = {}
        for (variable, shift), number in zip(self.variables, numbers, strict=True):
            value = int(number) - shift
            if values.setdefault(variable, value) != value:
                return None
        return values, rest

    def fill(self, values: Mapping[str, int]) -> str:
        return _VARIABLE.sub(
            lambda found: str(values[found[1]] + int((found[2] or "+") + (found[3] or "0"))), self.text
        )


@dataclass(frozen=True)
class _Rule:
    ours: _Pattern
    theirs: _Pattern | None
    below: "Names | None"

    def rename(self, name: str, is_to_theirs: bool) -> tuple[bool, str | None]:
        """Whether the rule covers `name`, and what it becomes (None: left out)."""
        source, target = (self.ours, self.theirs) if is_to_theirs else (self.theirs, self.ours)
        matched = source.match(name) if source else None
        if matched is None:
            return False, None
        values, rest = matched
        if target is None:
            return True, None
        if any(values[variable] + shift < 0 for variable, shift in target.variables):
            return False, None
        if self.below is None or rest is None:
            renamed = _join(target.fill(values), rest)
            return self.below is None and renamed != "", renamed
        is_covered, inner = self.below.find(rest, is_to_theirs)
        return is_covered, None if inner is None else _join(target.fill(values), inner)


class Names:
    """Rules between our names and theirs, in both directions.

    rules: our path to their path, to (their path, names below it), or to None (ours only, left out on purpose).
    dropped: paths of theirs that are known and left out on purpose.
    aliases: other paths of theirs, as in older files, and the path that each stands for; read, never written.

    >>> names = Names({"Layer_{n}": ("layers.{n-1}", Names({"Linear": "proj"}))}, dropped=["position_ids"])
    >>> names.to_theirs("Layer_2.Linear.weight"), names.to_ours("layers.1.proj.weight")
    ('layers.1.proj.weight', 'Layer_2.Linear.weight')
    >>> names.to_ours("position_ids") is None
    True
    """

    def __init__(
        self, rules: "Mapping[str, Target]", dropped: Iterable[str] = (), aliases: Mapping[str, str] | None = None
    ) -> None:
        self.rules = tuple(_make_rule(ours, target) for ours, target in rules.items())
        self.dropped = tuple(_Pattern(text) for text in dropped)
        self.aliases = tuple(_make_rule(other, path) for other, path in (aliases or {}).items())

    def to_theirs(self, name: str) -> str | None:
        """Their name for ours; None if it is left out on purpose. Raises UnknownNameError if no rule covers it."""
        return self._rename(name, is_to_theirs=True)

    def to_ours(self, name: str) -> str | None:
        """Our name for theirs; None if it is left out on purpose. Raises UnknownNameError if no rule covers it."""
        return self._rename(name, is_to_theirs=False)

    def paths(self, is_ours: bool = True) -> Iterator[str]:
        """The paths that the rules speak of, with their variables, as in `Layer_{n}.Linear`."""
        for rule in self.rules:
            pattern = rule.ours if is_ours else rule.theirs
            if pattern is None:
                continue
            if rule.below is None:
                yield pattern.text
            else:
                yield from (_join(pattern.text, inner) for inner in rule.below.paths(is_ours))

    def _rename(self, name: str, is_to_theirs: bool) -> str | None:
        is_covered, renamed = self.find(name, is_to_theirs)
        if not is_covered:
            shape = re.sub(r"\d+", "{n}", name)
            known = list(self.paths(is_ours=is_to_theirs))
            nearest = difflib.get_close_matches(shape, known, n=1, cutoff=0.0)
            hint = f"; the nearest known path is {nearest[0]!r}" if nearest else ""
            raise UnknownNameError(f"no rule covers {name!r}{hint}")
        return renamed

    def find(self, name: str, is_to_theirs: bool) -> tuple[bool, str | None]:
        """Whether a rule covers a name, and what it is called on the other side; None if it is left out there."""
        if not is_to_theirs and any(pattern.match(name) for pattern in self.dropped):
            return True, None
        for rule in self.rules:
            is_covered, renamed = rule.rename(name, is_to_theirs)
            if is_covered:
                return True, renamed
        return (False, None) if is_to_theirs else self._find_alias(name)

    def _find_alias(self, name: str) -> tuple[bool, str | None]:
        for alias in self.aliases:
            is_alias, path = alias.rename(name, is_to_theirs=True)
            if is_alias and path is not None:
                is_covered, renamed = self.find(path, is_to_theirs=False)
                if is_covered:
                    return True, renamed
        return False, None


def _make_rule(ours: str, target: Target) -> _Rule:
    theirs, below = target if isinstance(target, tuple) else (target, None)
    pattern = _Pattern(ours)
    if "}{" in ours or "}{" in (theirs or ""):
        raise ValueError(f"the rule {ours!r}: {theirs!r} must have something between any two variables")
    if theirs is not None and {name for name, _ in pattern.variables} != {v for v, _ in _Pattern(theirs).variables}:
        raise ValueError(f"the rule {ours!r}: {theirs!r} must have the same variables on both sides, to work both ways")
    return _Rule(pattern, None if theirs is None else _Pattern(theirs), below)


def _join(path: str, rest: str | None) -> str:
    return ".".join(part for part in (path, rest) if part)
