"""The compiled module ``fused_opt._C``, loaded when it is first needed."""

from __future__ import annotations

from functools import cache
from types import ModuleType


def native() -> ModuleType:
    """Returns ``fused_opt._C``.

    Raises:
        ImportError: it is not built or does not load; the message says how to build it.
    """
    try:
        from fused_opt import _C
    except ImportError as error:
        raise ImportError(
            f"the compiled module fused_opt._C cannot be imported ({error}). Build it with "
            "`pip install .`, or `pip install -e .` for a source checkout, from the folder that "
            "holds setup.py; it needs a C++17 compiler and, for CUDA kernels, nvcc 12.1 or newer. "
            "`python -m fused_opt.doctor` explains what is wrong."
        ) from error
    return _C


cached_native = cache(native)  # for what takes less time than an import of what is there
