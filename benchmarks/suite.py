"""The measurements: builds the contestants of a case, checks, times, and makes rows of them."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .machine import free_bytes, last_cache_bytes
from .native import eviction
from .ops import Op, dtype_name
from .providers import OURS, Place, Provider, Step, providers
from .reference import WrongResultError, check_step
from .roof import ROOF, Probe, best_probe
from .rows import SCHEMA, Row
from .shapes import Shapes, count
from .timing import (
    Clock,
    Repeated,
    Rounds,
    Run,
    Timing,
    after,
    cold_cpu_clock,
    cold_cuda_clock,
    host_clock,
    interleave,
    wall_clock,
)

PARAMETER_SCALE = 0.05  # about the size of trained weights; gradients are standard normal
POOL = (1 << 20) + 7  # random numbers that tensors are filled from: a prime, which no shape repeats
POOL_STEP = 104_729  # from the start of one tensor to that of the next in the pool, a prime too
MEMORY_SHARE = 0.9  # of the free memory may be used
ROOF_BYTES = (256 << 20, 1 << 30)  # the roof's arena has the size of the case within these

Tell = Callable[[str], None]


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
    def params(self) -> int:
        """The number of parameters."""
        return count(self.shapes)

    @property
    def moved_bytes(self) -> int:
        """Bytes that one step must move."""
        return self.params * self.op.moved_bytes(self.dtype)

    @property
    def grad_bytes(self) -> int:
        """Bytes of the gradients that all contestants share; resets need another copy of them."""
        return self.params * self.dtype.itemsize * (2 if self.op.clip else 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors of one contestant."""
        return self.params * self.op.state_bytes(self.dtype)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that steps take for their length: a copy of the gradients, or a widened list."""
        return self.params * (self.dtype.itemsize + (4 if self.dtype.itemsize < 4 else 0))

    @property
    def roof_bytes(self) -> int:
        """Bytes of the arena that the roof is measured on."""
        return min(max(self.state_bytes + self.grad_bytes, ROOF_BYTES[0]), ROOF_BYTES[1])

    def needed_bytes(self, contestants: int) -> int:
        """Bytes that so many contestants take side by side."""
        return self.grad_bytes + contestants * self.state_bytes

    def fits(self, contestants: int) -> bool:
        """Tells whether so many contestants, what steps take besides, and the roof fit in memory.

        A GPU that runs out of memory says so, and one contestant may try; on the CPU the kernel
        would kill the process.
        """
        free = free_bytes(self.device) - last_cache_bytes(self.device) - self.roof_bytes
        tries = contestants == 1 and self.device.type == "cuda"
        scratch = 0 if tries else self.scratch_bytes
        return self.needed_bytes(contestants) + scratch < MEMORY_SHARE * free


@dataclass(frozen=True)
class How:
    """How a run measures: its rounds, its peers, and whether steps are compiled."""

    rounds: Rounds
    against: list[str] | None = None
    compiles: bool = True
    launches: bool = True


@dataclass(frozen=True)
class Contestant:
    """A checked run, ready to be timed; who it is, and the bytes that count for its bandwidth."""

    name: str
    peer: str
    run: Run
    moved_bytes: int
    evict: Run | None  # drives its tensors out of the CPU's caches, if they do not so themselves
    launches: int | None


@dataclass(frozen=True)
class Result:
    """The times of a contestant."""

    contestant: Contestant
    timing: Timing

    @property
    def gbps(self) -> float:
        """Gigabytes of 10^9 bytes per second."""
        return self.contestant.moved_bytes / self.timing.seconds / 1e9


# ---- Tensors -------------------------------------------------------------------------------------


def random_tensors(case: Case, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Returns the same non-zero random tensors each time it is called with the same seed."""
    generator = torch.Generator(case.device).manual_seed(seed)
    pool = torch.randn(POOL, generator=generator, device=case.device).mul_(scale).to(case.dtype)
    twice = torch.cat((pool, pool))
    starts = (i * POOL_STEP % POOL for i in range(len(case.shapes)))
    return [
        filled(shape, twice[start : start + POOL])
        for shape, start in zip(case.shapes, starts, strict=True)
    ]


