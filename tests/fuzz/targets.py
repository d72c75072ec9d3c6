"""What is fuzzed: loading damaged states, and calling the native module with any arguments.

A target gets bytes. It raises Broken where a promise is not kept; any exception of the code under
test that is not among EXPECTED is a fault too, and so is a crash.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from reference import assert_same_bits
from torch import Tensor, nn

import fused_opt
from fused_opt import _C, EMA, SGD, schedules
from fuzz.source import THINGS, Odd, OddError, Source, damaged, tensor, thing

#: What loading a state may raise. torch's own loading has no words for most damages, and raises
#: what its code runs into: so any of Python's errors for a wrong value, type or key.
EXPECTED = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError)
#: And the arithmetic of numbers that are out of range, and what `Odd` raises.
EXPECTED += (OverflowError, NotImplementedError, OddError)

Target = Callable[[bytes], None]

#: What has been done over all inputs.
COUNTS: dict[str, int] = {}


def count(what: str) -> None:
    COUNTS[what] = COUNTS.get(what, 0) + 1


class Broken(Exception):
    """A promise that is not kept; no error that a user would see."""


# --- states ---------------------------------------------------------------------------------------


def sgd_state(data: bytes) -> None:
    """A damaged checkpoint of the optimizer loads and steps, or changes nothing."""
    source = Source(data)
    optimizer, params = _optimizer(source)
    state = damaged(source, copy.deepcopy(optimizer.state_dict()))
    held = partial(_of_optimizer, optimizer)
    with _quiet():
        if not _done("sgd_state", held, lambda: optimizer.load_state_dict(state)):
            return
        for param in params:
            param.grad = torch.ones_like(param)
        _done("step", held, optimizer.step)


def _done(what: str, held: Callable[[], Any], call: Callable[[], object]) -> bool:
    """Whether a call did not raise; if it did, what is held must be as it was."""
    before = held()
    try:
        call()
    except EXPECTED as error:
        count(f"{what} refused: {type(error).__name__}")
        _require_same(before, held())
        return False
    count(f"{what} done")
    return True


def _optimizer(source: Source) -> tuple[SGD, list[nn.Parameter]]:
    """One that has taken a step."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [nn.Parameter(torch.ones(3, 2, dtype=source.choice(dtypes))) for _ in range(3)]
    momentum = source.choice((0.9, 0.0))
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    optimizer = SGD(
        groups,
        lr=0.1,
        momentum=momentum,
        formulation=source.choice(("torch", "sutskever")),
        master_weights=source.choice((None, "fp32", "split", "kahan")),
        stochastic_rounding=source.chance(30),
        max_grad_norm=source.choice((None, 1.0)),
        capturable=source.chance(30),
        ema=EMA(params, 0.5) if source.chance(30) else None,
    )
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer, params


def _of_optimizer(optimizer: SGD) -> list[Any]:
    """Everything that it holds, copied."""
    groups = optimizer.param_groups
    found: list[Any] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    for group in groups:
        for param in group["params"]:
            found += [param, optimizer.state.get(param, {})]
    if optimizer.ema is not None:
        found += [optimizer.ema.num_steps, list(optimizer.ema.shadows.values())]
    return _kept(found)  # type: ignore[no-any-return]


EMA_FORMATS = (None, "torch_ema", "diffusers", "averaged_model", "timm", "ema_pytorch")


def ema_state(data: bytes) -> None:
    """A damaged state of an average, in any format, loads and updates, or changes nothing."""
    source = Source(data)
    ema = _average(source)
    name = source.choice(EMA_FORMATS)
    with _quiet():
        try:
            state = ema.state_dict() if name is None else ema.export_state_dict(name)
        except ValueError:  # the format has no words for the decay
            return
    if ema._applied is not None:
        ema.restore()
    state = damaged(source, state)
    held = partial(_of_average, ema)
    with _quiet():
        if not _done("ema_state", held, lambda: ema.load_state_dict(state)):
            return
        if ema._applied is not None:
            ema.restore()
        ema.update()
        ema.state_dict()


