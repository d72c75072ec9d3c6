"""Compiles probe.cpp at run time: the roof's probe, and what makes caches cold."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .machine import last_cache_bytes

#: Tensors of so many times the last cache drive their own beginning out of it as they are stepped.
SELF_EVICTING = 2


@cache
def library() -> ctypes.CDLL | None:
    """Compiles probe.cpp for this machine with the system's C++ compiler, where there is one."""
    if shutil.which("c++") is None:
        return None
    source = Path(__file__).with_name("probe.cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.so")
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17"]
        subprocess.run(["c++", *flags, str(source), "-o", str(path)], check=True)
        loaded = ctypes.CDLL(str(path))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    loaded.probe.argtypes = [pointer, ctypes.c_int, pointer, int64, int64, ctypes.c_int]
    loaded.probe.restype = None
    loaded.evict.argtypes = [pointer, pointer, int64]
    loaded.evict.restype = ctypes.c_bool
    return loaded


def eviction(tensors: list[Tensor]) -> Callable[[], object] | None:
    """Returns what drives CPU tensors out of the caches; they must outlive it.

    None for those that are larger, and do it themselves.
    """
    if sum(each.nbytes for each in tensors) >= SELF_EVICTING * last_cache_bytes():
        return None
    count, native = len(tensors), library()
    if native is None or not native.evict(None, None, 0):
        return walk()
    begin = (ctypes.c_void_p * count)(*(each.data_ptr() for each in tensors))
    sizes = (ctypes.c_int64 * count)(*(each.nbytes for each in tensors))
    return lambda: native.evict(begin, sizes, count)


@cache
def walk() -> Callable[[], object]:
    """Reads as much memory as the last cache holds: code leaves the cache as well."""
    memory = torch.ones(last_cache_bytes() // 4)
    return lambda: memory.sum()
