"""The one door to the native code: what a step updates is added, checked, and then run.

A plan is used in this order, once per step: ``clear``, the ``add`` functions, ``run``. Nothing is
changed before ``run`` has found no fault.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_opt import _composite, _rounding
from fused_opt._hyper import ClipHyper, SgdHyper, as_scalar
from fused_opt._native import native
from fused_opt._rounding import Rounding

_STREAMS = ("params", "grads", "momentum_buffers", "shadows", "refinements")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CPU = -1  # as a device index


class Rows(NamedTuple):
    """Parallel lists. None stands for a stream no row has, and inside one for a row without it.

    Without ``rounding`` all results are rounded to nearest.
    """

    params: list[Tensor]
    grads: list[Tensor] | None
    momentum_buffers: list[Tensor | None] | None
    shadows: list[Tensor | None] | None
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


class Plan:
    """The tensors of one step, from optimizer state or lists to one launch per device."""

    def __init__(self) -> None:
        self._module = native()
        self._native = self._module.Plan()
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
        self._for_torch: list[Callable[[Tensor | None], None]] = []
        self._torch_grads: list[Tensor] = []  # that no kernel reaches

    def add_param_group(
        self,
        params: list[Tensor],
        state: dict[Tensor, Any],
        shadows: dict[Tensor, Tensor] | None,
        hyper: SgdHyper,
        decay: float,
        rounding: Rounding | None = None,
    ) -> Rows:
        """Adds the parameters of a group that have a gradient, and their shadows.

        ``rounding`` holds the ordinals of all parameters of the group, which follow each other.

        Returns:
            Those that were not added, because ``state`` does not hold all of theirs yet.
        """
        group = self._group(params, hyper, decay, rounding)
        first_ordinal = rounding.ordinals[0] if rounding is not None and params else 0
        fresh, refused, for_torch, scattered = self._checked(
            self._native.add_param_group,
            params,
            state,
            hyper.state_key,
            hyper.refinement_key,
            shadows,
            first_ordinal,
            group,
        )

        def rows(found: Any) -> Rows:
            ordinals = found[len(_STREAMS)]
            own = None if rounding is None else rounding._replace(ordinals=ordinals)
            return Rows(*found[: len(_STREAMS)])._replace(rounding=own)

        if for_torch or scattered:
            self._add_refused(rows(refused), for_torch, scattered, group, hyper, decay, False)
        return rows(fresh)

    def add_sgd(self, rows: Rows, hyper: SgdHyper, decay: float) -> None:
        """Adds momentum SGD on rows that have all their momentum, and the EMA of their shadows."""
        self._add(rows, hyper, decay, first=False)

    def add_first_sgd(self, rows: Rows, hyper: SgdHyper, decay: float) -> None:
        """Adds the first step of rows, which is not dampened.

        ``rows.momentum_buffers`` holds None everywhere; after ``run``, the new momentum.
        """
        if rows.momentum_buffers is not None:
            # With -0.0, momentum * buffer + g is g to the last bit, also where g is -0.0.
            rows.momentum_buffers[:] = [
                torch.full_like(param, -0.0, dtype=hyper.momentum_dtype(param), requires_grad=False)
                if isinstance(param, Tensor)
                else None  # refused below
                for param in rows.params
            ]
        self._add(rows, hyper._replace(dampening=0.0), decay, first=True)

    def add_ema(
        self,
        params: list[Tensor],
        shadows: list[Tensor],
        decay: float,
        refinements: list[Tensor | None] | None = None,
    ) -> None:
        """Adds the EMA of parameters that this step does not change."""
        self._add(Rows(params, None, None, list(shadows), refinements), None, decay, first=False)

    def add_remaining_ema(
        self,
        shadows: dict[Tensor, Tensor],
        decay: float,
        refinement: Callable[[Tensor], Tensor | None] = lambda _: None,
        roundings: Callable[[], dict[Tensor, Rounding]] = dict,
    ) -> None:
        """Adds the EMA of all parameters that were not added with their shadow.

        Args:
            shadows: every shadow, by its parameter.
            decay: of the EMA.
            refinement: what refines a parameter, if anything does.
            roundings: the parameters whose shadows are rounded stochastically, with the rounding of
                each; called where there are shadows to add.
        """
        params, left = self._native.untouched(shadows)
        if not params:
            return
        rows = Rows(params, None, None, list(left), [refinement(param) for param in params])
        found = roundings()
        alike: dict[tuple[int, int] | None, list[int]] = {}
        for i, param in enumerate(params):
            own = found.get(param)
            alike.setdefault(None if own is None else (own.seed, own.step), []).append(i)
        for key, indices in alike.items():
            some = rows.take(indices)
            if key is not None:
                ordinals = [found[param].ordinals[0] for param in some.params]
                some = some._replace(rounding=Rounding(*key, ordinals))
            self._add(some, None, decay, first=False)

    def run_ema(
        self,
        shadows: dict[Tensor, Tensor],
        decay: float,
        subject: Callable[[str, Tensor], str],
    ) -> None:
        """A whole step that updates averages alone."""
        self.clear(subject)
        try:
            self.add_remaining_ema(shadows, decay)
            self.run()
        finally:
            self.clear(subject)

    def add_grads(self, grads: list[Tensor]) -> None:
        """Adds gradients that no step reads: for ``grad_norm`` and ``scale_grads``."""
        for_torch, scattered = self._checked(self._native.add_grads, grads, False)
        self._torch_grads += [grads[i] for i in for_torch]
        copies = [torch.empty_like(grads[i], requires_grad=False) for i in scattered]
        self._checked(self._native.add_grads, copies, True)
        self._copies += [(grads[i], c, True) for i, c in zip(scattered, copies, strict=True)]

    def grad_norm(
        self, hyper: ClipHyper, home: torch.device, scratch: dict[int, Tensor] | None = None
    ) -> Clip:
        """The norm of all gradients that were added. Changes nothing.

        Args:
            hyper: which norm, and by what it clips.
            home: where the result is.
            scratch: device memory, to be used again by the next call.
        """
        self._fill_copies()
        scratch = {} if scratch is None else scratch
        found, dtype = [], torch.float32
        for device in self._native.devices():
            chunks, has_float64 = self._native.norm_chunks(device)
            if chunks:
                found.append(self._norm_on(device, chunks, hyper, scratch))
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

    def _norm_on(
        self, device: int, chunks: int, hyper: ClipHyper, scratch: dict[int, Tensor]
    ) -> Tensor:
        """The norm and the coefficient, as if the gradients of a device were all there are."""
        size = 2 if device == _CPU else 2 + chunks
        memory = scratch.get(device)
        if memory is None or memory.numel() < size:
            where = torch.device("cpu") if device == _CPU else torch.device("cuda", device)
            memory = scratch[device] = torch.empty(size, dtype=torch.float64, device=where)
        native_hyper = self._module.ClipHyper(**hyper._asdict())
        self._launch(device, self._native.grad_norm, native_hyper, memory.data_ptr())
        return memory

    def check(self) -> None:
        """Checks what can only be checked on the whole.

        Raises:
            ValueError: tensors share memory.
            RuntimeError: CUDA tensors, and the module has no code for their device.
        """
        self._checked(self._native.check)
        if self._module.cuda_version is not None:
            return
        on_gpu = [device for device in self._native.devices() if device != _CPU]
        if on_gpu:
            raise RuntimeError(
                "the parameters are on CUDA, and fused_opt was built without CUDA kernels. Rebuild "
                f"it where there is an nvcc, 12.1 or newer: {_rebuild_command(on_gpu[0])}"
            )

    def run(self, clip: Clip | None = None) -> None:
        """Updates everything, with clipped gradients if asked; raises as :meth:`check` does."""
        self.check()
        increment_version(self._native.written())
        for step in self._for_torch:
            step(None if clip is None else clip.coefficient)
        self._fill_copies()
        for device in self._native.devices():
            if clip is not None:
                self._native.set_clip(*self._coefficient_on(device, clip))
            self._launch(device, self._native.run)
        self._write_copies()

    def scale_grads(self, clip: Clip) -> None:
        """Multiplies all gradients that were added; to be called after :meth:`check`."""
        increment_version(self._native.written())
        for grad in self._torch_grads:
            grad.mul_(clip.coefficient.to(grad.device))
        for device in self._native.devices():
            self._launch(device, self._native.scale_grads, *self._coefficient_on(device, clip))
        self._write_copies()

    def _coefficient_on(self, device: int, clip: Clip) -> tuple[float, int]:
        """The number for the CPU, an address for a GPU, where it is not waited for."""
        if device == _CPU:
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

    def _launch(self, device: int, call: Callable[..., None], *args: Any) -> None:
        """Runs native code on a device."""
        if device == _CPU:
            return call(device, torch.get_num_threads(), *args)
        try:
            with torch.cuda.device(device):
                call(device, 1, *args)
        except self._module.CudaError as error:
            code, message = error.args
            raise RuntimeError(f"{message}. {cuda_advice(code, device)}") from None

    def _add(self, rows: Rows, hyper: SgdHyper | None, decay: float, first: bool) -> None:
        if not rows.params:
            return
        group = self._group(rows.params, hyper, decay, rows.rounding)
        for_torch, scattered = self._checked(self._native.add, *rows.offered, group, False)
        if for_torch or scattered:
            self._add_refused(rows, for_torch, scattered, group, hyper, decay, first)

    def _add_refused(
        self,
        rows: Rows,
        for_torch: list[int],
        scattered: list[int],
        group: Any,
        hyper: SgdHyper | None,
        decay: float,
        first: bool,
    ) -> None:
        """Adds rows that the kernels do not take as they are: as copies, or to be run by torch."""
        if scattered:
            copies = self._dense_copies(rows.take(scattered), hyper)
            self._checked(self._native.add, *copies.offered, group, True)
        if for_torch:
            self._add_for_torch(rows, for_torch, hyper, decay, first)

    def _group(
        self,
        params: list[Tensor],
        hyper: SgdHyper | None,
        decay: float,
        rounding: Rounding | None,
    ) -> Any:
        seed_and_step = None if rounding is None else (rounding.seed, rounding.step)
        if hyper is None:
            return self._module.Group(decay=decay, rounding=seed_and_step)
        lr, device_lr = self._learning_rate(hyper.lr, params)
        return self._module.Group(
            lr=lr,
            momentum=float(hyper.momentum),
            dampening=float(hyper.dampening),
            weight_decay=float(hyper.weight_decay),
            grad_scale=hyper.grad_scale,
            nesterov=hyper.nesterov,
            maximize=hyper.maximize,
            decoupled_weight_decay=hyper.decoupled_weight_decay,
            sutskever=hyper.formulation == "sutskever",
            reset_grads=hyper.reset_grads,
            decay=decay,
            device_lr=device_lr,
            rounding=seed_and_step,
        )

    def _learning_rate(self, lr: float | Tensor, params: list[Tensor]) -> tuple[float, int]:
        """The number, or the address of an fp64 scalar: on the parameters' GPU it is not read."""
        lr = as_scalar(lr, "lr")
        if isinstance(lr, Tensor) and lr.is_cuda and all(p.device == lr.device for p in params):
            scalar = lr.detach().to(torch.float64)
            self._scalars.append(scalar)
            return 0.0, scalar.data_ptr()
        return float(lr), 0

    def _dense_copies(self, rows: Rows, hyper: SgdHyper | None) -> Rows:
        """Replaces tensors so that each row has one dense order: its parameter's, if that is dense.

        ``run`` fills them, and copies back what the step writes.
        """

        def dense(stream: list[Any] | None, written: bool) -> list[Any] | None:
            if stream is None:
                return None
            replaced: list[Any] = []
            for tensor, param in zip(stream, rows.params, strict=True):
                order = torch.empty_like(param, requires_grad=False)
                if isinstance(tensor, Tensor) and tensor.stride() != order.stride():
                    copy = torch.empty_like(order, dtype=tensor.dtype)
                    self._copies.append((tensor, copy, written))
                    replaced.append(copy)
                else:
                    replaced.append(tensor)
            return replaced

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
        self, all_rows: Rows, indices: list[int], hyper: SgdHyper | None, decay: float, first: bool
    ) -> None:
        rows = all_rows.take(indices)
        for k in range(len(indices)):
            self._check_for_torch(rows.take([k]), hyper)
        if hyper is None:
            self._for_torch.append(
                lambda _: _composite.ema_update_(
                    rows.shadows or [],
                    _composite.Refined(rows.params, rows.refinements).values,
                    decay,
                    rows.rounding,
                )
            )
            return

        self._torch_grads += rows.grads or []

        def step(clip: Tensor | None) -> None:
            momentums = [] if rows.momentum_buffers is None else rows.momentum_buffers
            if first:
                momentums[:] = [None] * len(momentums)  # a sparse gradient has a sparse one
            rounding = rows.rounding
            refined = _composite.Refined(rows.params, rows.refinements, rounding)
            wide = _rounding.widened(momentums, rounding)
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
        self._add(averages._replace(grads=None, momentum_buffers=None), None, decay, first=False)

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
        for name, stream in zip(_STREAMS[1:], row[1 : len(_STREAMS)], strict=True):
            tensor = None if stream is None else stream[0]
            if tensor is None:
                continue
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
            subject = self._subject(_STREAMS[stream], param)
        raise kind(f"{subject}: {message}")


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


