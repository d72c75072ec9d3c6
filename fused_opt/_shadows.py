"""The tensors that an EMA keeps: shadows that are averaged, and exact copies of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_ as _is
from typing import Any

import torch
from torch import Tensor, nn

from fused_opt._averages import Averages, Shadow, is_frozen
from fused_opt._ema_names import Names, Slot, check_match, named
from fused_opt._hyper import HALF_DTYPES
from fused_opt._offload import Offload, host_like, is_away
from fused_opt._plan import Gate, Refinement

WIDER = dict.fromkeys(HALF_DTYPES, torch.float32)


class Shadows:
    """What stands for a model's tensors, by name.

    Parameters of real and complex numbers are averaged, and such buffers if ``averages_buffers``.
    Everything else that is tracked, integers above all, has one exact copy.

    Args:
        names: what to track.
        count: how many averages there are.
        dtype: of what stands for real numbers; None for theirs, and float32 for half types.
        device: of all; None for theirs. On the CPU they may be those of tensors on GPUs.
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
        self._averaged: dict[str, tuple[Tensor, ...]] = {}
        self._copied: dict[str, Tensor] = {}
        self._device = device
        self._offload: Offload | None = None
        known: dict[str, tuple[Tensor, ...]] = {}
        if old is not None:
            old.wait()
            known = old._memory()
        _check_devices(names.tensors, device)
        for name, tensor in names.tensors.items():
            is_number = tensor.is_floating_point() or tensor.is_complex()
            if is_number and (name in names.params or averages_buffers):
                wanted = _shadow_dtype(name, tensor, dtype)
                self._averaged[name] = self._memory_for(tensor, wanted, count, known.get(name))
            else:
                (self._copied[name],) = self._memory_for(tensor, tensor.dtype, 1, known.get(name))
        #: The tensors that are followed, with their shadows: tuples with several averages.
        self.rows: dict[Tensor, Shadow] = {}
        self._copies: list[CopyGroup] = []
        self._slots: list[Slot] = []  # what they hold decides these two
        self._held: list[Any] = []
        self._module: nn.Module | None = None  # whose tensors these are
        # The names of those that do not train. Others may be frozen between steps, and are averaged
        # then too. The same names are no new registration.
        self._frozen: list[str] = (
            old._frozen
            if old is not None and old.names is names
            else [name for name, tensor in names.tensors.items() if is_frozen(tensor)]
        )
        if old is not None and old._module is not None:
            self.keep_in(old._module)
        self.find(names)

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return {**self.__dict__, "_offload": None}

    def _memory(self) -> dict[str, tuple[Tensor, ...]]:
        return {**self._averaged, **{name: (copy,) for name, copy in self._copied.items()}}

    def _memory_for(
        self, tensor: Tensor, dtype: torch.dtype, count: int, known: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """Memory for so many tensors like one, that which is known if it will do."""
        if (
            known is not None
            and len(known) == count
            and fits(known[0], tensor, dtype, self._device)
        ):
            return known
        return tuple(memory_like(tensor, dtype, self._device) for _ in range(count))

    @property
    def is_offloaded(self) -> bool:
        """Whether they are on the CPU, and what they stand for on GPUs."""
        if self._device is None or self._device.type != "cpu" or not self.names.params:
            return False
        holder, key = next(iter(self.names.params.values()))
        first: Tensor | None = holder.get(key)  # None if the model has lost it
        return first is not None and is_away(first)

    def wait(self) -> None:
        """Waits for updates on the CPU that are under way."""
        if self._offload is not None:
            self._offload.wait()

    def planned_on_host(
        self,
        averages: Averages,
        gate: Gate | None,
        subject: Callable[[str, Tensor], str],
        refinement: Refinement | None,
        stochastic: bool,
    ) -> Callable[[], None]:
        """Plans an update of shadows that are offloaded, and the copies: ``Offload.planned``."""
        copies = self._copied_pairs()
        return self._offloading().planned(averages, copies, gate, subject, refinement, stochastic)

    def _offloading(self) -> Offload:
        if self._offload is None:
            self._offload = Offload(self.home)
            self._offload.reserve(self.rows, self._copied_pairs())
        return self._offload

    def _copied_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [pair for group in self._copies for pair in zip(*group, strict=True)]

    @property
    def is_kept_in_module(self) -> bool:
        """Whether they are another module's tensors, which only that may replace."""
        return self._module is not None

    @property
    def averaged(self) -> dict[str, tuple[Tensor, ...]]:
        """What is averaged: the shadow in each average, once updates under way are done."""
        self.wait()
        self._find_in_module()
        return self._averaged

    @property
    def copied(self) -> dict[str, Tensor]:
        """The exact copies of everything else, likewise."""
        self.wait()
        self._find_in_module()
        return self._copied

    @property
    def home(self) -> torch.device:
        """The device of the first parameter, where steps are counted if the host does not."""
        held = (holder.get(key) for holder, key in self.names.params.values())
        first = next((tensor for tensor in held if tensor is not None), None)
        return torch.device("cpu") if first is None else first.device  # the model has lost all

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that depends on what is tracked alone."""
        shadows = [shadow for shadows in self.averaged.values() for shadow in shadows]
        return [*shadows, *self.copied.values()]

    def average(self, index: int) -> dict[str, Tensor]:
        """What is averaged, and all parameters."""
        averaged, copied = self.averaged, self.copied
        return {
            name: averaged[name][index] if name in averaged else copied[name]
            for name in self.names.slots
            if name in averaged or name in self.names.params
        }

    def everything(self, index: int) -> dict[str, Tensor]:
        """What stands for every tensor that is tracked, in one average."""
        return {**self.average(index), **self.copied}

    def has_changed(self) -> bool:
        """Whether the model, or the module of :meth:`keep_in`, holds something else than it did."""
        if self.is_offloaded != (self._offload is not None):  # moved to a GPU, or from there
            return True
        try:
            held = [holder[key] for holder, key in self._slots]
        except KeyError:
            return True
        return not all(map(_is, held, self._held))

    def find(self, names: Names) -> None:
        """Follows what now has these names, which are those that are known.

        Raises:
            ValueError: a tensor was replaced by one of another shape. Nothing has changed.
        """
        tensors, averaged, copied = names.tensors, self.averaged, dict(self.copied)
        for name, copy in copied.items():  # such as caches that grow
            tensor = tensors[name]
            if not (self.is_kept_in_module or fits(copy, tensor, tensor.dtype, self._device)):
                memory = memory_like(tensor, tensor.dtype, self._device)
                copied[name] = memory.copy_(tensor.detach())  # may be read before the next update
        shadows = {name: shadows[0] for name, shadows in averaged.items()}
        check_match("the model's tensors", tensors, {**shadows, **copied})
        self.names, self._copied = names, copied
        #: Parameters that are copied as long as they are frozen.
        self.frozen = frozenset(tensors[name] for name in self._frozen)
        self.rows = {
            tensors[name]: shadows if len(shadows) > 1 else shadows[0]
            for name, shadows in averaged.items()
        }
        self._copies = copy_groups(copied.values(), [tensors[name] for name in copied])
        self._slots = _watched(names)
        if self._module is not None:
            self._slots += _watched(named(self._module))
        self._held = [holder[key] for holder, key in self._slots]
        if self._offload is not None and self.is_offloaded and self._offload.home == self.home:
            self._offload.reserve(self.rows, self._copied_pairs())
            return
        self._offload = None
        if self.is_offloaded:
            self._offloading()

    def copy_exactly(self, where: Tensor | None = None) -> None:
        """Copies what is not averaged.

        Args:
            where: a bool on a device that says whether to; None does.
        """
        for targets, sources in self._copies:
            if where is None:
                _copy(targets, sources)
                continue
            is_wanted = where.reshape(()).to(targets[0].device)
            for target, source in zip(targets, sources, strict=True):
                torch.where(is_wanted, source.to(target.dtype), target, out=target)

    def keep_in(self, module: nn.Module) -> None:
        """Goes on in the tensors of a module like the model, as they are, now and later.

        Raises:
            ValueError: it has other names or shapes.
        """
        expected = {name: tensors[0] for name, tensors in self._memory().items()}
        check_match("the averages' module", _tensors_in(module, expected), expected)
        self._module = module

    def _find_in_module(self) -> None:
        """Takes the module's tensors as they are now."""
        if self._module is None:
            return
        known = self._memory()
        found = _tensors_in(self._module, known)
        check_match("the averages' module", found, {name: known[name][0] for name in known})
        self._averaged = {name: (found[name],) for name in self._averaged}
        self._copied = {name: found[name] for name in self._copied}

    def follow(self, names: Iterable[str]) -> None:
        """Copies tensors by name, as they are now, also what is averaged."""
        tensors = self.names.tensors
        for name in names:
            for kept in self.averaged.get(name) or (self.copied[name],):
                kept.copy_(tensors[name])


#: Tensors of one dtype, and those of one dtype to copy into them.
CopyGroup = tuple[list[Tensor], list[Tensor]]


def copy_groups(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> list[CopyGroup]:
    """Sorts tensors to be copied so that one call can copy those of a group.

    ``torch._foreach_copy_`` takes targets of several dtypes, and some releases then write wrong
    numbers on CUDA; DTensor cannot copy lists, and is alone.
    """
    groups: dict[Any, CopyGroup] = {}
    for target, source in zip(targets, sources, strict=True):
        plain = is_plain(target) and is_plain(source)
        alike = (target.dtype, source.dtype, target.device, source.device)
        into, out_of = groups.setdefault(alike if plain else id(target), ([], []))
        into.append(target)
        out_of.append(source)
    return list(groups.values())


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies the tensors of a group."""
    if len(targets) == 1 or targets[0].device != sources[0].device:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    else:
        torch._foreach_copy_(targets, sources)


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies tensors into others in as few calls as torch can, without taking memory."""
    for group in copy_groups(targets, sources):
        _copy(*group)


def fits(
    memory: Tensor | None, tensor: Tensor, dtype: torch.dtype, device: torch.device | None
) -> bool:
    """Whether there is memory that can hold a tensor in this dtype, on its device if None."""
    if memory is None or memory.dtype != dtype:
        return False
    return memory.shape == tensor.shape and memory.device == (device or tensor.device)


def memory_like(tensor: Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Memory like a tensor's in this dtype, on its device if None."""
    if device is not None and device.type == "cpu" and is_away(tensor):
        return host_like(tensor, dtype, tensor)
    return torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False)


def _watched(names: Names) -> list[Slot]:
    """Everything that a model may replace."""
    return [] if names.modules is None else [*names.slots.values(), *names.modules]


def _tensors_in(module: nn.Module, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a module that have these names."""
    names = named(module)
    found = names.under_every_name(names.tensors)
    return {name: found[name] for name in wanted if name in found}


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


def _check_devices(tensors: dict[str, Tensor], device: torch.device | None) -> None:
    """Raises ValueError unless shadows can be kept on the device."""
    away = []
    for name, tensor in tensors.items():
        if device is None or device == tensor.device:
            continue
        away.append(name)
        if not (device.type == "cpu" and is_away(tensor)):
            raise ValueError(
                f"device: expected that of {name!r}, {tensor.device}, or the CPU for tensors on "
                f"CUDA, got {device}"
            )
        if not is_plain(tensor):
            raise ValueError(
                f"device: expected that of {name!r}, {tensor.device}, which is a "
                f"{type(tensor).__name__} that only torch can copy, got {device}"
            )
    if away and len(away) < len(tensors):
        others = [name for name in tensors if name not in away]
        raise ValueError(
            f"device: expected all tensors on CUDA to keep their averages on {device}, but "
            f"{others} are there already"
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own that torch's operators work on, unlike a DTensor."""
    plain_dispatch = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain_dispatch and tensor.layout == torch.strided
