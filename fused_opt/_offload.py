"""Averages that the CPU keeps of parameters on GPUs, without the host waiting for them.

A step that is due copies the parameters to pinned memory in a side stream, and in the same stream
hands their shadows to the CPU, as a native job that needs no Python. The streams of training wait,
on their devices, for the copies alone: whoever changes a parameter next does so after that. The
host waits where shadows are read.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_opt._averages import Averages, Shadow, all_shadows
from fused_opt._counter import is_capturing
from fused_opt._hyper import HALF_DTYPES
from fused_opt._plan import Gate, Plan, Refinement

if TYPE_CHECKING:
    from fused_opt.schedules import Schedule

#: A tensor on the host, and the one on a GPU to copy into it.
Pair = tuple[Tensor, Tensor]


def is_away(tensor: Tensor) -> bool:
    """Whether the CPU has to have a copy of a tensor to read it."""
    return tensor.is_cuda


def host_like(tensor: Tensor, dtype: torch.dtype, source: Tensor) -> Tensor:
    """Memory on the host in the order of a tensor, which the GPU of ``source`` can copy into."""
    return torch.empty_like(
        tensor, dtype=dtype, device="cpu", requires_grad=False, pin_memory=source.is_cuda
    )


def laid_out_like(host: Tensor, source: Tensor) -> Tensor:
    """A tensor in the order of one on the host, whose bytes can be copied into it as they are.

    ``copy_`` would conjugate, negate or reorder them on the host, at once, as if they were there.
    """
    if source.stride() == host.stride() and not (source.is_conj() or source.is_neg()):
        return source
    return torch.empty_like(host, device=source.device).copy_(source)


class SideStreams:
    """A stream for copies on each GPU. That of ``home`` runs jobs on the CPU too, in their turn."""

    def __init__(self, home: torch.device) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._home = self._on(home)

    def _on(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def copy_out(self, pairs: Iterable[Pair]) -> None:
        """Copies tensors as they are at this point of their current streams.

        Those go on when that is done, and it is done when all jobs before are.
        """
        of_device: dict[torch.device, list[Pair]] = {}
        for pair in pairs:
            of_device.setdefault(pair[1].device, []).append(pair)
        for device, own in of_device.items():
            training, side = torch.cuda.current_stream(device), self._on(device)
            side.wait_stream(training)
            side.wait_stream(self._home)
            with torch.cuda.stream(side):
                for host, source in own:
                    host.copy_(laid_out_like(host, source), non_blocking=True)
            training.wait_stream(side)
            self._home.wait_stream(side)

    def run(self, job: Any) -> None:
        """Enqueues a job after all copies so far."""
        with torch.cuda.device(self._home.device):
            job.enqueue(self._home.cuda_stream)

    def wait(self) -> None:
        """Waits until everything is done."""
        self._home.synchronize()


class Offload:
    """Updates shadows on the CPU.

    Args:
        home: the GPU whose side stream hands jobs to the CPU.
    """

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self._streams = SideStreams(home)
        self._plan = Plan()
        self._memory: dict[Hashable, Tensor] = {}  # what is copied into, by what is copied
        self._shadows: list[Tensor] = []  # of the last job
        # A job knows addresses alone: their memory stays until it is done.
        owner = os.getpid()
        weakref.finalize(self, _release, owner, self._streams, self._memory, self._shadows)

    def wait(self) -> None:
        """Waits until all shadows are what the steps so far have made of them."""
        self._streams.wait()

    def reserve(self, shadows: Mapping[Tensor, Shadow], copies: Sequence[Pair]) -> None:
        """Takes the memory that a step copies parameters into, and gives back what has no use.

        To take pinned memory may wait for GPUs, and is not for a step. What is there stays.
        """
        self.wait()
        used = {*shadows, *(source for _, source in copies)}
        for key in list(self._memory):
            tensor = key[0] if isinstance(key, tuple) else key
            if isinstance(tensor, Tensor) and tensor not in used:
                del self._memory[key]
        pairs: list[Pair] = []
        for param, shadow in shadows.items():
            self._staged(param, param, all_shadows(shadow)[0], pairs)
        for copy, source in copies:
            self._staged(source, source, copy, pairs)

    def planned(
        self,
        averages: Averages,
        copies: Iterable[Pair],
        gate: Gate | None,
        subject: Callable[[str, Tensor], str],
        refinement: Refinement | None,
        stochastic: bool,
    ) -> Callable[[], None]:
        """Plans an update, which what is returned begins; to be called after the step.

        Args:
            averages: what the step would do if the shadows were on the GPU.
            copies: exact copies that are made with them, and of what.
            gate: of the step, which is counted by it before the update begins.
            subject: names a tensor at fault.
            refinement: what refines a parameter, if anything does.
            stochastic: whether half-precision shadows would be rounded so.

        Raises:
            RuntimeError: a CUDA graph is being captured.
            ValueError: tensors do not fit together or are no longer on a GPU, or shadows would be
                rounded stochastically.
        """
        if is_capturing(self.home):
            raise RuntimeError(
                "ema: expected its shadows on the GPU while a CUDA graph is captured, which cannot "
                "hold updates on the CPU"
            )
        dtypes = {all_shadows(shadow)[0].dtype for shadow in averages.shadows.values()}
        if stochastic and not dtypes.isdisjoint(HALF_DTYPES):
            raise ValueError(
                "ema: expected float32 or float64 shadows on the CPU of parameters on a GPU that "
                f"are rounded stochastically, got {', '.join(map(str, dtypes))}"
            )
        pairs: list[Pair] = []
        on_host, refinements, owners = self._rows(averages, refinement, pairs)
        found_inf = None
        if gate is not None and averages.on_device is not None:
            on_host = on_host._replace(steps=on_host.steps - 1)
        if gate is not None and gate.found_inf is not None:
            if not is_away(gate.found_inf):
                if float(gate.found_inf) != 0:
                    return lambda: None
            else:
                flag = (gate.found_inf != 0).to(torch.float32)
                found_inf = self._staged("found_inf", flag.reshape(()), flag.reshape(()), pairs)
        made = [(copy, self._staged_copy(copy, source, pairs)) for copy, source in copies]
        for _, source in pairs:
            if not is_away(source):
                raise ValueError(
                    "ema: expected all tensors on CUDA to keep their averages on the CPU, but one "
                    f"of shape {tuple(source.shape)} is on {source.device}"
                )

        plan = self._plan
        plan.clear(lambda stream, value: subject(stream, owners[value]))
        try:
            plan.set_averages(on_host)
            plan.add_remaining_ema(lambda: refinements.get if refinements else None)
            job = plan.host_job(found_inf)
        finally:
            plan.clear(lambda stream, _: stream)  # the subject may be of an optimizer, which may go
        for copy, staged in made:
            job.add_copy(copy.data_ptr(), staged.data_ptr(), copy.nbytes)

        begun = False

        def begin() -> None:
            nonlocal begun
            if begun:
                return
            begun = True
            shadows = [s for shadow in averages.shadows.values() for s in all_shadows(shadow)]
            self._shadows[:] = [*shadows, *(copy for copy, _ in made)]
            increment_version(self._shadows)
            self._streams.copy_out(pairs)
            self._streams.run(job)

        return begin

    def _rows(
        self,
        averages: Averages,
        refinement: Refinement | None,
        pairs: list[Pair],
    ) -> tuple[Averages, dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """The averages of what is copied out, its refinements, and the parameter of each."""
        shadows: dict[Tensor, Shadow] = {}
        refinements: dict[Tensor, Tensor] = {}
        owners: dict[Tensor, Tensor] = {}
        frozen: list[Tensor] = []
        for param, shadow in averages.shadows.items():
            like = all_shadows(shadow)[0]
            beside = None if refinement is None else refinement(param)
            if beside is not None and beside.dtype == torch.float32:  # a master is all of the value
                value = self._staged((param, "master"), beside, like, pairs)
            else:
                value = _real(self._staged(param, param, like, pairs))
                if beside is not None:
                    staged = self._staged((param, "refinement"), beside, like, pairs)
                    refinements[value] = staged
            owners[value] = param
            shadows[value] = tuple(map(_real, shadow)) if isinstance(shadow, tuple) else _real(like)
            if averages.copies(param):
                frozen.append(value)
        decays = [self._decay(k, decay, pairs) for k, decay in enumerate(averages.decays)]
        count = averages.on_device
        on_host = averages._replace(
            shadows=shadows,
            decays=tuple(decays),
            on_device=None if count is None else self._staged("steps", count, count, pairs),
            frozen=frozenset(frozen),
        )
        return on_host, refinements, owners

    def _decay(
        self, average: int, decay: float | Tensor | Schedule, pairs: list[Pair]
    ) -> float | Tensor | Schedule:
        """What a job reads for a decay. A tensor may change before it does."""
        if not isinstance(decay, Tensor):
            return decay
        if not is_away(decay):
            return float(decay)
        number = decay.detach().reshape(())
        if number.dtype not in (torch.float32, torch.float64):
            number = number.double()
        return self._staged(average, number, number, pairs)

    def _staged_copy(self, copy: Tensor, source: Tensor, pairs: list[Pair]) -> Tensor:
        """Where a tensor will be copied to, byte for byte as its exact copy will be."""
        if copy.shape != source.shape:
            raise ValueError(
                f"ema: expected a tensor of shape {tuple(copy.shape)}, which it had when it was "
                f"registered, got {tuple(source.shape)}; call register()"
            )
        return self._staged(source, source.to(copy.dtype), copy, pairs)

    def _staged(self, key: Hashable, source: Tensor, like: Tensor, pairs: list[Pair]) -> Tensor:
        """Where a tensor will be copied to, in the order of another."""
        host = self._memory.get(key)
        order = like if like.shape == source.shape else source  # which the plan refuses
        expected = source.shape, source.dtype, order.stride()
        if host is None or (host.shape, host.dtype, host.stride()) != expected:
            self.wait()  # once: what held it may be in use
            host = self._memory[key] = host_like(order, source.dtype, source)
        pairs.append((host, source.detach()))
        return host


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as the real numbers that it consists of, which are averaged alike."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _release(owner: int, streams: SideStreams, *_used: Any) -> None:
    """Lets nothing go that a job may still use."""
    if os.getpid() == owner:  # a fork has no jobs, and its copies of the streams are of no use
        streams.wait()