def _average(source: Source) -> EMA:
    """One of a model with a buffer, after two updates."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1).bfloat16())
    one: Any = source.choice(
        (0.9, schedules.tf_warmup(0.9, offset=1), schedules.inverse_power(0.9), schedules.equal())
    )
    decay = [one, 0.5] if source.chance(30) else one
    ema = EMA(
        model,
        decay,
        buffers=source.choice(("copy", "average", "ignore")),
        update_every=source.choice((1, 2)),
        update_after_step=source.choice((0, 3)),
    )
    ema.update()
    ema.update()
    if source.chance(30):
        ema.apply_shadow()
    return ema


def _of_average(ema: EMA) -> list[Any]:
    """Everything that it holds and follows, copied."""
    source: Any = ema._source
    found = [ema.num_steps, ema._update_every, ema._update_after_step, ema._applied, ema._origin]
    found += [ema._decays, ema._kept.tensors, list(source.state_dict().values()), ema._backup]
    return _kept(found)  # type: ignore[no-any-return]


def scaler_state(data: bytes) -> None:
    """A damaged state of the scaler loads or raises; what torch's code then holds is torch's."""
    source = Source(data)
    scaler = fused_opt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    with _quiet():
        try:
            scaler.load_state_dict(damaged(source, scaler.state_dict()))
        except EXPECTED as error:
            count(f"scaler_state refused: {type(error).__name__}")
            return
        count("scaler_state done")
        optimizer, params = _optimizer(source)
        for param in params:
            param.grad = torch.ones_like(param)
        _done("scaled step", partial(_of_optimizer, optimizer), lambda: scaler.step(optimizer))


SCHEDULES = (
    schedules.constant(0.9),
    schedules.tf_warmup(0.9, 0.1, 1),
    schedules.inverse_power(0.9),
    schedules.exponential_ramp(0.9),
    schedules.half_life(3.0),
    schedules.equal(),
    schedules.zero_debias(0.9),
    schedules.cosine(0.9, 10),
)


def schedule_state(data: bytes) -> None:
    """The dict of a schedule makes one that can be called, or raises ValueError or TypeError."""
    source = Source(data)
    state = damaged(source, source.choice(SCHEDULES).to_dict())
    try:
        schedule = schedules.Schedule.from_dict(state)
    except (ValueError, TypeError) as error:
        count(f"schedule_state refused: {type(error).__name__}")
        return
    count("schedule_state done")
    for k in (0, 1, source.below(2**20), 2**62):
        value = schedule(k)
        if not isinstance(value, float) or not (0.0 <= value <= 1.0):
            raise Broken(f"{schedule} is {value!r} at {k}")
    if schedules.Schedule.from_dict(schedule.to_dict()) != schedule:
        raise Broken(f"{schedule} does not survive")


# --- the native module ----------------------------------------------------------------------------


def binding(data: bytes) -> None:
    """Calls of the native module with any arguments raise Python's errors at most.

    Addresses are those of memory that is there: the native code cannot tell others, and only
    _plan.py passes them.
    """
    source = Source(data, frees=True)
    with _quiet():
        caller = _Caller(source)
        for _ in range(1 + source.below(8)):
            caller.call()


class _Caller:
    """A plan, and what is needed to call it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.plan = _C.Plan()
        self.memory = torch.zeros(4096, dtype=torch.float64)
        self.kept: list[Any] = []  # alive until all is over, as the contract of addresses asks
        self.averages = 0

    def call(self) -> None:
        name = self.source.choice(_CALLS)
        arguments = getattr(self, f"_{name}")()
        call = getattr(self.plan if hasattr(self.plan, name) else _C, name)
        for i in range(len(arguments)):
            if i not in _ADDRESSES.get(name, ()) and self.source.chance(12):
                arguments[i] = thing(self.source)
        if self.source.chance(5):
            arguments = arguments[:-1] if self.source.chance(50) else [*arguments, None]
            if name in _ADDRESSES:
                return
        self.kept.append(arguments)
        try:
            found = call(*arguments)
        except (*EXPECTED, _C.RowError, _C.CudaError, MemoryError) as error:
            count(f"{name} refused: {type(error).__name__}")
        else:
            self.kept.append(found)
            count(f"{name} done")

    def _rows(self, least: int = 0) -> list[Tensor]:
        return [tensor(self.source) for _ in range(least + self.source.below(4))]

    def _beside(self, params: list[Tensor]) -> Any:
        """A list of what fits mostly, or None."""
        source = self.source
        if source.chance(25):
            return None
        return [
            tensor(source) if source.chance(20) else _ones(p)
            for p in params
            if not source.chance(3)
        ]

    def _group(self) -> Any:
        source = self.source
        arguments = {
            name: source.choice((0.0, 0.5, 1.0)) if not source.chance(10) else thing(source, 0)
            for name in ("lr", "momentum", "dampening", "weight_decay", "grad_scale")
        }
        flags = ("nesterov", "maximize", "decoupled_weight_decay", "sutskever", "reset_grads")
        arguments |= {name: source.chance(30) for name in flags}
        arguments["rounding"] = (source.below(9), source.below(9)) if source.chance(30) else None
        try:
            return _C.Group(**arguments, tensors=source.below(3) - 1)
        except EXPECTED:
            return _C.Group()

    def _clear(self) -> list[Any]:
        self.averages = 0
        return []

    def _set_averages(self) -> list[Any]:
        self.averages = 1 + self.source.below(3)
        after = self.source.below(3)
        frozen: frozenset[Any] = frozenset()
        return [[0.5] * self.averages, self.source.below(9), 1 + after, after, frozen]

    def _set_frozen(self) -> list[Any]:
        return [frozenset(self._rows())]

    def _set_schedule(self) -> list[Any]:
        return [self.source.below(3), self.source.below(12) - 1, [0.5] * self.source.below(6)]

    def _shadow(self, param: Tensor) -> Any:
        shadows = [_ones(param) for _ in range(max(1, self.averages))]
        return tuple(shadows) if len(shadows) > 1 else shadows[0]

    def _add_param_group(self) -> list[Any]:
        source, params = self.source, [p for p in self._rows(1) if not isinstance(p, Odd)]
        with torch.no_grad():
            for i, param in enumerate(params):
                if param.is_leaf and not source.chance(20):
                    params[i] = nn.Parameter(param, False)
                    with suppress(RuntimeError, TypeError):  # torch refuses most that do not fit
                        params[i].grad = _like(params[i], source)
        state = {p: {"m": _like(p, source), "r": thing(source, 0)} for p in params}
        if source.chance(10):
            state = {p: source.choice(THINGS)(source) for p in params}
        shadows = {p: self._shadow(p) for p in params} if source.chance(40) else None
        keys = [source.choice(("m", None)), source.choice((None, "r"))]
        return [params, state, *keys, shadows, source.below(5), self._group()]

    def _add(self) -> list[Any]:
        params, source = self._rows(1), self.source
        has_shadows = source.chance(50 if self.averages else 5)
        shadows = [self._shadow(p) for p in params] if has_shadows else None
        refinements = self._beside(params) if source.chance(10) else None  # of half types alone
        ordinals = list(range(len(params))) if source.chance(50) else None
        beside = [self._beside(params), self._beside(params)]
        return [params, *beside, shadows, refinements, ordinals, self._group(), False]

    def _add_grads(self) -> list[Any]:
        return [self._rows(), False]

    def _untouched(self) -> list[Any]:
        return [{p: self._shadow(p) for p in self._rows()}]

    def _none(self) -> list[Any]:
        return []

    _check = _written = _devices = _none

    def _device(self) -> int:
        # Where there is a GPU, an address below is none of its memory.
        if torch.cuda.is_available() or not self.source.chance(20):
            return -1
        return self.source.below(3) - 1

    def _norm_chunks(self) -> list[Any]:
        return [self._device()]

    _memory_bytes = _norm_chunks

    def _threads(self) -> int:
        return self.source.below(6) - 1

    def _grad_norm(self) -> list[Any]:
        return [self._device(), self._threads(), _C.ClipHyper(max_norm=1.0), self.memory.data_ptr()]

    def _scale_grads(self) -> list[Any]:
        return [self._device(), self._threads(), 0.5, self.memory.data_ptr()]

    def _set_scalar(self) -> list[Any]:
        which = self.source.below(9) - 1
        return [self.source.below(4) - 1, which, self.memory.data_ptr(), self.source.chance(50)]

    def _set_decay(self) -> list[Any]:
        return [self.source.below(5) - 1, self.memory.data_ptr(), self.source.chance(50)]

    def _set_average_steps(self) -> list[Any]:
        return [self.memory.data_ptr() if self.source.chance(50) else 0]

    _set_rounding_steps = _set_average_steps

    def _set_gate(self) -> list[Any]:
        counters = [self.memory[i:].data_ptr() for i in range(self.source.below(3))]
        return [self.memory.data_ptr() if self.source.chance(50) else 0, counters]

    def _run(self) -> list[Any]:
        return [self._device(), self._threads(), 0]

    def _host_job(self) -> list[Any]:
        return [self._threads()]

    def _streams(self) -> list[Any]:
        params = self._rows(1)
        streams = [params, *(self._beside(params) for _ in range(self.source.below(9)))]
        return [source_list for source_list in streams if not self.source.chance(3)]

    def _hypers(self) -> list[Any]:
        numbers = (0.5, 0, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64), 10**400)
        return [
            (*(self.source.choice(numbers) for _ in range(4)), self.source.chance(50))
            for _ in range(1 + self.source.below(3))
        ]

    def _fit_pass(self) -> list[Any]:
        return [self._streams(), self._hypers()]

    def _run_pass(self) -> list[Any]:
        source, streams, hypers = self.source, self._streams(), self._hypers()
        hyper_of = None
        if source.chance(50) and streams:
            hyper_of = [source.below(len(hypers) + 1) for _ in streams[0] or ()]
        sums = self.memory.data_ptr() if source.chance(50) else 0
        flags = [source.chance(50), source.chance(50)]
        kind = source.below(6) - 1
        return [kind, streams, hyper_of, hypers, *flags, source.below(9), self._threads(), sums]

    def _evaluate_schedule(self) -> list[Any]:
        source = self.source
        parameters = [source.double() for _ in range(source.below(6))]
        return [source.below(12) - 1, parameters, source.choice((0, 1, -1, 2**63 - 1, 2**63))]

    def _set_cpu_isa(self) -> list[Any]:
        return [self.source.choice((*_C.cpu_isas(), "", "avx9000"))]