def filled(shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """Returns a tensor of that shape with the pool's elements, over and over."""
    tensor = torch.empty(shape, dtype=pool.dtype, device=pool.device)
    flat, whole = tensor.view(-1), tensor.numel() // POOL
    flat[: whole * POOL].view(whole, POOL).copy_(pool)
    flat[whole * POOL :].copy_(pool[: flat.numel() - whole * POOL])
    return tensor


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


# ---- Contestants ---------------------------------------------------------------------------------


def launches_of(step: Step, device: torch.device) -> int | None:
    """Counts the kernels, copies and fills that a step puts on the GPU; None where CUPTI fails."""
    if device.type != "cuda":
        return None
    try:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step.run()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    names = [
        each.name
        for each in profile.events()
        if each.device_type.name == "CUDA" and not getattr(each, "is_user_annotation", False)
    ]
    return len(names) or None


def build(case: Case, provider: Provider, grads: Gradients, launches: bool) -> Contestant:
    """Sets a provider up on parameters of its own and checks its step."""
    step = provider.setup(random_tensors(case, seed=1, scale=PARAMETER_SCALE), grads.tensors)
    try:
        check_step(step, grads.renew)
    except WrongResultError as error:
        raise WrongResultError(f"{provider.name} on {case.shapes_name}: {error}") from None
    counted = launches_of(step, case.device) if launches else None
    grads.renew()
    evict = eviction(step.tensors()) if case.device.type == "cpu" else None
    return Contestant(provider.name, provider.peer, step.run, case.moved_bytes, evict, counted)


@lru_cache(maxsize=1)
def roof_probe(op: Op, arena_bytes: int, device: torch.device, threads: int) -> Probe:
    """Chooses the fastest probe, once for all cases that have the same."""
    arena = filled((arena_bytes // 4,), torch.randn(POOL, device=device))
    evict = eviction([arena]) if device.type == "cpu" else None
    return best_probe(op, arena, threads, cold_clock(device, defaultdict(lambda: evict)))


def build_roof(case: Case) -> Contestant:
    """Returns the roof as a contestant."""
    probe = roof_probe(case.op, case.roof_bytes, case.device, case.threads)
    evict = eviction([probe.arena]) if case.device.type == "cpu" else None
    return Contestant(probe.name, ROOF, probe.run, probe.moved_bytes, evict, None)


def release_memory() -> None:
    """Frees what the last contestants held, compiled steps among it."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- Timing --------------------------------------------------------------------------------------


class Measurement:
    """The times of the providers of a case, and what became of those that could not be timed."""

    def __init__(self, case: Case, how: How, entrants: list[Provider], tell: Tell) -> None:
        """Notes who cannot take part."""
        self.case, self.how, self.tell = case, how, tell
        self.notes = {each.name: each.absence for each in entrants if each.absence}
        self.allowed = [each for each in entrants if not each.absence]
        self.results: list[Result] = []
        self.hosts: dict[str, Timing] = {}

    def skip(self, why: str) -> None:
        """Notes that nobody takes part."""
        self.notes |= {each.name: why for each in self.allowed}

    def contestants(self, providers: list[Provider], grads: Gradients) -> list[Contestant]:
        """Builds and checks them; who breaks down is noted."""
        built = []
        for each in providers:
            self.tell(f"checking {each.name}")
            try:
                built.append(build(self.case, each, grads, self.how.launches))
            except torch.OutOfMemoryError:
                self.notes[each.name] = "out of memory"
            except Exception as error:  # of another package, or of the compiler
                if each.peer == OURS or isinstance(error, WrongResultError):
                    raise
                reason = str(error).strip().partition("\n")[0][:120]
                self.notes[each.name] = f"failed, {type(error).__name__}: {reason}"
        return built

    def cold(self, contestants: list[Contestant], grads: Gradients) -> list[Result]:
        """Times them with cold caches."""
        evictions = {each.run: each.evict for each in contestants}
        return self.time(contestants, grads.clock(cold_clock(self.case.device, evictions)))

    def time(self, contestants: list[Contestant], clock: Clock) -> list[Result]:
        """Times them in interleaved rounds."""
        if not contestants:
            return []
        runs = {each.name: each.run for each in contestants}
        timings = interleave(runs, self.how.rounds, clock, self.tell)
        return [Result(each, timings[each.name]) for each in contestants]

    def take(self, grads: Gradients) -> None:
        """Times all side by side; or one after the other where they are too large for that."""
        if self.case.fits(len(self.allowed)):
            with suppress(torch.OutOfMemoryError):
                built = self.contestants(self.allowed, grads)
                self.results = self.cold([*built, build_roof(self.case)], grads)
                return self.take_hosts(built, grads)
        self.notes[""] = "timed one after the other, not interleaved: too large for the memory"
        for each in self.allowed:
            self.take_alone(each, grads)
            release_memory()
        self.results += self.cold([build_roof(self.case)], grads)
        return None

    def take_alone(self, provider: Provider, grads: Gradients) -> None:
        """Times one."""
        try:
            built = self.contestants([provider], grads)
            self.results += self.cold(built, grads)
            self.take_hosts(built, grads)
        except torch.OutOfMemoryError:
            self.notes[provider.name] = "out of memory"

    def take_hosts(self, contestants: list[Contestant], grads: Gradients) -> None:
        """Times how long a step on a GPU takes to return."""
        if self.case.device.type == "cuda":
            results = self.time(contestants, Repeated(grads.clock(host_clock)))
            self.hosts |= {each.contestant.name: each.timing for each in results}

    def take_hosts_on_cpu(self, entrants: list[Provider]) -> None:
        """Times the same steps on as many tensors of one element, caches warm.

        On the CPU, where host and device are one, this is the part of the time that is spent on
        tensors, and not on their elements.
        """
        shapes: Shapes = [(1,)] * len(self.case.shapes)
        case = replace(self.case, shapes_name="host", shapes=shapes)
        grads = Gradients.of(case)
        host = Measurement(case, self.how, entrants, lambda what: self.tell(f"host time, {what}"))
        built = host.contestants(host.allowed, grads)
        results = host.time(built, Repeated(grads.clock(wall_clock)))
        self.hosts = {each.contestant.name: each.timing for each in results}


def cold_clock(device: torch.device, evictions: Mapping[Run, Run | None]) -> Clock:
    """The clock of bandwidth."""
    return cold_cuda_clock(device) if device.type == "cuda" else cold_cpu_clock(evictions)


def measure(case: Case, how: How, origin: dict[str, str], tell: Tell) -> list[Row]:
    """Checks and times all providers of a case and its roof, and returns their rows."""
    release_memory()
    place = Place(case.op, case.device, case.dtype, len(case.shapes), how.compiles)
    entrants = providers(place, how.against)
    measurement = Measurement(case, how, entrants, tell)
    if not case.fits(1):
        measurement.skip(f"skipped, needs more than {case.needed_bytes(1) / 1e9:.1f} GB of memory")
        return rows(case, origin, entrants, measurement)
    measurement.take(Gradients.of(case))
    if case.device.type == "cpu":
        release_memory()
        timed = {each.contestant.name for each in measurement.results}
        measurement.take_hosts_on_cpu([each for each in entrants if each.name in timed])
    return rows(case, origin, entrants, measurement)


# ---- Rows ----------------------------------------------------------------------------------------


def rows(
    case: Case, origin: dict[str, str], entrants: list[Provider], measurement: Measurement
) -> list[Row]:
    """Returns a row for each entrant and for the roof."""
    results, notes = measurement.results, measurement.notes
    found = {each.contestant.name: each for each in results}
    roof = next((each for each in results if each.contestant.peer == ROOF), None)
    peers = [each for each in results if each.contestant.peer not in (OURS, ROOF)]
    best = min((each.timing.seconds for each in peers), default=None)
    common: dict[str, Any] = dict(
        **origin,
        schema=SCHEMA,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        threads=case.threads,
        cache="cold",
        op=case.op.name,
        shapes=case.shapes_name,
        tensors=len(case.shapes),
        params=case.params,
        dtype=dtype_name(case.dtype),
    )
    names = [(each.name, each.peer) for each in entrants]
    names += [(roof.contestant.name, ROOF)] if roof else []
    made = []
    for name, peer in names:
        measured: dict[str, Any] = {"note": notes.get(name) or notes.get("", "")}
        if name in found:
            measured |= times(found[name], roof.gbps if roof else None, best)
        if name in measurement.hosts:
            measured |= host_columns(measurement.hosts[name])
        made.append(Row(**common, provider=name, peer=peer, **measured))
    return made


def times(result: Result, roof_gbps: float | None, best: float | None) -> dict[str, Any]:
    """The columns of a timed contestant."""
    timing, is_roof = result.timing, result.contestant.peer == ROOF
    return {
        "repeats": timing.rounds,
        "bytes": result.contestant.moved_bytes,
        "median_ms": timing.seconds * 1e3,
        "p20_ms": timing.low * 1e3,
        "p80_ms": timing.high * 1e3,
        "gbps": result.gbps,
        "roof_gbps": roof_gbps,
        "roof_share": result.gbps / roof_gbps if roof_gbps else None,
        "ratio": best / timing.seconds if best and not is_roof else None,
        "launches": result.contestant.launches,
    }


def host_columns(timing: Timing) -> dict[str, Any]:
    """The columns of host time."""
    return {
        "host_us": timing.seconds * 1e6,
        "host_p20_us": timing.low * 1e6,
        "host_p80_us": timing.high * 1e6,
    }
