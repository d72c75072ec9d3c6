"""Medians over interleaved rounds: each round runs every contestant once, in a random order.

Interleaving shares the machine's slow and fast moments among all; the random order (fixed seed)
keeps anyone from always following the same neighbour. Short runs are repeated within a round.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import quantiles

import torch

Run = Callable[[], object]
Clock = Callable[[Run, int], float]

SAMPLE_SECONDS = 5e-3  # a sample lasts at least this long, far above the clock's resolution
SEED = 0


@dataclass(frozen=True)
class Timing:
    """The median of the samples, and the width of their middle half relative to it."""

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarises the samples of one contestant."""
        low, middle, high = quantiles(samples, method="inclusive") if samples[1:] else samples * 3
        return cls(middle, (high - low) / middle)


def wall_clock(run: Run, repeats: int) -> float:
    """Returns the seconds that the runs take on the CPU."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def cuda_clock(run: Run, repeats: int) -> float:
    """Returns the seconds between two events around the runs on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def host_clock(run: Run, repeats: int) -> float:
    """Returns the seconds until runs on a CUDA device return to Python, their work not awaited."""
    seconds = 0.0
    for _ in range(repeats):
        torch.cuda.synchronize()  # an idle device, so that a full launch queue blocks nobody
        seconds += wall_clock(run, 1)
    return seconds


def after(prepare: Run, clock: Clock) -> Clock:
    """Returns a clock that prepares each single run, and does not count the time of that."""

    def prepared_clock(run: Run, repeats: int) -> float:
        seconds = 0.0
        for _ in range(repeats):
            prepare()
            seconds += clock(run, 1)
        return seconds

    return prepared_clock


def interleave(runs: Mapping[str, Run], rounds: int, clock: Clock) -> dict[str, Timing]:
    """Returns the timing of each run over the rounds."""
    repeats = {}
    for name, run in runs.items():
        clock(run, 2)  # warm up: first-step allocations, lazily loaded kernels, caches
        repeats[name] = ceil(SAMPLE_SECONDS / max(clock(run, 1), 1e-6))

    order, generator = list(runs), random.Random(SEED)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for name in order:
                seconds[name].append(clock(runs[name], repeats[name]) / repeats[name])
    finally:
        gc.enable()
    return {name: Timing.of(samples) for name, samples in seconds.items()}
