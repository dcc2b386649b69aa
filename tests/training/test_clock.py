"""Periods are read strictly; steps, iterations and epochs agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refiners.training import Clock, Period, Unit


@pytest.mark.parametrize("text", ["1000:epoch", "4:step", "1:iteration", " 2 : step "])
def test_a_period_is_a_number_and_a_unit(text: str) -> None:
    period = Period.parse(text)
    assert Period.parse(str(period)) == period and str(period) == text.replace(" ", "")


@pytest.mark.parametrize("value", ["4", "step", "4:steps", "-1:step", "0:epoch", "1.5:step", 4, None, "4:step:2"])
def test_anything_else_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no period"):
        Period.parse(value)


@given(
    batches=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    number=st.integers(1, 6),
    unit=st.sampled_from(list(Unit)),
)
def test_a_period_is_due_as_often_as_it_fits(batches: int, accumulation: int, number: int, unit: Unit) -> None:
    clock, period, due = Clock(batches, accumulation), Period(number, unit), list[int]()
    for step in range(1, 61):
        clock.step = step
        if clock.is_due(period):
            due.append(step)
    iterations = number * {Unit.EPOCH: batches, Unit.STEP: accumulation, Unit.ITERATION: 1}[unit]
    # the first step that has reached each multiple
    assert due == sorted(
        {-(-k * iterations // accumulation) for k in range(1, 61 * accumulation // iterations + 1)} & set(range(61))
    )
    assert clock.steps_in(period) == due[0] if due else clock.steps_in(period) > 60


def test_batches_follow_each_other_through_the_epochs() -> None:
    clock = Clock(batches_per_epoch=3, iterations_per_step=2)
    assert [clock.batch_at(iteration) for iteration in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    clock.step = 2
    assert (clock.iteration, clock.epoch, clock.has_ended_epoch) == (4, 1, True)
