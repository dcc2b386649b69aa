"""Time in training: iterations (forward and backward passes), steps (of the optimizer), epochs (passes over the data).

A period is written `"1000:epoch"`, `"4:step"` or `"1:iteration"`.
"""

import math
import re
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """What a period counts."""

    EPOCH = "epoch"
    STEP = "step"
    ITERATION = "iteration"


@dataclass(frozen=True)
class Period:
    """A length of time, at least one unit.

    >>> Period.parse("4:step"), str(Period.parse("1:epoch"))
    (Period(number=4, unit=<Unit.STEP: 'step'>), '1:epoch')
    """

    number: int
    unit: Unit

    @classmethod
    def parse(cls, value: object) -> "Period":
        """Read `"4:step"`. Raises ValueError for anything else, with an example."""
        if isinstance(value, Period):
            return value
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\w+)\s*", value) if isinstance(value, str) else None
        if found is None or found[2] not in list(Unit):
            raise ValueError(f'{value!r} is no period; write a number and a unit ({", ".join(Unit)}), as in "4:step"')
        if int(found[1]) < 1:
            raise ValueError(f"{value!r} is no period, as it never passes; its number should be at least 1")
        return cls(int(found[1]), Unit(found[2]))

    def __str__(self) -> str:
        return f"{self.number}:{self.unit}"


@dataclass
class Clock:
    """Counts steps; epochs and iterations follow from them.

    batches_per_epoch, iterations_per_step: at least 1. Steps go on across the end of an epoch.
    """

    batches_per_epoch: int
    iterations_per_step: int
    step: int = 0

    @property
    def iteration(self) -> int:
        """Iterations behind us, at the end of a step."""
        return self.step * self.iterations_per_step

    @property
    def epoch(self) -> int:
        """Whole epochs behind us."""
        return self.iteration // self.batches_per_epoch

    @property
    def has_ended_epoch(self) -> bool:
        """Whether an epoch ended within the last step."""
        return self.is_due(Period(1, Unit.EPOCH))

    def batch_at(self, iteration: int) -> tuple[int, int]:
        """The epoch that an iteration falls into, and which of its batches it takes."""
        return divmod(iteration, self.batches_per_epoch)

    def steps_in(self, period: Period) -> int:
        """How many steps a period takes, the last of them whole."""
        if period.unit is Unit.STEP:
            return period.number
        iterations = period.number * (self.batches_per_epoch if period.unit is Unit.EPOCH else 1)
        return math.ceil(iterations / self.iterations_per_step)

    def is_due(self, period: Period) -> bool:
        """Whether a multiple of the period was reached by the last step."""
        now, before = (self._count(period.unit, step) for step in (self.step, self.step - 1))
        return now // period.number > before // period.number

    def _count(self, unit: Unit, step: int) -> int:
        iterations = step * self.iterations_per_step
        return {Unit.STEP: step, Unit.ITERATION: iterations, Unit.EPOCH: iterations // self.batches_per_epoch}[unit]