def _ones(param: Tensor) -> Tensor:
    """A plain tensor of the shape, strides and dtype, as far as the parameter has them."""
    if param.layout == torch.strided and not param.is_nested:
        return torch.ones_like(param)
    return torch.ones(3 if param.is_nested else param.shape, dtype=param.dtype)


def _like(param: Tensor, source: Source) -> Any:
    """A plain tensor of the shape, or anything."""
    return tensor(source) if source.chance(15) else _ones(param)


#: The arguments that are addresses, which are never damaged.
_ADDRESSES: dict[str, tuple[int, ...]] = {
    "grad_norm": (1, 3),
    "scale_grads": (1, 3),
    "set_scalar": (2,),
    "set_decay": (1,),
    "set_average_steps": (0,),
    "set_rounding_steps": (0,),
    "set_gate": (0, 1),
    "run": (1, 2),
    "host_job": (0,),
    "run_pass": (7, 8),
}
_CALLS = (
    "add_param_group",
    "add",
    "add",
    "run",
    "check",
    "set_averages",
    "add_grads",
    "grad_norm",
    "clear",
    "run_pass",
    "fit_pass",
    "untouched",
    "written",
    "devices",
    "norm_chunks",
    "memory_bytes",
    "scale_grads",
    "set_scalar",
    "set_decay",
    "set_schedule",
    "set_frozen",
    "set_average_steps",
    "set_rounding_steps",
    "set_gate",
    "host_job",
    "evaluate_schedule",
    "set_cpu_isa",
)

