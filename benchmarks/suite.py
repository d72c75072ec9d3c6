"""The measurements: builds the contestants of a case, checks them, times them, compares them.

The bandwidth counts the same bytes for every provider, those that must move in one pass: whoever
passes over memory more often shows less bandwidth, as it should. Lists that fit in a cache are
measured in that cache, and so is their roof.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .machine import free_bytes
from .providers import Op, Provider, providers
from .reference import WrongResultError, check_step
from .roof import probes
from .shapes import Shapes, count
from .timing import Clock, Run, Timing, after, cuda_clock, host_clock, interleave, wall_clock

PARAMETER_SCALE = 0.05  # about the size of trained weights; gradients are standard normal
HOST_SHAPES: Shapes = [(1,)] * 1000  # all time is host time, and 1 ms a step is 1 us a tensor
MEMORY_SHARE = 0.9  # of the free memory may be used

Kind = Literal["ours", "torch", "roof"]


@dataclass(frozen=True)
class Case:
    """One table: an op on a list of shapes."""

    op: Op
    shapes_name: str
    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    threads: int

    @property
    def moved_bytes(self) -> int:
        """Bytes that one step must move."""
        return count(self.shapes) * self.op.moved_bytes(self.dtype)

    @property
    def footprint(self) -> int:
        """Bytes of all tensors of one contestant, the gradients among them."""
        return count(self.shapes) * (self.op.state_bytes(self.dtype) + self.dtype.itemsize)


@dataclass(frozen=True)
class Contestant:
    """A checked run, ready to be timed; what it is, and the bytes that count for its bandwidth."""

    name: str
    kind: Kind
    run: Run
    moved_bytes: int


@dataclass(frozen=True)
class Result:
    """The time of a contestant, and its bandwidth."""

    name: str
    kind: Kind
    timing: Timing
    gbps: float

    @property
    def seconds(self) -> float:
        """The median over the rounds."""
        return self.timing.seconds


@dataclass(frozen=True)
class Table:
    """The results of a case, best compared within it; the notes say what is missing and why."""

    case: Case
    rounds: int
    results: list[Result]
    notes: list[str] = field(default_factory=list)

    @property
    def roof_gbps(self) -> float | None:
        """The best bandwidth among the probes."""
        return max((each.gbps for each in self.results if each.kind == "roof"), default=None)

    def share(self, result: Result) -> float | None:
        """The bandwidth of a result over the roof's."""
        return result.gbps / self.roof_gbps if self.roof_gbps else None

    def ratio(self, result: Result) -> float | None:
        """The time of torch's fastest over this one's: above 1 is faster than torch."""
        best = min((each.seconds for each in self.results if each.kind == "torch"), default=None)
        return best / result.seconds if best and result.kind != "roof" else None


Build = Callable[[], list[Contestant]]


def random_tensors(case: Case, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Returns the same non-zero random tensors each time it is called with the same seed."""
    generator = torch.Generator(case.device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=case.device, dtype=case.dtype).mul_(scale)
        for shape in case.shapes
    ]


@dataclass(frozen=True)
class Gradients:
    """What all contestants read; a copy is kept where their steps fill the gradients with 0."""

    tensors: list[Tensor]
    kept: list[Tensor] | None

    @classmethod
    def of(cls, case: Case) -> Gradients:
        """Makes those of a case."""
        tensors = random_tensors(case, seed=2)
        return cls(tensors, [each.clone() for each in tensors] if case.op.clip else None)

    def renew(self) -> None:
        """Puts the gradients back."""
        if self.kept is not None:
            torch._foreach_copy_(self.tensors, self.kept)

    def clock(self, clock: Clock) -> Clock:
        """Has each run find the gradients as they were."""
        return clock if self.kept is None else after(self.renew, clock)


def build_provider(case: Case, provider: Provider, grads: Gradients) -> list[Contestant]:
    """Sets a provider up on parameters of its own and checks its step."""
    params = random_tensors(case, seed=1, scale=PARAMETER_SCALE)
    step = provider.setup(params, grads.tensors)
    try:
        check_step(step, grads.renew)
    except WrongResultError as error:
        raise WrongResultError(f"{provider.name} on {case.shapes_name}: {error}") from None
    kind: Kind = "torch" if provider.is_torch else "ours"
    return [Contestant(provider.name, kind, step.run, case.moved_bytes)]


def build_roof(case: Case) -> list[Contestant]:
    """Sets the roof's probes up."""
    found = probes(case.op, case.footprint, case.device, case.threads)
    return [Contestant(probe.name, "roof", probe.run, probe.moved_bytes) for probe in found]


def time_together(builds: list[Build], rounds: int, clock: Clock) -> list[Result]:
    """Times all contestants in interleaved rounds."""
    contestants = [contestant for build in builds for contestant in build()]
    timings = interleave({each.name: each.run for each in contestants}, rounds, clock)
    return [
        Result(each.name, each.kind, timing, each.moved_bytes / timing.seconds / 1e9)
        for each, timing in zip(contestants, timings.values(), strict=True)
    ]


def time_apart(builds: list[Build], rounds: int, clock: Clock) -> list[Result]:
    """Times one after the other what is too large to be held side by side."""
    results: list[Result] = []
    for build in builds:
        with suppress(torch.OutOfMemoryError):  # shown by a note
            results += time_together([build], rounds, clock)
        release_memory()
    return results


def release_memory() -> None:
    """Frees what the last contestants held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits(case: Case, copies: int) -> bool:
    """Tells whether the tensors of so many contestants fit in memory side by side."""
    # torch foreach adds the weight decay into a copy of the gradients; a half list is widened.
    scratch = count(case.shapes) * (case.dtype.itemsize + (4 if case.dtype.itemsize < 4 else 0))
    return copies * (case.footprint + scratch) < MEMORY_SHARE * free_bytes(case.device)


def measure(case: Case, rounds: int) -> Table:
    """Checks and times all providers of a case and the probes of its roof."""
    release_memory()
    entrants = providers(case.op, case.device, case.dtype)
    allowed = [each for each in entrants if not each.refusal]
    notes = [f"{each.name}: {each.refusal}" for each in entrants if each.refusal]
    if case.device.type == "cpu" and not fits(case, 1):  # the kernel would kill the process
        return Table(case, rounds, [], [f"skipped: needs {case.footprint / 1e9:.0f} GB of memory"])
    together = fits(case, len(allowed) + 1)  # one more for the roof
    if not together:
        notes.append("timed one after the other, not interleaved: too large for the memory")

    grads = Gradients.of(case)
    builds: list[Build] = [partial(build_provider, case, each, grads) for each in allowed]
    builds.append(partial(build_roof, case))
    clock = grads.clock(cuda_clock if case.device.type == "cuda" else wall_clock)
    results = (time_together if together else time_apart)(builds, rounds, clock)
    lost = {each.name for each in allowed} - {each.name for each in results}
    return Table(case, rounds, results, notes + [f"{name}: out of memory" for name in sorted(lost)])


def measure_host(op: Op, device: torch.device, threads: int, rounds: int) -> Table:
    """Times the host side of a step: 1000 tensors of 1 element, gradients kept."""
    case = Case(op, "host", HOST_SHAPES, torch.float32, device, threads)
    grads = Gradients.of(case)
    entrants = providers(op, device, case.dtype)
    builds: list[Build] = [partial(build_provider, case, each, grads) for each in entrants]
    clock = grads.clock(host_clock if device.type == "cuda" else wall_clock)
    return Table(case, rounds, time_together(builds, rounds, clock))
