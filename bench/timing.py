"""Compare callables fairly on a noisy machine: interleaved in one run, medians of many short rounds."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LONG_S = 0.2


@dataclass(frozen=True)
class Row:
    """A measured ratio beside the bound it has to keep."""

    name: str
    ours: float
    peer: float
    unit: str
    bound: float
    value: float  # what is compared with the bound; a ratio unless the name says otherwise

    @property
    def is_within(self) -> bool:
        return self.value <= self.bound


def times(
    candidates: dict[str, Callable[[], object]], rounds: int = 150, round_s: float = 0.004
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, in each of `rounds` rounds, in which the candidates run in turn.

    The order turns from round to round, so that none always runs after the same other. A candidate is called as often
    in a row as fits into `round_s`, at least once, after a call that finds the caches cold and does not count; calls
    that take longer than `LONG_S` warm their own caches, and all count.
    """
    lengths: dict[str, float] = {}
    for name, candidate in candidates.items():
        first = _seconds(candidate)
        lengths[name] = first if first > LONG_S else _seconds(candidate)
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if lengths[name] < LONG_S:
                candidates[name]()
            measured[name].append(_seconds(candidates[name], max(1, round(round_s / lengths[name]))))
    return measured


def _seconds(call: Callable[[], object], count: int = 1) -> float:
    """Seconds per call, of `count` calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def ratio_row(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    bound: float,
    plain: Callable[[], object] | None = None,
    rounds: int = 150,
    round_s: float = 0.004,
) -> Row:
    """Time both and compare ours / peer with the bound: the median over the rounds of the ratio within each round.

    plain: what both do besides; its time in the same round is subtracted from both.
    """
    measured = times({"ours": ours, "peer": peer, **({"plain": plain} if plain else {})}, rounds, round_s)
    floor = measured.get("plain", [0.0] * rounds)
    own = [time - base for time, base in zip(measured["ours"], floor, strict=True)]
    other = [time - base for time, base in zip(measured["peer"], floor, strict=True)]
    if plain:
        base = statistics.median(floor)
        over = [f"{side} {statistics.median(measured[side]) / base:.2f}x plain" for side in ("ours", "peer")]
        name = f"{name} ({', '.join(over)})"
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    ours_us, peer_us = statistics.median(own) * 1e6, statistics.median(other) * 1e6
    return Row(name, ours_us, peer_us, "us", bound, statistics.median(ratios))


def compared(name: str, ours: list[float], peer: list[float], bound: float) -> Row:
    """Compare seconds of the same rounds: the median over the rounds of ours / peer."""
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return Row(name, statistics.median(ours) * 1e3, statistics.median(peer) * 1e3, "ms", bound, ratio)


def print_rows(title: str, rows: Iterable[Row]) -> bool:
    """One line per row as soon as it is there, with a mark where the bound is not kept; whether all are."""
    print(f"\n{title}", flush=True)
    is_within = True
    for row in rows:
        mark = "ok " if row.is_within else "OUT"
        figures = f"ours {row.ours:10.2f} {row.unit}   peer {row.peer:10.2f} {row.unit}"
        print(f"  {mark} {row.name:64s} {figures}   {row.value:6.3f} (bound {row.bound:g})", flush=True)
        is_within = is_within and row.is_within
    return is_within