def cuda_advice(code: int, device: int = 0) -> str:
    """What to do about a ``cudaError_t`` that a step on a GPU has met."""
    # Imported where there is an error to explain, to keep the import of fused_opt short.
    from fused_opt._doctor_findings import oldest_driver

    cuda = native().cuda_version or "12.1"
    release, branch = oldest_driver(cuda)
    driver = f"{branch or 'one'} (CUDA {release})"
    advice = _CUDA_ADVICE.get(code, "The CUDA runtime's documentation describes this error.")
    advice = advice.format(cuda=cuda, driver=driver)
    if code not in _WITHOUT_CODE:
        return advice
    return f"{_code_for_gpu(device)}. {advice}: {_rebuild_command(device)}"


def _code_for_gpu(device: int) -> str:
    """What a GPU is, and what the module has for it to run."""
    from fused_opt._doctor_facts import code

    built = native()
    gpu = f"cuda:{device} is of an unknown architecture"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        gpu = f"{name} (cuda:{device}) is of architecture {_arch(device)}"
    has = code(built.cuda_archs, built.ptx_archs)
    return f"{gpu}, and fused_opt was built with {has}, none of which runs there"


def _rebuild_command(device: int) -> str:
    """The command that builds the module for a GPU."""
    from fused_opt._doctor_findings import build_command, source_tree

    return build_command(source_tree(), [_arch(device)] if torch.cuda.is_available() else [])