TARGETS: dict[str, Target] = {
    "sgd_state": sgd_state,
    "ema_state": ema_state,
    "scaler_state": scaler_state,
    "schedule_state": schedule_state,
    "binding": binding,
}


# --- comparing ------------------------------------------------------------------------------------


def _kept(value: Any) -> Any:
    """A copy down to the tensors, which are cloned; other objects are themselves."""
    if isinstance(value, Tensor):
        try:
            return value.detach().clone()
        except (RuntimeError, NotImplementedError):
            return value
    if isinstance(value, dict):
        return {key: _kept(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_kept(entry) for entry in value]
    return value


def _require_same(before: Any, after: Any, where: str = "") -> None:
    """Raises Broken unless two that were kept are the same."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.layout == torch.strided and before.device.type == "cpu" and not before.is_nested:
            try:
                assert_same_bits(after, before, where)
            except AssertionError as error:
                raise Broken(f"changed: {error}") from error
        return
    if type(before) is not type(after):
        raise Broken(f"{where}: {before!r} became {after!r}")
    if isinstance(before, dict):
        if before.keys() != after.keys():
            raise Broken(f"{where}: {list(before)} became {list(after)}")
        for key in before:
            _require_same(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list):
        if len(before) != len(after):
            raise Broken(f"{where}: {len(before)} became {len(after)}")
        for i, (one, two) in enumerate(zip(before, after, strict=True)):
            _require_same(one, two, f"{where}/{i}")
    elif before is not after and before == before and before != after:
        raise Broken(f"{where}: {before!r} became {after!r}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch has for odd tensors; the ISA is put back."""
    level = _C.cpu_isa()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            _C.set_cpu_isa(level)
