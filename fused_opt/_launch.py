"""How native code is called for a device, and what is said where it cannot run there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from fused_opt._cuda_advice import cuda_advice, rebuild_command
from fused_opt._native import cached_native

CPU = -1  # as a device index
Result = TypeVar("Result")


def launch(device: int, call: Callable[..., Result], *args: object) -> Result:
    """Calls ``call(device, threads, *args)`` with that device current.

    Raises:
        RuntimeError: a CUDA call failed; the message says what to do about it.
    """
    if device == CPU:
        return call(device, torch.get_num_threads(), *args)
    module = cached_native()
    try:
        with torch.cuda.device(device):
            return call(device, 1, *args)
    except module.CudaError as error:
        code, message = error.args
        raise RuntimeError(f"{message}. {cuda_advice(code, device)}") from None


def require_kernels_for(devices: Iterable[int]) -> None:
    """Raises RuntimeError, with the command that builds them, if the module lacks CUDA kernels."""
    if cached_native().cuda_version is not None:
        return
    on_gpu = [device for device in devices if device != CPU]
    if on_gpu:
        raise RuntimeError(
            "the parameters are on CUDA, and fused_opt was built without CUDA kernels. Rebuild "
            f"it where there is an nvcc, 12.1 or newer: {rebuild_command(on_gpu[0])}"
        )
