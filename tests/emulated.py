"""The package on the emulator of CUDA: the kernels of csrc/cuda, run on the CPU for CPU tensors.

tests/emulator/ is the emulator; a variant of the compiled module (native_variants.py) has it in
place of the CPU loops. ``emulated`` is the device of that name in tests/test_cuda.py.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import native_variants
import pytest

import fused_opt
from fused_opt import _native
from fused_opt import _plan as plan

_count = itertools.count()


class Counts(NamedTuple):
    """What ran since they were asked for last."""

    launches: int
    blocks: int
    largest_parameters: int  # of a launch, in bytes


class Emulator:
    """The emulated module and what its emulator is told; a method for each ``emulator_...``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # pybind11 makes one module of each name in a process.
        self.module: ModuleType = native_variants.load(path, f"emulated{next(_count)}._C")
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_seed.argtypes = [ctypes.c_uint64]
        self._library.emulator_choose_blocks.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._library.emulator_new_stream.restype = ctypes.c_void_p
        self._library.emulator_run_stream.argtypes = [ctypes.c_void_p]
        self._library.emulator_delete_stream.argtypes = [ctypes.c_void_p]

    def in_place(self) -> AbstractContextManager[None]:
        """Takes the place of the package's module for what is made and done meanwhile."""
        return in_place(self.module)

    def seed(self, seed: int) -> None:
        """Chooses the order of blocks and threads."""
        self._library.emulator_seed(seed)

    @contextmanager
    def only_blocks(self, blocks: Iterable[int]) -> Iterator[None]:
        """Runs these blocks of each launch and no others."""
        chosen = sorted(set(blocks))
        self._library.emulator_choose_blocks((ctypes.c_uint32 * len(chosen))(*chosen), len(chosen))
        try:
            yield
        finally:
            self._library.emulator_choose_blocks(None, 0)

    def fail(self, function: str, error: int) -> None:
        """Makes the next call of a function of CUDA return an error."""
        self._library.emulator_fail(function.encode(), error)

    def counts(self) -> Counts:
        """Counts from 0 again."""
        counts = (ctypes.c_int64 * 3)()
        self._library.emulator_counts(counts)
        return Counts(*counts)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A stream, as the address that the module takes."""
        stream = self._library.emulator_new_stream()
        try:
            yield stream
        finally:
            self._library.emulator_delete_stream(stream)

    def run_stream(self, stream: int) -> None:
        self._library.emulator_run_stream(stream)


@contextmanager
def in_place(module: ModuleType) -> Iterator[None]:
    """Puts a build of the module in the place of the package's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_opt, "_C", module, raising=False)
        patch.setitem(sys.modules, "fused_opt._C", module)
        _forget_module()
        try:
            yield
        finally:
            _forget_module()


def _forget_module() -> None:
    plan._local.plan = None
    _native.cached_native.cache_clear()


@cache
def emulator() -> Emulator:
    """The emulator of this process, built where it has to be."""
    path = os.environ.get(native_variants.EMULATED)
    return Emulator(Path(path) if path else native_variants.build("emulated"))


def copy_of_module(folder: Path) -> Path:
    """A copy of its module, which has launched nothing yet when it is loaded."""
    path = emulator().path
    return Path(shutil.copy(path, folder / path.name))


def environment(name: str) -> dict[str, str]:
    """The variables of a process whose emulator is that of a variant, built where it has to be."""
    return native_variants.environment(name, native_variants.build(name), native_variants.EMULATED)
