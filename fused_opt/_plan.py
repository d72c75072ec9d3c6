"""The one door to the native code: what a step updates is added, checked, and then run.

A plan is used in this order, once per step: ``clear``, the ``add`` functions, ``run``. Nothing is
changed before ``run`` has found no fault.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_opt import _composite, _rounding
from fused_opt._averages import Averages, Shadow, all_shadows
from fused_opt._counter import is_capturing
from fused_opt._hyper import SCALARS, ClipHyper, SgdHyper, as_scalar
from fused_opt._launch import CPU, launch, require_kernels_for
from fused_opt._native import native
from fused_opt._rounding import Rounding, shadow_stream

if TYPE_CHECKING:
    from fused_opt.schedules import Schedule

_STREAMS = ("params", "grads", "momentum_buffers", "shadows", "refinements")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ALL_GROUPS = -1


class Rows(NamedTuple):
    """Parallel lists. None stands for a stream no row has, and inside one for a row without it.

    Without ``rounding`` all results are rounded to nearest.
    """

    params: list[Tensor]
    grads: list[Tensor] | None
    momentum_buffers: list[Tensor | None] | None
    shadows: list[Shadow | None] | None
    refinements: list[Tensor | None] | None
    rounding: Rounding | None = None

    @property
    def offered(self) -> tuple[Any, ...]:
        """As the native plan takes them."""
        ordinals = None if self.rounding is None else self.rounding.ordinals
        return (*self[: len(_STREAMS)], ordinals)

    def take(self, indices: list[int]) -> Rows:
        def chosen(stream: list[Any] | None) -> list[Any] | None:
            return None if stream is None else [stream[i] for i in indices]

        return Rows(
            [self.params[i] for i in indices],
            chosen(self.grads),
            chosen(self.momentum_buffers),
            chosen(self.shadows),
            chosen(self.refinements),
            None if self.rounding is None else self.rounding.take(indices),
        )


#: What refines a parameter, if anything does.
Refinement = Callable[[Tensor], Tensor | None]

_NO_ROWS = Rows([], None, None, None, None)


class Clip(NamedTuple):
    """The norm of all gradients, and the coefficient that clips them.

    Both are float64 tensors of no dimensions on one device, that may be overwritten by the next.
    """

    total: Tensor
    coefficient: Tensor
    dtype: torch.dtype

    def norm(self) -> Tensor:
        """The norm as a tensor of its own, in the dtype that users see."""
        return self.total.to(self.dtype, copy=True)


class Gate(NamedTuple):
    """What decides on the device whether a step is taken, and what counts it there if it is.

    Any ``found_inf`` but 0 skips. The counters are on ``home``, the device to run them on.
    """

    found_inf: Tensor | None
    counters: list[Tensor]
    home: torch.device


class Plan:
    """The tensors of one step, from optimizer state or lists to one launch per device.

    Args:
        keeps_memory: what a step needs on a device serves the next one too. Steps must then follow
            each other on one stream.
    """

    def __init__(self, keeps_memory: bool = False) -> None:
        self._module = native()
        self._native = self._module.Plan()
        self._kept: dict[tuple[str, int], list[Tensor]] | None = {} if keeps_memory else None
        self.clear(lambda stream, _: stream)

    def clear(self, subject: Callable[[str, Tensor], str]) -> None:
        """Starts a new step.

        Args:
            subject: names a tensor at fault in an error, from its stream and its row's parameter.
        """
        self._subject = subject
        self._native.clear()
        # Tensors, their dense copies that are updated, and whether to copy them back.
        self._copies: list[tuple[Tensor, Tensor, bool]] = []
        self._scalars: list[Tensor] = []  # on the device, alive until the launch
        self._tensors: list[dict[int, Tensor]] = []  # hyper-parameters of groups, by their scalar
        self._averages: Averages | None = None
        self._decays: dict[int, Tensor] = {}  # of averages
        self._rounding_steps: Tensor | None = None  # on a device, besides those in the groups
        self._for_torch: list[Callable[[Tensor | None], None]] = []
        self._torch_grads: list[Tensor] = []  # that no kernel reaches

    def set_averages(self, averages: Averages) -> None:
        """Tells what the shadows of all rows are updated with, before any of them is added.

        Raises:
            ValueError: ``every`` or ``after`` is out of range, or there are too many averages.
        """
        self._averages = averages
        numbers: list[float] = []
        scheduled: list[tuple[int, Schedule]] = []
        for k, decay in enumerate(averages.decays):
            number = 0.0  # where the host does not know it
            if isinstance(decay, (float, int)):
                number = decay
            elif isinstance(decay, Tensor):
                self._decays[k] = torch.as_tensor(as_scalar(decay, "decay"))
                number = 0.0 if decay.is_cuda else float(decay)
            else:
                scheduled.append((k, decay))
            numbers.append(number)
        self._native.set_averages(
            numbers, averages.steps, averages.every, averages.after, averages.frozen
        )
        for k, schedule in scheduled:
            self._native.set_schedule(k, *schedule._hyper)

    def add_param_group(
        self,
        params: list[Tensor],
        state: dict[Tensor, Any],
        hyper: SgdHyper,
        rounding: Rounding | None = None,
    ) -> Rows:
        """Adds the parameters of a group that have a gradient, and their shadows.

        ``rounding`` holds the ordinals of all parameters of the group, which follow each other.

        Returns:
            Those that were not added, because ``state`` does not hold all of theirs yet.
        """
        group = self._group(hyper, rounding)
        first_ordinal = rounding.ordinals[0] if rounding is not None and params else 0
        fresh, refused, for_torch, scattered = self._checked(
            self._native.add_param_group,
            params,
            state,
            hyper.state_key,
            hyper.refinement_key,
            None if self._averages is None else self._averages.shadows,
            first_ordinal,
            group,
        )

        def rows(found: Any) -> Rows:
            ordinals = found[len(_STREAMS)]
            own = None if rounding is None else rounding._replace(ordinals=ordinals)
            return Rows(*found[: len(_STREAMS)])._replace(rounding=own)

        if for_torch or scattered:
            self._add_refused(rows(refused), for_torch, scattered, group, hyper, first=False)
        return rows(fresh) if fresh[0] else _NO_ROWS

    def add_sgd(self, rows: Rows, hyper: SgdHyper) -> None:
        """Adds momentum SGD on rows that have all their momentum, and the EMA of their shadows."""
        self._add(rows, hyper, first=False)

    def add_first_sgd(self, rows: Rows, hyper: SgdHyper) -> None:
        """Adds the first step of rows, which is not dampened.

        ``rows.momentum_buffers`` holds None everywhere; after ``run``, the new momentum.
        """
        if rows.momentum_buffers is not None:
            rows.momentum_buffers[:] = [
                new_momentum(param, hyper) if isinstance(param, Tensor) else None  # refused below
                for param in rows.params
            ]
        self._add(rows, hyper._replace(dampening=0.0), first=True)

    def require_no_capture(self, new: Rows) -> None:
        """Raises RuntimeError for rows without state while a CUDA graph is captured.

        The graph would hold what makes the state, and start from it at each replay.
        """
        param, momentums = new.params[0], new.momentum_buffers
        if not (isinstance(param, Tensor) and is_capturing(param.device)):
            return
        missing = "momentum_buffers" if momentums and momentums[0] is None else "refinements"
        raise RuntimeError(
            f"{self._subject(missing, param)}: expected the state to exist before a CUDA graph is "
            "captured; use SGD(capturable=True), or take a step before the capture"
        )

    def add_ema(
        self,
        params: list[Tensor],
        shadows: list[Tensor],
        refinements: list[Tensor | None] | None = None,
    ) -> None:
        """Adds the EMA of parameters that this step does not change."""
        self._add(Rows(params, None, None, list(shadows), refinements), None, first=False)

    def add_remaining_ema(
        self,
        refinements: Callable[[], Refinement | None] = lambda: None,
        roundings: Callable[[], dict[Tensor, Rounding]] = dict,
    ) -> None:
        """Adds the EMA of all parameters that were not added with their shadow.

        Args:
            refinements: what gives the refinement of a parameter, None where nothing is refined;
                called where there are shadows to add.
            roundings: the parameters whose shadows are rounded stochastically, with the rounding of
                each; called where there are shadows to add.
        """
        if self._averages is None:
            return
        params, left = self._native.untouched(self._averages.shadows)
        if not params:
            return
        # A standalone update comes here with every parameter, and spends no time on each in Python.
        refinement = refinements()
        refined = None if refinement is None else [refinement(param) for param in params]
        rows = Rows(params, None, None, left, refined)
        found = roundings()
        if not found:
            self._add(rows, None, first=False)
            return
        alike: dict[tuple[int, int] | None, list[int]] = {}
        for i, param in enumerate(params):
            own = found.get(param)
            alike.setdefault(None if own is None else (own.seed, own.step), []).append(i)
        for key, indices in alike.items():
            some = rows.take(indices)
            if key is not None:
                ordinals = [found[param].ordinals[0] for param in some.params]
                rounding = found[some.params[0]]._replace(ordinals=ordinals)
                some = some._replace(rounding=rounding)
            self._add(some, None, first=False)

    def run_ema(
        self,
        averages: Averages,
        subject: Callable[[str, Tensor], str],
        gate: Gate | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """A whole step that updates averages alone."""
        self.clear(subject)
        try:
            self.set_averages(averages)
            self.add_remaining_ema()
            self.run(gate=gate, settle=settle)
        finally:
            self.clear(subject)

    def add_grads(self, grads: list[Tensor]) -> None:
        """Adds gradients that no step reads: for ``grad_norm`` and ``scale_grads``."""
        for_torch, scattered = self._checked(self._native.add_grads, grads, False)
        self._torch_grads += [grads[i] for i in for_torch]
        copies = [torch.empty_like(grads[i], requires_grad=False) for i in scattered]
        self._checked(self._native.add_grads, copies, True)
        self._copies += [(grads[i], c, True) for i, c in zip(scattered, copies, strict=True)]

    def grad_norm(self, hyper: ClipHyper, home: torch.device) -> Clip:
        """The norm of all gradients that were added. Changes nothing.

        Args:
            hyper: which norm, and by what it clips.
            home: where the result is.
        """
        self._fill_copies()
        found, dtype = [], torch.float32
        for device in self._native.devices():
            chunks, has_float64 = self._native.norm_chunks(device)
            if chunks:
                found.append(self._norm_on(device, chunks, hyper))
                dtype = torch.float64 if has_float64 else dtype
        if len(found) == 1 and not self._torch_grads and found[0].device == home:
            return Clip(found[0][0], found[0][1], dtype)
        # Norms of norms, as torch has it.
        norms = [each[0] for each in found]
        norms += [_composite.grad_norm(grad, hyper) for grad in self._torch_grads]
        if any(grad.dtype in (torch.float64, torch.complex128) for grad in self._torch_grads):
            dtype = torch.float64
        wide = torch.float32 if home.type == "mps" else torch.float64  # which has no float64
        norms = [norm.to(home, wide) for norm in norms]
        norms = norms or [torch.zeros((), device=home, dtype=wide)]
        return Clip(*_composite.clip_coefficient(norms, hyper), dtype)

    def _norm_on(self, device: int, chunks: int, hyper: ClipHyper) -> Tensor:
        """The norm and the coefficient, as if the gradients of a device were all there are."""
        memory = self._memory("norm", device, 2 if device == CPU else 2 + chunks)
        max_norm, of_max_norm = self._number_and_address(hyper.max_norm, "max_grad_norm", device)
        scale, of_scale = self._number_and_address(hyper.grad_scale, "grad_scale", device)
        native_hyper = self._module.ClipHyper(
            max_norm=max_norm, grad_scale=scale, infinity=hyper.infinity
        )
        if of_max_norm is not None:
            native_hyper.set_max_norm(*of_max_norm)
        if of_scale is not None:
            native_hyper.set_grad_scale(*of_scale)
        launch(device, self._native.grad_norm, native_hyper, memory.data_ptr())
        return memory

    def reserve(self, device: torch.device, groups: int, elements: list[int]) -> None:
        """Takes the memory of steps to come, with so many groups and gradients of these sizes."""
        index = _index_of(device)
        chunk = self._module.norm_chunk_elements
        chunks = sum(-(-numel // chunk) for numel in elements)
        self._memory("norm", index, 2 if index == CPU else 2 + chunks)
        if index != CPU:
            self._memory("groups", index, self._module.memory_bytes(groups) // 8)

    def _memory(self, what: str, device: int, doubles: int) -> Tensor:
        """Memory on a device, kept for the next step if the plan keeps any."""
        held = [] if self._kept is None else self._kept.setdefault((what, device), [])
        if not held or held[-1].numel() < doubles:
            # What is outgrown stays: a captured graph may use it. All of it is less than the last.
            size = max(doubles, 2 * held[-1].numel()) if held else doubles
            held.append(torch.empty(size, dtype=torch.float64, device=_device_of(device)))
        return held[-1]

    def check(self) -> None:
        """Checks what can only be checked on the whole.

        Raises:
            ValueError: tensors share memory.
            RuntimeError: CUDA tensors, and the module has no code for their device.
        """
        self._checked(self._native.check)
        self._check_capture()
        require_kernels_for(self._native.devices())

    def _check_capture(self) -> None:
        """A graph would not hold what runs on the CPU: it would run now, and in no replay."""
        if CPU not in self._native.devices() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "expected all parameters on CUDA while a CUDA graph is captured, which cannot hold "
                "the step of those on the CPU; step them with an optimizer of their own"
            )

    @property
    def has_torch_rows(self) -> bool:
        """Whether some of the step is run by torch, which no device can skip."""
        return bool(self._for_torch)

    def run(
        self,
        clip: Clip | None = None,
        gate: Gate | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """Updates everything, with clipped gradients if asked; raises as :meth:`check` does.

        With a ``found_inf`` in the gate there must be no rows for torch.

        Args:
            clip: what the gradients are multiplied by.
            gate: what decides on a device.
            settle: does the rest of the step, and may be called twice. Ctrl-C may raise between any
                two lines; where the tensors are updated by then, the rest is done nevertheless.
        """
        self.check()
        increment_version(self._native.written())
        for step in self._for_torch:
            step(None if clip is None else clip.coefficient)
        self._fill_copies()
        try:
            self._launch_all(clip, gate)
            self._write_copies()
            settle()
        except BaseException:
            if self._native.has_run():
                self._write_copies()
                settle()
            raise

    def _launch_all(self, clip: Clip | None, gate: Gate | None) -> None:
        devices = self._native.devices()
        counts = (self._rounding_steps, self._averages.on_device if self._averages else None)
        by_memory = any(each is not None for each in (clip, gate, *counts))
        if not (by_memory or self._tensors or self._decays or self._many_averages):
            for device in devices:
                launch(device, self._native.run, 0)
        else:
            self._run_by_scalars(devices, clip, gate, counts)

    def host_job(self, found_inf: Tensor | None) -> Any:
        """What :meth:`run` would do on the CPU, as a native job that is run later.

        The job reads numbers that are tensors, and ``found_inf``, when it runs. Whoever runs it
        keeps the memory of all tensors, and tells their version counters.

        Raises:
            ValueError: as :meth:`check`; or a tensor has gaps, or no kernel reaches it.
        """
        if self._copies or self._for_torch:
            raise ValueError("expected tensors without gaps that a kernel reaches")
        self.check()
        on_device = None if self._averages is None else self._averages.on_device
        self._set_scalars(CPU, None, Gate(found_inf, [], _device_of(CPU)), None, on_device)
        return self._native.host_job(torch.get_num_threads())

    @property
    def _many_averages(self) -> bool:
        """Whether their rules do not fit into a launch, and take memory on a GPU."""
        averages = self._averages
        return averages is not None and len(averages.decays) > self._module.table_averages

    def _run_by_scalars(
        self,
        devices: list[int],
        clip: Clip | None,
        gate: Gate | None,
        counts: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Launches what depends on numbers in memory."""
        if gate is not None and _index_of(gate.home) not in devices:
            devices.append(_index_of(gate.home))
        # Copied before a device counts this step.
        counts_on = {
            device: [None if count is None else count.to(_device_of(device)) for count in counts]
            for device in devices
        }
        for device in devices:
            memory = self._set_scalars(device, clip, gate, *counts_on[device])
            launch(device, self._native.run, 0 if memory is None else memory.data_ptr())

    def _set_scalars(
        self,
        device: int,
        clip: Clip | None,
        gate: Gate | None,
        rounding_steps: Tensor | None,
        average_steps: Tensor | None,
    ) -> Tensor | None:
        """Tells the native plan what it has to read on a device, and returns the memory for it."""
        if rounding_steps is not None:
            self._scalars.append(rounding_steps)
            self._native.set_rounding_steps(rounding_steps.data_ptr())
        if average_steps is not None:
            self._scalars.append(average_steps)
            self._native.set_average_steps(average_steps.data_ptr())
        for k, decay in self._decays.items():
            self._native.set_decay(k, *self._address_on(device, decay))
        for key, tensors in enumerate(self._tensors):
            for which, tensor in tensors.items():
                self._native.set_scalar(key, which, *self._address_on(device, tensor))
        if clip is not None:
            address = self._address_on(device, clip.coefficient, from_host=True)
            self._native.set_scalar(_ALL_GROUPS, SCALARS.index("clip"), *address)
        if gate is not None:
            self._set_gate(device, gate)
        size = 0 if device == CPU else self._native.memory_bytes(device)
        if size == 0:
            return None
        memory = self._memory("groups", device, size // 8)
        self._scalars.append(memory)
        return memory

    def _set_gate(self, device: int, gate: Gate) -> None:
        address = 0
        if gate.found_inf is not None:
            found = gate.found_inf.to(_device_of(device))
            if found.dtype != torch.float32:
                found = (found != 0).to(torch.float32)
            self._scalars.append(found)
            address = found.data_ptr()
        counters = gate.counters if _index_of(gate.home) == device else []
        self._native.set_gate(address, [counter.data_ptr() for counter in counters])

    def _address_on(self, device: int, tensor: Tensor, from_host: bool = False) -> tuple[int, bool]:
        """Where a device reads a number, and whether it is a double; 0 where it need not.

        A tensor on the CPU is known as a number, and a GPU is not made to wait for its copy.
        """
        if device != CPU and not tensor.is_cuda and not from_host:
            return 0, False
        if tensor.dtype not in (torch.float64, torch.float32):
            tensor = tensor.to(torch.float64)
        if tensor.get_device() != device:
            tensor = tensor.to(_device_of(device))
        self._scalars.append(tensor)
        return tensor.data_ptr(), tensor.dtype == torch.float64

    def _number_and_address(
        self, value: float | Tensor, name: str, device: int
    ) -> tuple[float, tuple[int, bool] | None]:
        """A hyper-parameter as a number, as far as the host knows it, and where a device reads it.

        A tensor on a GPU is not read: rows on that GPU get it by its address.
        """
        if not isinstance(value, Tensor):
            return value, None
        value = as_scalar(value, name)
        number = 0.0 if value.is_cuda else float(value)  # type: ignore[union-attr]
        return number, self._address_on(device, value)  # type: ignore[arg-type]

    def scale_grads(self, clip: Clip) -> None:
        """Multiplies all gradients that were added; to be called after :meth:`check`."""
        increment_version(self._native.written())
        for grad in self._torch_grads:
            grad.mul_(clip.coefficient.to(grad.device))
        for device in self._native.devices():
            launch(device, self._native.scale_grads, *self._coefficient_on(device, clip))
        self._write_copies()

    def _coefficient_on(self, device: int, clip: Clip) -> tuple[float, int]:
        """The number for the CPU, an address for a GPU, where it is not waited for."""
        if device == CPU:
            return float(clip.coefficient), 0
        coefficient = clip.coefficient.to(torch.device("cuda", device))
        self._scalars.append(coefficient)
        return 1.0, coefficient.data_ptr()

    def _fill_copies(self) -> None:
        for tensor, copy, _ in self._copies:
            copy.copy_(tensor)

    def _write_copies(self) -> None:
        for tensor, copy, written in self._copies:
            if written:
                tensor.copy_(copy)

    def _add(self, rows: Rows, hyper: SgdHyper | None, first: bool) -> None:
        if not rows.params:
            return
        group = self._group(hyper, rows.rounding)
        for_torch, scattered = self._checked(self._native.add, *rows.offered, group, False)
        if for_torch or scattered:
            self._add_refused(rows, for_torch, scattered, group, hyper, first)

    def _add_refused(
        self,
        rows: Rows,
        for_torch: list[int],
        scattered: list[int],
        group: Any,
        hyper: SgdHyper | None,
        first: bool,
    ) -> None:
        """Adds rows that the kernels do not take as they are: as copies, or to be run by torch."""
        if scattered:
            some = rows.take(scattered)
            copies = self._dense_copies(some, hyper)
            self._copy_alike(some.params, copies.params)
            self._checked(self._native.add, *copies.offered, group, True)
        if for_torch:
            numbers = None if hyper is None else hyper.numbers()
            self._add_for_torch(rows, for_torch, numbers, first)

    def _copy_alike(self, params: list[Tensor], copies: list[Tensor]) -> None:
        """Has the shadows of parameters that are copied do so where dense copies stand for them."""
        averages = self._averages
        if averages is None or not averages.frozen:
            return
        pairs = zip(params, copies, strict=True)
        self._native.set_frozen(
            averages.frozen.union(copy for param, copy in pairs if averages.copies(param))
        )

    def _group(self, hyper: SgdHyper | None, rounding: Rounding | None) -> Any:
        seed_and_step = None
        if rounding is not None:
            seed_and_step = rounding.seed, rounding.step
            self._rounding_steps = rounding.on_device
        if hyper is None:
            return self._module.Group(rounding=seed_and_step)
        numbers, tensors = self._numbers(hyper[:5])
        return self._module.Group(
            lr=numbers[0],
            momentum=numbers[1],
            dampening=numbers[2],
            weight_decay=numbers[3],
            grad_scale=numbers[4],
            nesterov=hyper.nesterov,
            maximize=hyper.maximize,
            decoupled_weight_decay=hyper.decoupled_weight_decay,
            sutskever=hyper.formulation == "sutskever",
            reset_grads=hyper.reset_grads,
            tensors=tensors,
            rounding=seed_and_step,
        )

    def _numbers(
        self, values: tuple[float | Tensor, ...]
    ) -> tuple[tuple[float | Tensor, ...], int]:
        """The first scalars as far as the host knows them, and a key of those that are tensors."""
        for value in values:
            # Most are numbers, and asking a number's type costs less than what else it may be.
            if type(value) is not float and isinstance(value, Tensor):
                break
        else:
            return values, _ALL_GROUPS
        numbers: list[float] = []
        tensors: dict[int, Tensor] = {}
        for value, name in zip(values, SCALARS, strict=False):
            scalar = as_scalar(value, name)
            hidden = False
            if isinstance(scalar, Tensor):
                tensors[SCALARS.index(name)] = scalar
                hidden = scalar.is_cuda
            numbers.append(0.0 if hidden else float(scalar))
        self._tensors.append(tensors)
        return tuple(numbers), len(self._tensors) - 1

    def _dense_copies(self, rows: Rows, hyper: SgdHyper | None) -> Rows:
        """Replaces tensors so that each row has one dense order: its parameter's, if that is dense.

        ``run`` fills them, and copies back what the step writes.
        """

        def replaced(tensor: Any, param: Tensor, written: bool) -> Any:
            if isinstance(tensor, tuple):
                return tuple(replaced(each, param, written) for each in tensor)
            order = torch.empty_like(param, requires_grad=False)
            if not isinstance(tensor, Tensor) or tensor.stride() == order.stride():
                return tensor
            copy = torch.empty_like(order, dtype=tensor.dtype)
            self._copies.append((tensor, copy, written))
            return copy

        def dense(stream: list[Any] | None, written: bool) -> list[Any] | None:
            if stream is None:
                return None
            return [
                replaced(tensor, param, written)
                for tensor, param in zip(stream, rows.params, strict=True)
            ]

        steps = hyper is not None
        return Rows(
            dense(rows.params, written=steps) or [],
            dense(rows.grads, written=hyper is not None and hyper.reset_grads),
            dense(rows.momentum_buffers, written=steps),
            dense(rows.shadows, written=True),
            dense(rows.refinements, written=steps),
            rows.rounding,
        )

    def _add_for_torch(
        self, all_rows: Rows, indices: list[int], hyper: SgdHyper | None, first: bool
    ) -> None:
        rows = all_rows.take(indices)
        for k in range(len(indices)):
            self._check_for_torch(rows.take([k]), hyper)
        if hyper is None:
            self._average_by_torch(rows)
            return

        self._torch_grads += rows.grads or []

        def step(clip: Tensor | None) -> None:
            momentums = [] if rows.momentum_buffers is None else rows.momentum_buffers
            if first:
                momentums[:] = [None] * len(momentums)  # a sparse gradient has a sparse one
            rounding = None if rows.rounding is None else rows.rounding.on_host()
            refined = _composite.Refined(rows.params, rows.refinements, rounding)
            wide = _rounding.widened(momentums, rounding, beside=refined.values)
            clipping = hyper._replace(clip=clip)
            _composite.sgd_step_(refined.values, rows.grads or [], wide, clipping)
            refined.store_()
            if not first:
                _rounding.narrow_(momentums, wide, rounding, _rounding.Stream.MOMENTUM)
            elif hyper.state_dtype or hyper.master_weights or rounding:
                momentums = [
                    None
                    if new is None
                    else _rounding.narrowed(new, hyper.momentum_dtype(param), rounding, k)
                    for k, (param, new) in enumerate(zip(rows.params, wide, strict=True))
                ]
            else:
                momentums = wide
            if all_rows.momentum_buffers is not None:
                for index, momentum in zip(indices, momentums, strict=True):
                    all_rows.momentum_buffers[index] = momentum

        self._for_torch.append(step)
        # These steps run before the kernels, which may well reach the shadows.
        tracked = [k for k, shadow in enumerate(rows.shadows or ()) if shadow is not None]
        averages = rows.take(tracked)
        self._add(averages._replace(grads=None, momentum_buffers=None), None, first=False)

    def _average_by_torch(self, rows: Rows) -> None:
        averages, shadows = self._averages, rows.shadows
        decays = None if averages is None else averages.on_host()
        if averages is None or shadows is None or decays is None:
            return
        copied = [averages.copies(param) for param in rows.params]

        def step(_: Tensor | None) -> None:
            values = _composite.Refined(rows.params, rows.refinements).values
            rounding = None if rows.rounding is None else rows.rounding.on_host()
            for k, decay in enumerate(decays):
                _composite.ema_update_(
                    [None if shadow is None else all_shadows(shadow)[k] for shadow in shadows],
                    values,
                    [0.0 if copy else decay for copy in copied],
                    rounding,
                    shadow_stream(k),
                )

        self._for_torch.append(step)

    def _check_for_torch(self, row: Rows, hyper: SgdHyper | None) -> None:
        """Raises now what torch would raise only after other tensors have changed."""
        param = row.params[0]
        if not (param.is_complex() or param.dtype in _DTYPES):
            raise ValueError(
                f"{self._subject('params', param)}: expected a complex dtype or one of "
                f"{', '.join(map(str, _DTYPES))}, got {param.dtype}"
            )
        if hyper is not None and hyper.state_dtype is not None and param.is_complex():
            raise ValueError(
                f"{self._subject('params', param)}: expected state_dtype None with a complex "
                f"parameter, got {hyper.state_dtype}"
            )
        for name, tensor in _beside_param(row):
            for what in ("device", "shape"):
                expected, found = getattr(param, what), getattr(tensor, what)
                if expected != found:
                    raise ValueError(
                        f"{self._subject(name, param)}: expected {what} {expected} like the "
                        f"parameter, got {found}"
                    )
        sparse = row.grads is not None and row.grads[0].is_sparse
        if not sparse or hyper is None or hyper.decoupled_weight_decay:
            return
        if hyper.weight_decay != 0:
            raise RuntimeError(
                f"{self._subject('grads', param)}: expected weight_decay 0 with a sparse "
                f"gradient, got {hyper.weight_decay}"
            )

    def _checked(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except self._module.RowError as error:
            kind, param, stream, message = error.args
            subject = self._subject(_stream_name(stream), param)
        raise kind(f"{subject}: {message}")


def _stream_name(stream: int) -> str:
    """What a stream is called in errors, by its number in the native module."""
    beyond = stream - len(_STREAMS)
    return _STREAMS[stream] if beyond < 0 else f"averages[{beyond + 1}]"


def _beside_param(row: Rows) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a row but the parameter, and what they are called."""
    for name, stream in zip(_STREAMS[1:], row[1 : len(_STREAMS)], strict=True):
        if stream is None or stream[0] is None:
            continue
        tensors: Any = stream[0]
        if name != "shadows":
            yield name, tensors
            continue
        for k, shadow in enumerate(all_shadows(tensors)):
            yield _stream_name(shadow_stream(k)), shadow


def new_momentum(param: Tensor, hyper: SgdHyper) -> Tensor:
    """The momentum before a parameter's first step.

    With -0.0, momentum * buffer + g is g to the last bit, also where g is -0.0.
    """
    dtype = hyper.momentum_dtype(param)
    return torch.full_like(param, -0.0, dtype=dtype, requires_grad=False)


def _device_of(index: int) -> torch.device:
    return torch.device("cpu") if index == CPU else torch.device("cuda", index)


def _index_of(device: torch.device) -> int:
    return CPU if device.type == "cpu" else device.index


class _Local(threading.local):
    """A plan for each thread: it remembers what it has checked from one call to the next."""

    plan: Plan | None = None


_local = _Local()


@contextmanager
def thread_plan(params: Sequence[Tensor]) -> Iterator[Plan]:
    """The thread's plan, cleared before and after: it must not keep the caller's tensors."""

    def subject(stream: str, param: Tensor) -> str:
        return next(f"{stream}[{i}]" for i, other in enumerate(params) if other is param)

    plan = _local.plan = _local.plan or Plan()
    plan.clear(subject)
    try:
        yield plan
    finally:
        plan.clear(subject)
