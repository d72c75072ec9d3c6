"""Medians over interleaved rounds: each round runs every contestant once, in a random order.

Interleaving shares the machine's slow and fast moments among all; the random order (fixed seed)
keeps anyone from always following the same neighbour. torch.utils.benchmark and pytest-benchmark
time one statement after the other, and so cannot do this.

A clock returns the seconds of one sample. Those of bandwidth are cold: before each sample the
tensors are driven out of the caches, as the rest of a training step would do. Those of host time
are warm.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from statistics import quantiles

import torch

from .machine import last_cache_bytes

Run = Callable[[], object]
Clock = Callable[[Run], float]

SAMPLE_SECONDS = 5e-3  # a warm sample lasts at least this long, far above the clock's resolution
HOLD_SECONDS = 1e-3  # of the first sample on a GPU, whose host time is not known
LONGEST_HOLD_SECONDS = 0.1
SEED = 0


@dataclass(frozen=True)
class Timing:
    """The median of the samples, and their 20th and 80th percentile, in seconds."""

    seconds: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarises the samples of one contestant."""
        cuts = quantiles(samples, n=10, method="inclusive") if samples[1:] else samples * 9
        return cls(cuts[4], cuts[1], cuts[7], len(samples))

    @property
    def spread(self) -> float:
        """The width of the middle three fifths of the samples, relative to the median."""
        return (self.high - self.low) / self.seconds


@dataclass(frozen=True)
class Rounds:
    """How many: at least the least, and more while the seconds last."""

    least: int
    most: int
    seconds: float

    @classmethod
    def exactly(cls, number: int) -> Rounds:
        """That many."""
        return cls(number, number, 0.0)

    def number(self, round_seconds: float) -> int:
        """Returns how many rounds to make if one takes that long."""
        return max(self.least, min(self.most, int(self.seconds / round_seconds)))


# ---- Clocks --------------------------------------------------------------------------------------


def wall_clock(run: Run) -> float:
    """Returns the seconds that a run takes on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_clock(run: Run) -> float:
    """Returns the seconds until a run on a CUDA device returns to Python, its work not awaited."""
    torch.cuda.synchronize()  # an idle device, so that a full launch queue blocks nobody
    return wall_clock(run)


def cold_cpu_clock(evictions: Mapping[Run, Run | None]) -> Clock:
    """Times single runs, each after its tensors were driven out of the caches.

    Only tensors are. The code is warm for everyone, by a run before: contestants that share theirs
    would otherwise warm it for each other.

    Args:
        evictions: What does so for each run; None where the tensors do it themselves, and are so
            large that the code does not matter.
    """

    def clock(run: Run) -> float:
        evict = evictions[run]
        if evict is not None:
            run()
            evict()
        return wall_clock(run)

    return clock


def cold_cuda_clock(device: torch.device) -> Clock:
    """Times single runs by events, each after a write over twice the L2 cache.

    The GPU is held back by a spinning kernel until the host has queued the run: else a run of many
    launches would be timed with the gaps that Python leaves between them. That is the host time,
    which has a clock of its own.
    """
    memory = torch.empty(2 * last_cache_bytes(device), dtype=torch.uint8, device=device)
    cycles_per_second = spin_rate()
    hosts: dict[Run, float] = {}

    def clock(run: Run) -> float:
        hold = min(2 * hosts.get(run, HOLD_SECONDS), LONGEST_HOLD_SECONDS)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        memory.zero_()
        torch.cuda._sleep(int(hold * cycles_per_second))
        start.record()
        hosts[run] = wall_clock(run)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return clock


def spin_rate() -> float:
    """Cycles per second of the kernel that does nothing for so many cycles."""
    cycles, start, end = 10_000_000, *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first loads the kernel
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return float(cycles / (start.elapsed_time(end) / 1e3))


def after(prepare: Run, clock: Clock) -> Clock:
    """Returns a clock that prepares each run, and does not count the time of that."""

    def prepared_clock(run: Run) -> float:
        prepare()
        return clock(run)

    return prepared_clock


@dataclass
class Repeated:
    """A clock whose samples are means over as many runs as make them long enough."""

    clock: Clock
    repeats: dict[Run, int] = field(default_factory=dict)

    def __call__(self, run: Run) -> float:
        """Returns the mean; the first sample of a run decides how many it takes."""
        if run not in self.repeats:
            self.clock(run)
            self.repeats[run] = ceil(SAMPLE_SECONDS / max(self.clock(run), 1e-6))
        repeats = self.repeats[run]
        return sum(self.clock(run) for _ in range(repeats)) / repeats


# ---- Rounds --------------------------------------------------------------------------------------


def interleave(
    runs: Mapping[str, Run], rounds: Rounds, clock: Clock, tell: Callable[[str], None] | None = None
) -> dict[str, Timing]:
    """Returns the timing of each run over the rounds; `tell` hears how far it is."""
    for run in runs.values():  # warm up: first-step allocations, lazily loaded kernels
        clock(run)
    number = rounds.number(wall_clock(lambda: [clock(run) for run in runs.values()]))
    order, generator = list(runs), random.Random(SEED)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for done in range(number):
            if tell:
                tell(f"round {done + 1} of {number}")
            generator.shuffle(order)
            for name in order:
                seconds[name].append(clock(runs[name]))
    finally:
        gc.enable()
    return {name: Timing.of(samples) for name, samples in seconds.items()}
