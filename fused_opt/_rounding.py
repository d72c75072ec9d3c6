"""Stochastic rounding: what a step rounds by, and the rounding itself from plain torch operations.

The torch part is for tensors that the kernels do not reach. It gives the numbers and the bits of
``csrc/rules/rounding.h``, where the reasons stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_opt._hyper import HALF_DTYPES, check_uint64

_UINT32 = 0xFFFFFFFF
_UINT64 = 0xFFFFFFFFFFFFFFFF


class Stream(IntEnum):
    """The streams that are rounded, by their place among all (``csrc/tensor_list.h``)."""

    PARAM = 0
    MOMENTUM = 2
    SHADOW = 3


def shadow_stream(average: int) -> int:
    """The stream of the shadows of an average: after the first, beyond the 5 that rows have."""
    return Stream.SHADOW if average == 0 else 5 + average - 1


class Rounding(NamedTuple):
    """What the rows of a step are rounded by, stochastically.

    The random numbers depend on the seed, the count of steps before, the parameter's ordinal among
    all, the stream, and the place in memory of the element, and on nothing else.
    """

    seed: int
    step: int
    ordinals: Sequence[int]  # of the rows
    on_device: Tensor | None = None  # more steps, which only a device has counted

    def on_host(self) -> Rounding:
        """The same with all steps in ``step``; waits for the device."""
        more = 0 if self.on_device is None else int(self.on_device)
        return self._replace(step=(self.step + more) & _UINT64, on_device=None)

    def take(self, indices: list[int]) -> Rounding:
        return self._replace(ordinals=[self.ordinals[i] for i in indices])


def group_roundings(
    groups: list[dict[str, Any]], on_device: Tensor | None
) -> list[Rounding | None]:
    """How each param group rounds; None is to nearest. Parameters count through all groups.

    ``on_device`` holds the steps that only a device has counted.
    """
    roundings: list[Rounding | None] = []
    first = 0
    for group in groups:
        rounding = None
        last = first + len(group["params"])
        if group["stochastic_rounding"]:
            seed, steps = group["rounding_seed"], group["rounding_steps"]
            check_uint64(seed, "rounding_seed")
            check_uint64(steps, "rounding_steps")
            rounding = Rounding(seed, steps, range(first, last), on_device)
        roundings.append(rounding)
        first = last
    return roundings


def shadow_roundings(
    tracked: Iterable[Tensor],
    groups: list[dict[str, Any]],
    roundings: list[Rounding | None],
) -> dict[Tensor, Rounding]:
    """How the shadow of each parameter is rounded that a step does not change.

    Like the parameter; those of no group, which are numbered after all others in the order of the
    EMA, as the first group does that rounds stochastically.
    """
    found = next((rounding for rounding in roundings if rounding is not None), None)
    if found is None:
        return {}
    own = dict.fromkeys(param for group in groups for param in group["params"])
    count = sum(len(group["params"]) for group in groups)
    rounding_of = {
        param: found._replace(ordinals=[count + i])
        for i, param in enumerate(tracked)
        if param not in own
    }
    for group, rounding in zip(groups, roundings, strict=True):
        if rounding is not None:
            for param, ordinal in zip(group["params"], rounding.ordinals, strict=True):
                rounding_of[param] = rounding._replace(ordinals=[ordinal])
    return rounding_of


def widened(
    tensors: Sequence[Tensor | None],
    rounding: Rounding | None,
    beside: Sequence[Tensor] | None = None,
) -> list[Any]:
    """The tensors to compute with: wider copies of those that :func:`narrow_` will round.

    They hold the dtype of what is ``beside`` each, and float32 where half types are rounded
    stochastically.
    """

    def wide(i: int, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if beside is not None:
            dtype = torch.promote_types(dtype, beside[i].dtype)
        if rounding is not None and _is_half(tensor):
            dtype = torch.promote_types(dtype, torch.float32)
        return tensor if dtype == tensor.dtype else tensor.detach().to(dtype)

    return [None if tensor is None else wide(i, tensor) for i, tensor in enumerate(tensors)]


def narrow_(
    tensors: Sequence[Tensor | None],
    values: Sequence[Any],
    rounding: Rounding | None,
    stream: int,
) -> None:
    """Writes what :func:`widened` has made copies of, rounded once: stochastically where it may."""
    for i, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        if tensor is None or tensor is value:
            continue
        if rounding is not None and _is_half(tensor):
            _store_(tensor, value, rounding, rounding.ordinals[i], stream)
        else:
            tensor.copy_(value)


def narrowed(value: Tensor, dtype: torch.dtype, rounding: Rounding | None, row: int) -> Tensor:
    """The first momentum of a row, in the dtype that it is kept in."""
    if rounding is None or dtype not in HALF_DTYPES or value.layout != torch.strided:
        return value.to(dtype)
    momentum = torch.empty_like(value, dtype=dtype)
    _store_(momentum, value.float(), rounding, rounding.ordinals[row], Stream.MOMENTUM)
    return momentum


def _is_half(tensor: Tensor) -> bool:
    # A sparse tensor has no memory order: it is rounded to nearest.
    return tensor.dtype in HALF_DTYPES and tensor.layout == torch.strided


def _store_(target: Tensor, values: Tensor, rounding: Rounding, ordinal: int, stream: int) -> None:
    if hasattr(target, "to_local"):  # a DTensor: each process rounds its part by itself
        target, values = target.to_local(), values.to_local()  # type: ignore[attr-defined]
    dense = torch.empty_like(target)
    random = torch.empty_strided(
        dense.shape, dense.stride(), dtype=torch.int64, device=target.device
    )
    state = _mix(_mix(rounding.seed) ^ rounding.step) ^ (ordinal << 32 | stream << 24)
    random.as_strided((random.numel(),), (1,)).copy_(_random(state, random.numel(), random.device))
    round_exactly = _as_bfloat16 if target.dtype == torch.bfloat16 else _as_float16
    target.copy_(round_exactly(values, random))


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _UINT64
    return x ^ (x >> 31)


def _random(state: int, count: int, device: torch.device) -> Tensor:
    """Random numbers of 32 bits for the elements in memory order, in int64."""
    blocks = []
    for block in range((count + _UINT32) >> 32):
        key = _mix(state ^ block)
        size = min(count - (block << 32), 1 << 32)
        blocks.append(_hash(torch.arange(size, device=device), key & _UINT32, key >> 32))
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.int64, device=device)


def _hash(offsets: Tensor, first: int, second: int) -> Tensor:
    # Products may pass 2^63, but their lower 32 bits are right.
    x = (offsets ^ first) * 0x85EBCA6B & _UINT32
    x = (x ^ (x >> 16) ^ second) * 0xC2B2AE35 & _UINT32
    return (x ^ (x >> 15)) * 0x9E3779B1 & _UINT32


def _as_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """Float32 values that bfloat16 holds exactly."""
    bits = values.view(torch.int32)
    rounded = (bits + (random >> 16).to(torch.int32)) & -0x10000
    return torch.where((bits & 0x7FFFFFFF) < 0x7F7F0000, rounded, bits).view(torch.float32)


def _as_float16(values: Tensor, random: Tensor) -> Tensor:
    """Float32 values that float16 holds exactly."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((bits + (random >> 19).to(torch.int32)) & -0x2000).view(torch.float32)
    # Below 2^-14 the spacing is 2^-24.
    scaled = values.abs().clamp(max=2.0**-14) * 2.0**24
    whole = scaled.floor()
    up = (random >> 1) < ((scaled - whole) * 2.0**31).to(torch.int64)
    subnormal = ((whole + up) * 2.0**-24).copysign(values)
    rounded = torch.where(magnitude < 0x38800000, subnormal, normal)
    return torch.where(magnitude < 0x477FE000, rounded, values)
