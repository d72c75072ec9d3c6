"""The tensors that an EMA keeps: shadows that are averaged, and exact copies of everything else."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_ as _is

import torch
from torch import Tensor

from fused_opt._averages import Shadow, is_frozen
from fused_opt._ema_names import Names, check_match
from fused_opt._hyper import HALF_DTYPES

WIDER = dict.fromkeys(HALF_DTYPES, torch.float32)


class Shadows:
    """What stands for a model's tensors, by name.

    Parameters of real and complex numbers are averaged, and such buffers if ``averages_buffers``.
    Everything else that is tracked, integers above all, has one exact copy.

    Args:
        names: what to track.
        count: how many averages there are.
        dtype: of what stands for real numbers; None for theirs, and float32 for half types.
        device: of all; None for theirs.
        averages_buffers: whether buffers are averaged.
        old: goes on in its memory, where that stands for the same tensors and fits.

    Raises:
        ValueError: a shadow cannot have this dtype, or be on this device.
    """

    def __init__(
        self,
        names: Names,
        count: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
        averages_buffers: bool,
        old: Shadows | None = None,
    ) -> None:
        self.names = names
        # Those that do not train. Others may be frozen between steps, and stay averages then.
        self.frozen = frozenset(filter(is_frozen, names.params.values()))
        self.averaged: dict[str, tuple[Tensor, ...]] = {}
        self.copied: dict[str, Tensor] = {}
        known = {} if old is None else old._by_tensor()
        for name, tensor in names.tensors.items():
            _check_device(name, tensor, device)
            is_number = tensor.is_floating_point() or tensor.is_complex()
            if is_number and (name in names.params or averages_buffers):
                wanted = _shadow_dtype(name, tensor, dtype)
                self.averaged[name] = _memory(tensor, wanted, count, known.get(id(tensor)))
            else:
                (self.copied[name],) = _memory(tensor, tensor.dtype, 1, known.get(id(tensor)))
        self._buffers: list[Tensor] = []  # those that the next two were made for
        self._rows: dict[Tensor, Shadow] = {}
        self._to_copy: list[Tensor] = []

    def _by_tensor(self) -> dict[int, tuple[Tensor, ...]]:
        copied = {name: (copy,) for name, copy in self.copied.items()}
        kept = {**self.averaged, **copied}
        return {id(tensor): kept[name] for name, tensor in self.names.tensors.items()}

    @property
    def home(self) -> torch.device:
        """The device of the first parameter, where steps are counted if the host does not."""
        return next(iter(self.names.params.values())).device

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that depends on what is tracked alone."""
        shadows = [shadow for shadows in self.averaged.values() for shadow in shadows]
        return [*shadows, *self.copied.values()]

    def average(self, index: int) -> dict[str, Tensor]:
        """What is averaged, and all parameters."""
        return {
            name: self.averaged[name][index] if name in self.averaged else self.copied[name]
            for name in self.names.tensors
            if name in self.averaged or name in self.names.params
        }

    def everything(self, index: int) -> dict[str, Tensor]:
        """What stands for every tensor that is tracked, in one average."""
        return {**self.average(index), **self.copied}

    def rows(self) -> dict[Tensor, Shadow]:
        """The shadows by the tensors that they follow now, tuples where there are several averages.

        Raises:
            ValueError: a tensor has been replaced by one of another shape.
        """
        buffers = [holder[key] for holder, key in self.names.buffers.values()]
        known = self._buffers
        if not self._rows or not all(map(_is, buffers, known)) or len(buffers) != len(known):
            tensors = self.names.tensors
            check_match("the model's tensors", tensors, self.everything(0))
            self._buffers = buffers
            self._rows = {
                tensors[name]: shadows if len(shadows) > 1 else shadows[0]
                for name, shadows in self.averaged.items()
            }
            self._to_copy = [tensors[name] for name in self.copied]
        return self._rows

    def copy_exactly(self, where: Tensor | None = None) -> None:
        """Copies what is not averaged, as :meth:`rows` has found it.

        Args:
            where: a bool on a device that says whether to; None does.
        """
        if where is None:
            copy_all(self.copied.values(), self._to_copy)
            return
        for copy, source in zip(self.copied.values(), self._to_copy, strict=True):
            torch.where(where.to(copy.device), source, copy, out=copy)

    def keep_in(self, names: Names) -> None:
        """Goes on in the tensors of another model with one average, as they are."""
        found = names.under_every_name(names.tensors)
        self.averaged = {name: (found[name],) for name in self.averaged}
        self.copied = {name: found[name] for name in self.copied}
        self._rows = {}

    def follow(self, names: Iterable[str]) -> None:
        """Copies tensors by name, as they are now, also what is averaged."""
        tensors = self.names.tensors
        for name in names:
            for kept in self.averaged.get(name) or (self.copied[name],):
                kept.copy_(tensors[name])


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies tensors into others in as few calls as torch can, without taking memory."""
    into, out_of = list(targets), list(sources)
    if all(type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ for t in (*into, *out_of)):
        if into:
            torch._foreach_copy_(into, out_of)
        return
    for target, source in zip(into, out_of, strict=True):  # DTensor cannot copy lists
        target.copy_(source)


def fits(memory: Tensor | None, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is memory that can hold a tensor in this dtype."""
    if memory is None or memory.dtype != dtype:
        return False
    return memory.shape == tensor.shape and memory.device == tensor.device


def _memory(
    tensor: Tensor, dtype: torch.dtype, count: int, known: tuple[Tensor, ...] | None
) -> tuple[Tensor, ...]:
    """Memory for so many tensors like one, that which is known if it will do."""
    if known is not None and len(known) == count and fits(known[0], tensor, dtype):
        return known
    return tuple(torch.empty_like(tensor, dtype=dtype, requires_grad=False) for _ in range(count))


def _shadow_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor's shadow; raises ValueError for what no kernel takes beside it."""
    if dtype is None or tensor.is_complex():
        return WIDER.get(tensor.dtype, tensor.dtype)
    is_double = tensor.dtype == torch.float64
    possible = (torch.float32, *((torch.float64,) if is_double else HALF_DTYPES))
    if dtype not in possible:
        raise ValueError(
            f"dtype: expected one of {', '.join(map(str, possible))} for the {tensor.dtype} "
            f"{name!r}, got {dtype}"
        )
    return dtype


def _check_device(name: str, tensor: Tensor, device: torch.device | None) -> None:
    if device is not None and device != tensor.device:
        raise ValueError(
            f"device: expected that of {name!r}, {tensor.device}, got {device}: shadows are kept "
            "where the parameters are"
        )
