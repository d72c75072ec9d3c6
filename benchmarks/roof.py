"""The machine's roof: the best memory bandwidth that simple code reaches on plain big arrays.

`mul_` reads and writes one stream. On the CPU a probe of our own (probe.cpp) has the streams of the
op itself and tries several prefetch distances; on CUDA the second probe is a device-to-device copy.
The fastest of a first trial is the roof, and runs among the contestants. All values are restored by
a second run, so nothing drifts towards denormals or infinity.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .native import library
from .ops import Op
from .reference import samples
from .timing import Clock

PREFETCH_DISTANCES = (0, 256, 512, 1024)  # elements ahead
LINE = 16  # fp32 elements in a cache line: streams start on a line of their own
TRIALS = 3
ROOF = "roof"


@dataclass(frozen=True)
class Probe:
    """A loop that moves a known number of bytes per run."""

    name: str
    run: Callable[[], object]
    moved_bytes: int
    arena: Tensor


def cpu_probes(arena: Tensor, written: int, threads: int) -> list[Probe]:
    """Returns our own probe in each of its prefetch variants, checked; none without a compiler.

    Args:
        arena: The memory to use, split into `written` streams and one that is only read.
        written: Number of streams that are read and written.
        threads: Number of OpenMP threads.
    """
    native = library()
    if native is None:
        return []
    function = native.probe
    length = arena.numel() // (written + 1) // LINE * LINE
    *streams, read = arena[: length * (written + 1)].view(written + 1, length)
    pointers = (ctypes.c_void_p * written)(*(stream.data_ptr() for stream in streams))

    def variant(ahead: int) -> Callable[[], None]:
        return lambda: function(pointers, written, read.data_ptr(), length, ahead, threads)

    probes = []
    for ahead in PREFETCH_DISTANCES:
        run = variant(ahead)
        expected = samples([read] * written) - samples(streams)
        run()
        if not torch.equal(samples(streams).float(), expected.float()):
            raise RuntimeError(f"the roof probe with prefetch {ahead} computes wrong values")
        moved = (2 * written + 1) * length * arena.itemsize
        probes.append(Probe(f"{ROOF}: probe, prefetch {ahead}", run, moved, arena))
    return probes


def copy_probe(arena: Tensor) -> Probe:
    """Returns a copy of one half of the arena over the other."""
    source, target = arena[: arena.numel() // 2 * 2].view(2, -1)
    return Probe(f"{ROOF}: copy_", lambda: target.copy_(source), 2 * source.nbytes, arena)


def best_probe(op: Op, arena: Tensor, threads: int, clock: Clock) -> Probe:
    """Returns the probe that moves most bytes per second through an arena of float32.

    Args:
        op: Whose streams are probed.
        arena: The memory.
        threads: Number of OpenMP threads.
        clock: How a run is timed.
    """
    probes = [Probe(f"{ROOF}: mul_", lambda: arena.mul_(-1.0), 2 * arena.nbytes, arena)]
    if arena.is_cuda:
        probes.append(copy_probe(arena))
    else:
        probes += cpu_probes(arena, written=op.written_streams, threads=threads)

    def seconds_per_byte(probe: Probe) -> float:
        return min(clock(probe.run) for _ in range(TRIALS)) / probe.moved_bytes

    return min(probes, key=seconds_per_byte)