def _arch(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_WITHOUT_CODE = (209, 222)  # The GPU is named before the advice, the command that builds after it.
_DOCTOR = "`python -m fused_opt.doctor` shows what is there"
_CUDA_ADVICE = {
    3: (  # cudaErrorInitializationError
        "The process was forked after CUDA had been used, which CUDA does not survive. Start "
        "workers with multiprocessing's 'spawn' or 'forkserver' method."
    ),
    35: (  # cudaErrorInsufficientDriver
        "The NVIDIA driver is too old for this build, made with CUDA {cuda}. Update the driver to "
        "{driver} or newer, or rebuild fused_opt with an older nvcc, 12.1 at the least, named by "
        f"FUSED_OPT_NVCC. {_DOCTOR}."
    ),
    100: (  # cudaErrorNoDevice
        "No GPU is visible. Check nvidia-smi and CUDA_VISIBLE_DEVICES, and in a container that it "
        f"was started with its GPUs. {_DOCTOR}."
    ),
    209: f"{_DOCTOR}. Rebuild it for this GPU",  # cudaErrorNoKernelImageForDevice
    222: (  # cudaErrorUnsupportedPtxVersion
        "The driver is older than CUDA {cuda} and does not understand that PTX. "
        f"{_DOCTOR}. Update the driver, or rebuild with machine code for this GPU"
    ),
    801: (  # cudaErrorNotSupported
        "A driver older than R530 (CUDA 12.1) refuses the kernel parameters above 4 KB of a long "
        f"list of tensors: update it. {_DOCTOR}."
    ),
}
