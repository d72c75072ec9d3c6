"""Python objects from bytes: valid things, damaged ones, and things that nobody expects."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_T = TypeVar("_T")


class Source:
    """Reads choices from bytes; past their end every choice is the first."""

    def __init__(self, data: bytes, *, frees: bool = False) -> None:
        self._data = data
        self._place = 0
        self.frees = frees  # makes tensors without memory too, which torch itself cannot print

    def bytes(self, count: int) -> bytes:
        found = self._data[self._place : self._place + count]
        self._place += count
        return found.ljust(count, b"\0")

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int.from_bytes(self.bytes(1 if count <= 256 else 3), "little") % count

    def choice(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]

    def chance(self, percent: int) -> bool:
        return self.below(100) >= 100 - percent

    def double(self) -> float:
        return float(struct.unpack("<d", self.bytes(8))[0])


class PlainSubclass(Tensor):
    """A subclass that has the memory of a tensor, or none: torch crashes where it prints that."""

    def __repr__(self) -> str:  # type: ignore[override]
        return "PlainSubclass"


class OddError(Exception):
    """What only `Odd` raises."""


class Odd(Tensor):
    """A subclass whose answers are nonsense."""

    def is_neg(self) -> Any:
        raise OddError

    def __repr__(self) -> str:  # type: ignore[override]
        return "Odd"


DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
SHAPES = ((3,), (4, 5), (0,), (), (1,), (2, 0, 3), (9,), (257,), (1, 1, 1, 1), (3, 1, 2))


def _resized(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor.as_subclass(PlainSubclass)


#: What can be done to a tensor that a kernel takes.
KINDS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t,
    lambda t: t.clone().requires_grad_(t.is_floating_point()),
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: torch.zeros(1, dtype=t.dtype).expand(t.shape),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.to_sparse_csr() if t.dim() == 2 else t,
    # torch cannot print a negated one of 8 bits.
    lambda t: torch._neg_view(t) if t.is_floating_point() and t.itemsize > 1 else t,
    lambda t: t.as_subclass(PlainSubclass),
    lambda t: t.as_subclass(Odd),
    lambda t: nn.Parameter(t, t.is_floating_point()),
    lambda t: t.fill_(float("nan")) if t.is_floating_point() else t,
    lambda t: torch.nested.nested_tensor([t, t]),
)


def tensor(source: Source) -> Tensor:
    """Mostly a small plain one of float32."""
    shape = source.choice(SHAPES) if source.chance(40) else (3,)
    dtype = source.choice(DTYPES) if source.chance(40) else torch.float32
    found = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)
    if not source.chance(40):
        return found
    try:
        return source.choice((*KINDS, _resized) if source.frees else KINDS)(found)
    except (RuntimeError, NotImplementedError, TypeError):  # not of this dtype
        return found


#: What is no tensor.
THINGS: tuple[Callable[[Source], Any], ...] = (
    lambda source: None,
    lambda source: source.below(300) - 20,
    lambda source: source.choice((2**31, 2**63, 2**64, -(2**63) - 1, 10**30)),
    lambda source: source.double(),
    lambda source: source.choice((0.0, -0.0, 1.0, float("inf"), float("nan"), 1e308, 5e-324)),
    lambda source: source.choice((True, False)),
    lambda source: source.choice(("", "lr", "module.weight", "ё" * 5, "a\0b", "fp32")),
    lambda source: source.bytes(source.below(5)),
    lambda source: np.float64(source.double()) if source.chance(50) else np.int64(7),
    lambda source: source.choice((torch.float32, torch.int8, torch.device("meta"))),
    lambda source: object(),
    lambda source: source.choice((int, Tensor, Exception("x"), len, range(3))),
    lambda source: frozenset([source.below(4)]),
)


def thing(source: Source, depth: int = 2) -> Any:
    """Anything: a tensor, no tensor, or a collection of such."""
    kind = source.below(8)
    if kind < 3 or depth == 0:
        return tensor(source) if source.chance(50) else source.choice(THINGS)(source)
    if kind == 3:
        return [thing(source, depth - 1) for _ in range(source.below(4))]
    if kind == 4:
        return tuple(thing(source, depth - 1) for _ in range(source.below(4)))
    if kind == 5:
        keys = ("state", "params", 0, 1, "momentum_buffer", "decay", "schedule", None)
        return {source.choice(keys): thing(source, depth - 1) for _ in range(source.below(4))}
    return source.choice(THINGS)(source) if kind == 6 else tensor(source)


def damaged(source: Source, value: Any) -> Any:
    """A deep copy with a few things in it changed, dropped, doubled or exchanged."""
    if source.chance(3):
        return thing(source)
    found = copy.deepcopy(value)
    for _ in range(1 + source.below(3)):
        _damage(source, found)
    return found


def _damage(source: Source, holder: Any) -> None:
    """Changes something somewhere below a list or dict."""
    for _ in range(6):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = source.choice(keys)
        if isinstance(holder[key], (dict, list)) and holder[key] and not source.chance(20):
            holder = holder[key]
            continue
        _damage_entry(source, holder, key, keys)
        return


def _damage_entry(source: Source, holder: Any, key: Any, keys: list[Any]) -> None:
    kind = source.below(7)
    if kind == 0:
        holder[key] = thing(source)
    elif kind == 1:
        del holder[key]
    elif kind == 2:
        holder[key] = holder[source.choice(keys)]
    elif kind == 3 and isinstance(holder, dict):
        holder[source.choice(("decay", "lr", 0, "x", None, 1.5, "module.w"))] = thing(source)
    elif kind == 3:
        holder.append(thing(source))
    elif kind == 4 and isinstance(holder[key], Tensor):
        holder[key] = tensor(source)
    elif kind == 5 and isinstance(holder[key], (int, float)):
        holder[key] = source.choice((-1, 0, 2**70, float("nan"), 1e400, True, -0.5))
    else:
        holder[key] = source.choice(THINGS)(source)
