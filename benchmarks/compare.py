"""`python -m benchmarks compare A B`: whether fused_opt became slower from one run to the other.

A shared machine is faster in one minute and slower in the next, and peers are not ours to mend. So
a case counts as slower only where all views agree: its time, and its time over that of each peer
and of the roof, measured in the same rounds. The view that says least decides. It has to be beyond
the noise: the 3 % by which identical functions differ when they are interleaved, what the middle
three fifths of the samples of both runs span to either side, and how far the changes of the others
lie apart, whose code is the same in both runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from .providers import OURS
from .report import by_case, ours_in, significant
from .roof import ROOF
from .rows import Row

IDENTICAL = 0.03  # by which identical functions differ, interleaved
STYLES = {"slower": "bold red", "faster": "green", "same": ""}


@dataclass(frozen=True)
class Measure:
    """A time that rows have, and its percentiles."""

    name: str
    unit: str
    median: str
    low: str
    high: str

    def of(self, row: Row) -> float | None:
        """Returns the median."""
        value: float | None = getattr(row, self.median)
        return value

    def noise(self, row: Row) -> float:
        """Returns how far samples lie from the median, relative to it."""
        median, low, high = (getattr(row, each) for each in (self.median, self.low, self.high))
        return float(high - low) / 2 / float(median)


TIME = Measure("step", "ms", "median_ms", "p20_ms", "p80_ms")
HOST = Measure("host", "µs", "host_us", "host_p20_us", "host_p80_us")


@dataclass(frozen=True)
class Change:
    """What became of fused_opt in one case: `factor` above 1 is slower."""

    row: Row
    measure: Measure
    before: float
    after: float
    factor: float
    noise: float

    @property
    def verdict(self) -> str:
        """Says whether the change is beyond the noise."""
        if self.factor > 1 + self.noise:
            return "slower"
        return "faster" if 1 / self.factor > 1 + self.noise else "same"


@dataclass(frozen=True)
class Comparison:
    """The changes of the cases that both runs have, and what is to be said besides."""

    changes: list[Change]
    warnings: list[str]

    @property
    def regressions(self) -> list[Change]:
        """The changes for the worse."""
        return [each for each in self.changes if each.verdict == "slower"]


def compare(before: list[Row], after: list[Row]) -> Comparison:
    """Compares two runs case by case."""
    old = {rows[0].case: rows for rows in by_case(before)}
    new = {rows[0].case: rows for rows in by_case(after)}
    changes = [
        change
        for case, rows in old.items()
        if case in new
        for measure in (TIME, HOST)
        for change in changes_of(measure, rows, new[case])
    ]
    return Comparison(changes, [*different_machines(before, after), *missing(old, new)])


def different_machines(before: list[Row], after: list[Row]) -> Iterator[str]:
    """Warns where the runs differ in more than the commit."""
    for name in ("machine", "torch", "cpu_isa"):
        old, new = ({getattr(row, name) for row in rows} for rows in (before, after))
        if old != new:
            said = " against ".join(", ".join(sorted(each)) for each in (old, new))
            yield f"the runs differ in {name}: {said}"


def missing(
    old: dict[tuple[str, ...], list[Row]], new: dict[tuple[str, ...], list[Row]]
) -> Iterator[str]:
    """Warns of cases that only one of the runs has measured."""
    for which, some, others in (("first", old, new), ("second", new, old)):
        for case, rows in some.items():
            if ours_in(rows) and not ours_in(others.get(case, [])):
                yield f"only in the {which} run: {name_of(rows[0])}"


def name_of(row: Row) -> str:
    """Says which case a row is of."""
    return f"{row.op} · {row.shapes} · {row.dtype} · {row.device}"


def changes_of(measure: Measure, old: list[Row], new: list[Row]) -> Iterator[Change]:
    """Yields the change of fused_opt in a case, where both runs have measured it."""
    ours = ours_in(old), ours_in(new)
    if ours[0] is None or ours[1] is None:
        return
    before, after = measure.of(ours[0]), measure.of(ours[1])
    if not before or not after:
        return
    change, others = after / before, list(changes_of_others(measure, old, new))
    factor = least([change, *(change / other for other in others)])
    noise = IDENTICAL + measure.noise(ours[0]) + measure.noise(ours[1])
    if others:
        noise += max(others) / min(others) - 1
    yield Change(ours[1], measure, before, after, factor, noise)


def changes_of_others(measure: Measure, old: list[Row], new: list[Row]) -> Iterator[float]:
    """Yields the change of each peer that both runs have measured, and of the roof."""
    now = {row.peer if row.peer == ROOF else row.provider: row for row in new}
    for row in old:
        other = now.get(row.peer if row.peer == ROOF else row.provider)
        if row.peer == OURS or other is None:
            continue
        time = bandwidth_time if row.peer == ROOF and measure is TIME else measure.of
        if (before := time(row)) and (after := time(other)):
            yield after / before


def bandwidth_time(roof: Row) -> float | None:
    """The time of a byte; the probe that is the roof may be another in each run."""
    return 1 / roof.gbps if roof.gbps else None


def least(views: list[float]) -> float:
    """Returns the view nearest to 1 where all are on the same side of it, else 1."""
    if min(views) > 1:
        return min(views)
    return max(views) if max(views) < 1 else 1.0


def comparison_table(comparison: Comparison) -> Table:
    """Shows every change, the regressions last, where a terminal ends."""
    shown = Table(box=box.SIMPLE)
    for name in ("case", "time"):
        shown.add_column(name)
    for name in ("before", "after", "change", "noise", "verdict"):
        shown.add_column(name, justify="right")
    for each in sorted(comparison.changes, key=lambda change: change.factor):
        shown.add_row(
            name_of(each.row),
            each.measure.name,
            f"{significant(each.before)} {each.measure.unit}",
            f"{significant(each.after)} {each.measure.unit}",
            f"{each.factor - 1:+.1%}",
            f"{each.noise:.1%}",
            Text(each.verdict, style=STYLES[each.verdict]),
        )
    return shown
