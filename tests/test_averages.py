"""Several averages in one pass: the bits of as many passes, and decays that a device evaluates.

What counts on a device runs on the CPU too, where the count is a tensor that the kernels read.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import (
    DTYPES,
    HALF_DTYPES,
    assert_all_same_bits,
    assert_ema_update,
    assert_same_bits,
    make_params,
    random_tensor,
    set_gradients,
)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from fused_opt import _C, EMA, SGD, schedules
from fused_opt._averages import Averages, all_shadows
from fused_opt._counter import Counter
from fused_opt._plan import Gate, Plan
from fused_opt._rounding import Rounding, narrow_, shadow_stream
from fused_opt.functional import ema_update_, sgd_step_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F64, F64), (F32, F64), *itertools.product((F32, BF16, F16), (BF16, F16))]
DECAYS = (0.999, 0.25, 0.0, 0.9, 1.0, 0.5, 0.99, 0.75, 0.1)
SIZES = (0, 1, 3, 7, 63, 64, 65, 1000, 8193)
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38, 1e-40]


def subject(stream: str, param: Tensor) -> str:
    return f"{stream} of shape {tuple(param.shape)}"


def run(averages: Averages, gate: Gate | None = None) -> None:
    """One update, as an EMA does it."""
    with torch.no_grad():
        Plan().run_ema(averages, subject, gate)


def shadows_of(params: Iterable[Tensor], count: int, dtype: torch.dtype | None = None) -> Any:
    """Random shadows by their parameter, a tuple where there are several."""
    found: dict[Tensor, Any] = {}
    for i, p in enumerate(params):
        shadows = tuple(
            random_tensor(p.shape, dtype or p.dtype, p.device, seed=500 + 100 * i + k)
            for k in range(count)
        )
        found[p] = shadows if count > 1 else shadows[0]
    return found


def copied(shadows: dict[Tensor, Any]) -> dict[Tensor, Any]:
    return {
        p: tuple(t.clone() for t in s) if isinstance(s, tuple) else s.clone()
        for p, s in shadows.items()
    }


def flat(shadows: dict[Tensor, Any]) -> list[Tensor]:
    return [shadow for each in shadows.values() for shadow in all_shadows(each)]


def column(shadows: dict[Tensor, Any], k: int) -> list[Tensor]:
    return [all_shadows(each)[k] for each in shadows.values()]


class Several(EMA):
    """An EMA of several averages, as far as an optimizer knows one."""

    def __init__(
        self,
        params: Iterable[Tensor],
        decays: tuple[Any, ...],
        dtype: torch.dtype | None = None,
        every: int = 1,
        after: int = 0,
    ) -> None:
        self._updates = Counter("num_updates of the EMA")
        self._kept = SimpleNamespace(is_offloaded=False)
        self.rows = shadows_of(params, len(decays), dtype)
        self.decays, self.every, self.after = decays, every, after
        self.frozen = frozenset(p for p in self.rows if not p.requires_grad)
        self.buffers_copied: list[Gate | None] = []

    def _attach(self, optimizer: SGD) -> None: ...
    def _detach(self) -> None: ...
    def _require_not_applied(self, what: str) -> None: ...

    def _planned_besides(self, averages: Averages, gate: Gate | None, *_: Any) -> Any:
        return partial(self.buffers_copied.append, gate)

    def _averages(self, left_to_device: bool) -> Averages | None:
        steps = self._updates.on_host
        timed = Averages(self.rows, self.decays, steps, None, self.every, self.after, self.frozen)
        if left_to_device:
            count = self._updates.on(next(iter(self.rows)).device)
            return timed._replace(steps=int(self._updates) - int(count), on_device=count)
        decays = timed.on_host()
        if decays is None:
            return None
        return Averages(self.rows, tuple(decays), frozen=self.frozen)

    def update(self) -> None:
        averages = self._averages(left_to_device=False)
        if averages is not None:
            run(averages)
        self._updates.next()()

    @property
    def steps(self) -> int:
        return int(self._updates)


# --- K averages are K passes ---------------------------------------------------------------------


@pytest.mark.parametrize(("shadow_dtype", "dtype"), PAIRS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_averages_have_the_bits_of_one_pass_each(count, shadow_dtype, dtype, device):
    params = [random_tensor((n,), dtype, device, seed=n) for n in SIZES]
    params[5][: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=F64).to(device, dtype)
    shadows = shadows_of(params, count, shadow_dtype)
    before, apart = copied(shadows), copied(shadows)
    run(Averages(shadows, DECAYS[:count]))
    for k in range(count):
        ema_update_(column(apart, k), params, decay=DECAYS[k])
        for p, old, new in zip(params, column(before, k), column(shadows, k), strict=True):
            if p.isfinite().all():
                assert_ema_update(DECAYS[k], old, p, new, f"average {k}")
    assert_all_same_bits(flat(shadows), flat(apart))


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_views_that_are_aligned_differently_have_the_same_bits(dtype, device):
    """Vectors of 16 bytes reach none of these together, or only behind a few elements."""
    numel = 8192 + 40
    for offsets in ((0, 1, 2, 3), (1, 1, 1, 1), (3, 3, 3, 2), (0, 0, 4, 8)):
        memory = [random_tensor((numel + 16,), dtype, device, seed=i) for i in range(4)]
        apart = [m.clone() for m in memory]
        p, *shadows = (m[o : o + numel] for m, o in zip(memory, offsets, strict=True))
        q, *alone = (m[o : o + numel] for m, o in zip(apart, offsets, strict=True))
        run(Averages({p: tuple(shadows)}, (0.9, 0.5, 0.1)))
        for shadow, decay in zip(alone, (0.9, 0.5, 0.1), strict=True):
            ema_update_([shadow], [q], decay=decay)
        assert_all_same_bits(memory, apart)  # and nothing around them has changed


def test_more_tensors_than_a_launch_carries_are_all_averaged(device):
    params = [random_tensor((1 + i % 50,), device=device, seed=i) for i in range(700)]
    shadows = shadows_of(params, 7)
    apart = copied(shadows)
    run(Averages(shadows, DECAYS[:7]))
    for k in range(7):
        ema_update_(column(apart, k), params, decay=DECAYS[k])
    assert_all_same_bits(flat(shadows), flat(apart))


@pytest.mark.parametrize("isa", _C.cpu_isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_cpu_levels_change_no_bit(threads, isa):
    params = [random_tensor((n,), BF16, seed=n) for n in (5, 70_000, 33_333)]
    shadows = shadows_of(params, 3, F32)
    expected = copied(shadows)
    run(Averages(expected, DECAYS[:3]))
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa(isa)
        torch.set_num_threads(threads)
        run(Averages(shadows, DECAYS[:3]))
    finally:
        _C.set_cpu_isa(before)
    assert_all_same_bits(flat(shadows), flat(expected))


MASTERS = [(F32, None), (F64, None), (F16, None), (F16, "fp32"), (F16, "kahan")]
MASTERS += [(BF16, mode) for mode in (None, "fp32", "split", "kahan")]


@pytest.mark.parametrize(("dtype", "master"), MASTERS)
@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_step_has_the_bits_of_a_step_and_an_update(count, dtype, master, device):
    def optimizer(ema: Any) -> SGD:
        options = {"momentum": 0.9, "weight_decay": 0.01, "reset_grads": True}
        return SGD(params, lr=0.1, ema=ema, master_weights=master, **options)

    results = []
    for inside in (True, False):
        params = make_params([(n,) for n in SIZES], dtype, device)
        ema = Several(params, DECAYS[:count], F64 if dtype == F64 else F32)
        opt = optimizer(ema if inside else None)
        for step in range(3):
            set_gradients(params[: 5 + 2 * step], seed=step)
            opt.step()
            if not inside:
                weights = [opt.state[p].get("master", p) if p in opt.state else p for p in params]
                if master == "split":
                    weights = [exact(p, opt.state.get(p, {}).get("residual")) for p in params]
                run(Averages(dict(zip(weights, ema.rows.values(), strict=True)), ema.decays))
        results.append([*params, *flat(ema.rows)])
    assert_all_same_bits(*results)


def exact(param: Tensor, residual: Tensor | None) -> Tensor:
    """A parameter and its residual as the master that they stand for."""
    if residual is None:
        return param.detach()
    bits = (param.detach().view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(F32)


def test_every_shadow_counts_one_version_more():
    params = make_params([(5,), (70,)])
    ema = Several(params, (0.9, 0.5, 0.1))
    optimizer = SGD(params, lr=0.1, ema=ema)
    before = [shadow._version for shadow in flat(ema.rows)]
    set_gradients(params[:1], seed=0)
    optimizer.step()
    assert [shadow._version for shadow in flat(ema.rows)] == [version + 1 for version in before]


# --- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_each_average_rounds_by_numbers_of_its_own(dtype, device):
    """Against the same in torch; where all averages start alike they end apart."""
    numel, rounding = 8193, (7, 3)
    params = make_params([(numel,), (5,)], dtype, device)
    optimizer = SGD(params, lr=0.1, stochastic_rounding=True, rounding_seed=rounding[0])
    optimizer.param_groups[0]["rounding_steps"] = rounding[1]
    optimizer.ema = ema = Several(params, (0.9,) * 4, dtype)
    for p, shadows in ema.rows.items():
        for shadow in shadows:
            shadow.copy_(shadows[0])
        p.grad = torch.zeros_like(p) if p.numel() == numel else None
    expected = copied(ema.rows)
    optimizer.step()  # which changes no parameter
    for k in range(4):
        wide = [shadow.float() for shadow in column(expected, k)]
        ema_update_(wide, params, decay=0.9)
        narrow_(column(expected, k), wide, Rounding(*rounding, range(2)), shadow_stream(k))
    assert_all_same_bits(flat(ema.rows), flat(expected))
    first, *others = ema.rows[params[0]]
    assert all((first != other).any() for other in others)


def test_streams_of_shadows_are_numbered_after_those_of_a_row():
    assert [shadow_stream(k) for k in range(4)] == [3, 5, 6, 7]
    assert shadow_stream(251) == 255  # a key has 8 bits for it


def python_calls(call: Callable[[], object]) -> int:
    """How many functions are called from Python, native ones included."""
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame) if "call" in event else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(entered)


def test_an_update_calls_nothing_per_parameter_from_python(device):
    counts = []
    for parameters in (3, 300):
        ema = EMA(make_params([(4,)] * parameters, device=device), [0.9, 0.5])
        ema.update()
        counts.append(python_calls(ema.update))
    assert counts[0] == counts[1]


# --- frozen parameters ---------------------------------------------------------------------------


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def wrapped(values: Tensor) -> Tensor:
    """Tensors that no kernel reaches."""
    return TwoTensor(values, values.clone())


def plain(tensor: Tensor) -> Tensor:
    """Their values."""
    return tensor.a if isinstance(tensor, TwoTensor) else tensor.detach()


def kinds_of_values(device: torch.device) -> dict[str, Tensor]:
    values = random_tensor((6, 8), device=device, seed=1)
    return {
        "plain": values,
        "with gaps": random_tensor((6, 16), device=device, seed=1)[:, ::2],
        "for torch": wrapped(values),
        "complex": torch.complex(values, values),
    }


@pytest.mark.parametrize("kind", ["plain", "with gaps", "for torch", "complex"])
@pytest.mark.parametrize("count", [1, 3])
def test_shadows_of_frozen_parameters_copy_them(count, kind, device):
    values = kinds_of_values(device)[kind]
    plain(values)[0] = float("inf")
    param = frozen(values)
    shadows = {param: tuple(torch.randn_like(values) for _ in range(count))}
    if count == 1:
        shadows = {param: shadows[param][0]}
    run(Averages(shadows, DECAYS[:count], frozen=frozenset([param])))
    for shadow in all_shadows(shadows[param]):
        assert torch.equal(plain(shadow), plain(values))


@pytest.mark.parametrize("kind", ["plain", "with gaps", "for torch", "complex"])
def test_parameters_and_other_tensors_are_averaged(kind, device):
    """Frozen ones too, if they trained at first; and those that train now, if they did not."""
    values = kinds_of_values(device)[kind]
    known, other = nn.Parameter(values), frozen(torch.ones(1, device=device))
    for tensor in (known, values, frozen(values)):
        shadows = {tensor: tuple(torch.zeros_like(values) for _ in range(3))}
        run(Averages(shadows, (0.0, 0.75, 1.0), frozen=frozenset([known, other])))
        for shadow, weight in zip(shadows[tensor], (1.0, 0.25, 0.0), strict=True):
            assert torch.equal(plain(shadow), plain(values) * weight)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_parameter_may_be_frozen_and_thawed_between_steps(gradient, device):
    """It is copied where it was frozen at first, and is so now."""
    params = make_params([(9,), (70,)], device=device)
    params[0].requires_grad_(False)
    ema = Several(params, (0.5, 0.9))
    optimizer = SGD(params, lr=0.1, ema=ema)
    set_gradients(params if gradient else [], seed=0)
    for first, second in itertools.product((False, True), repeat=2):
        params[0].requires_grad_(first)
        params[1].requires_grad_(second)
        before = copied(ema.rows)
        optimizer.step()
        for k, decay in enumerate((0.5, 0.9)):
            old, new = column(before, k), column(ema.rows, k)
            assert_ema_update(decay, old[1], params[1], new[1])
            if first:
                assert_ema_update(decay, old[0], params[0], new[0])
            else:
                assert_same_bits(new[0], params[0])


@pytest.mark.parametrize("gradient", [False, True])
def test_dense_copies_of_frozen_parameters_are_copied_too(gradient, device):
    """In every group of parameters that have gaps."""
    params = [frozen(random_tensor((6, 16), device=device, seed=i)[:, ::2]) for i in range(3)]
    params.append(nn.Parameter(random_tensor((6, 16), device=device, seed=4)[:, ::2]))
    ema = Several(params, (0.5, 0.9))
    optimizer = SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, ema=ema)
    set_gradients(params if gradient else [], seed=0)
    before = copied(ema.rows)
    optimizer.step()
    for k, decay in enumerate((0.5, 0.9)):
        for param, shadow in zip(params[:3], column(ema.rows, k), strict=False):
            assert_same_bits(shadow, param)
        assert_ema_update(decay, column(before, k)[3], params[3], column(ema.rows, k)[3])


def test_functions_average_frozen_parameters_too(device):
    param, shadow = frozen(torch.ones(5, device=device)), torch.zeros(5, device=device)
    ema_update_([shadow], [param], decay=0.75)
    assert shadow.tolist() == [0.25] * 5
    sgd_step_([param], [torch.zeros_like(param)], [], lr=0.1, shadows=[shadow], decay=0.0)
    assert shadow.tolist() == [1.0] * 5


# --- decays as tensors, steps that are skipped ---------------------------------------------------


def test_decays_may_be_tensors_that_change(device):
    params = make_params([(70,)], device=device)
    decays = (0.5, torch.tensor(0.25, device=device), torch.tensor([0.75], dtype=F64))
    ema = Several(params, decays)
    optimizer = SGD(params, lr=0.1, ema=ema, capturable=True)
    for value in (0.25, 0.125):
        decays[1].fill_(value)
        before = copied(ema.rows)
        set_gradients(params, seed=0)
        optimizer.step()
        for k, decay in enumerate((0.5, value, 0.75)):
            assert_ema_update(decay, column(before, k)[0], params[0], column(ema.rows, k)[0])


@pytest.mark.parametrize("every", [1, 2])
def test_a_skipped_step_changes_no_shadow_and_is_not_counted(every, device):
    params = make_params([(70,), (3,)], device=device)
    ema = Several(params, (0.5, 0.9, schedules.tf_warmup(0.999)), every=every)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, capturable=True)
    optimizer.found_inf = torch.ones((), device=device)
    set_gradients(params[:1], seed=0)
    before = [t.clone() for t in (*params, *flat(ema.rows))]
    for _ in range(3):
        optimizer.step()
        assert_all_same_bits([*params, *flat(ema.rows)], before)
        assert ema.steps == 0
    optimizer.found_inf.zero_()
    optimizer.step()
    assert ema.steps == 1
    assert all((t != old).any() for t, old in zip(flat(ema.rows), before[2:], strict=True))


def test_buffers_are_copied_after_each_step_that_is_taken():
    params = make_params([(3,)])
    ema = Several(params, (0.5,))
    optimizer = SGD(params, lr=0.1, ema=ema)
    set_gradients(params, seed=0)
    optimizer.step()
    assert ema.buffers_copied == [None]
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert ema.buffers_copied == [None]
    del optimizer.found_inf
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    assert isinstance(ema.buffers_copied[-1], Gate)


# --- which steps are due, and schedules ----------------------------------------------------------


def decay_at(t: int, every: int, after: int, decay: Any) -> float | None:
    """The decay of step t; None where it is not due. Counts the steps before, one by one."""
    if t % every != 0:
        return None
    if t < after:
        return 0.0
    k = len([s for s in range(after, t) if s % every == 0])
    return decay(k) if callable(decay) else float(decay)


TIMES = list(itertools.product((1, 2, 5), (0, 1, 4, 5)))
SCHEDULES = (
    0.75,
    schedules.tf_warmup(0.999),
    schedules.equal(),
    schedules.cosine(0.9, 6),
    schedules.inverse_power(0.9999),
    schedules.zero_debias(0.99),
)


@pytest.mark.parametrize(("every", "after"), TIMES)
@pytest.mark.parametrize("host", [0, 3])
def test_a_count_on_the_device_decides_which_steps_are_due(host, every, after, device):
    """`host` steps are known to the host, and the device counts on."""
    params = [random_tensor((n,), F64, device, seed=n) for n in (1, 70)]
    params.append(frozen(random_tensor((5,), F64, device, seed=2)))
    shadows = shadows_of(params, len(SCHEDULES))
    count = torch.zeros((), dtype=torch.int64, device=device)
    gate = Gate(None, [count], torch.device(device))
    averages = Averages(shadows, SCHEDULES, host, count, every, after, frozenset(params[2:]))
    for t in range(host, 12):
        before = copied(shadows)
        versions = [shadow._version for shadow in flat(shadows)]
        run(averages, gate)
        assert int(count) == t + 1 - host
        for k, schedule in enumerate(SCHEDULES):
            decay = decay_at(t, every, after, schedule)
            for p, old, new in zip(params, column(before, k), column(shadows, k), strict=True):
                if decay is None:
                    assert_same_bits(new, old, f"step {t}, average {k}")
                elif isinstance(p, nn.Parameter):
                    assert_same_bits(new, p, f"step {t}, average {k}, frozen")
                else:
                    assert_ema_update(decay, old, p, new, f"step {t}, average {k}")
        assert [shadow._version for shadow in flat(shadows)] == [v + 1 for v in versions]


@pytest.mark.parametrize(("every", "after"), TIMES)
@pytest.mark.parametrize("kind", ["plain", "for torch"])
def test_a_device_and_the_host_give_the_same_bits(kind, every, after):
    histories = []
    for counts_on_device in (True, False):
        values = random_tensor((40,), seed=1)
        params = [nn.Parameter(wrapped(values) if kind == "for torch" else values)]
        ema = Several(params, SCHEDULES, every=every, after=after)
        optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, capturable=counts_on_device)
        history = []
        for step in range(11):
            set_gradients(params, seed=step)
            optimizer.step()
            history += [plain(shadow).clone() for shadow in flat(ema.rows)]
        assert ema.steps == 11
        histories.append(history)
    assert_all_same_bits(*histories)


def test_a_step_that_is_not_due_reads_no_shadow():
    """A NaN would show: as it is, the bits stay even of one that signals."""
    param = torch.ones(70)
    bits = torch.full((70,), 0x7F800001, dtype=torch.int32)
    shadows = {param: (bits.view(F32), bits.clone().view(F32))}
    count = torch.ones((), dtype=torch.int64)
    run(Averages(shadows, (0.5, 0.9), 0, count, every=2))
    assert all((s.view(torch.int32) == 0x7F800001).all() for s in shadows[param])


def test_the_host_evaluates_a_schedule_that_no_device_counts(device):
    param = random_tensor((70,), device=device)
    shadows = shadows_of([param], 2)
    before = copied(shadows)
    schedule = schedules.tf_warmup(0.999)
    run(Averages(shadows, (schedule, 0.5), steps=6, every=2, after=3))
    for k, decay in enumerate((schedule(1), 0.5)):
        assert_ema_update(decay, column(before, k)[0], param, column(shadows, k)[0])


@pytest.mark.cuda
def test_a_captured_step_evaluates_schedules_at_each_replay():
    results = []
    for captured in (False, True):
        params = make_params([(70,), (8193,)], BF16, "cuda")
        ema = Several(params, SCHEDULES, F32, every=2, after=3)
        optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, capturable=True)
        set_gradients(params, seed=0)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        else:
            step = optimizer.step
        for _ in range(9):
            step()
        assert ema.steps == 9
        results.append([*params, *flat(ema.rows)])
    assert_all_same_bits(*results)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 7, 9, 30])
def test_averages_have_the_cpus_bits(count, dtype):
    results = []
    for where in ("cpu", "cuda"):
        params = make_params([(n,) for n in SIZES], dtype, where)
        decays = tuple(k / (count + 1) for k in range(count))
        ema = Several(params, decays, F64 if dtype == F64 else F32)
        optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, stochastic_rounding=count == 3)
        for step in range(3):
            set_gradients(params, seed=step)
            optimizer.step()
        results.append([*params, *flat(ema.rows)])
    assert_all_same_bits(*results)


# --- what does not fit ---------------------------------------------------------------------------


def refuse(shadows: dict[Tensor, Any], decays: tuple[Any, ...], match: str, **timing: int) -> None:
    before = [shadow.clone() for shadow in flat(shadows)]
    with pytest.raises(ValueError, match=match):
        run(Averages(shadows, decays, **timing))
    assert_all_same_bits(flat(shadows), before)


def test_errors_name_the_average():
    param = torch.ones(4)
    first, memory = torch.zeros(4), torch.zeros(8)
    refuse({param: (first, memory[:4], memory[3:7])}, (0.5,) * 3, r"averages\[\d\].*shares memory")
    refuse({param: (first, first)}, (0.5,) * 2, r"(averages\[1\]|shadows) of.*shares memory")
    refuse({param: (first, param)}, (0.5,) * 2, r"shares memory")
    refuse({param: (first, torch.zeros(5))}, (0.5,) * 2, r"averages\[1\] of.*expected shape \(4,\)")
    refuse(
        {param: (first, first.clone(), torch.zeros(4, dtype=BF16))},
        (0.5,) * 3,
        r"averages\[2\] of.*expected dtype float32 like the shadow of the first.*got bfloat16",
    )
    refuse(
        {param: (first, torch.zeros(4).int())},
        (0.5,) * 2,
        r"averages\[1\].*no kernel.*int32 shadow",
    )
    shadows = {wrapped(torch.ones(4)): (wrapped(first), wrapped(torch.zeros(5)))}
    with pytest.raises(ValueError, match=r"averages\[1\] of.*expected shape"):
        run(Averages(shadows, (0.5,) * 2))


def test_a_row_has_a_shadow_in_every_average():
    param = torch.ones(4)
    for shadows in ((), (torch.zeros(4),), (torch.zeros(4),) * 3):
        refuse({param: shadows}, (0.5,) * 2, f"shadows of.*each of 2 averages, got {len(shadows)}")
    refuse({param: torch.zeros(4)}, (0.5,) * 2, "each of 2 averages, got 1")
    with pytest.raises(TypeError, match=r"averages\[1\] of.*got NoneType"):
        run(Averages({param: (torch.zeros(4), None)}, (0.5,) * 2))


def test_counts_out_of_range_are_refused():
    shadows = {torch.ones(4): torch.zeros(4)}
    refuse(shadows, (), "1 to 252 averages, got 0")
    refuse(shadows, (0.5,) * 253, "1 to 252 averages, got 253")
    refuse(shadows, (0.5,), "every 1 or more steps", every=0)
    refuse(shadows, (0.5,), "after 0 or more", after=-1)


def test_as_many_averages_as_streams_can_be_numbered(device):
    param = torch.ones(3, device=device)
    shadows = {param: tuple(torch.zeros(3, device=device) for _ in range(252))}
    run(Averages(shadows, tuple(k / 252 for k in range(252))))
    for k, shadow in enumerate(shadows[param]):
        assert_ema_update(k / 252, torch.zeros_like(param), param, shadow)


@pytest.mark.parametrize("which", [0, 2])
def test_a_shadow_laid_out_unlike_its_parameter_is_averaged(which, device):
    param = random_tensor((6, 9), device=device)
    shadows = [random_tensor((6, 9), device=device, seed=k) for k in range(3)]
    shadows[which] = shadows[which].t().contiguous().t()
    before = [shadow.clone() for shadow in shadows]
    run(Averages({param: tuple(shadows)}, (0.9, 0.5, 0.1)))
    for decay, old, new in zip((0.9, 0.5, 0.1), before, shadows, strict=True):
        assert_ema_update(decay, old, param, new)


@pytest.mark.parametrize("kind", ["sparse", "complex", "for torch"])
def test_steps_of_torch_keep_several_averages(kind):
    values = random_tensor((6, 4), seed=1)
    if kind == "complex":
        values = torch.complex(values, values)
    values = wrapped(values) if kind == "for torch" else values
    param = nn.Parameter(values)
    ema = Several([torch.zeros(3)], (0.75, 0.25))
    ema.rows = {param: (torch.zeros_like(values), torch.ones_like(values))}
    optimizer = SGD([param], lr=0.1, ema=ema)
    param.grad = (
        torch.ones_like(values).to_sparse() if kind == "sparse" else torch.ones_like(values)
    )
    optimizer.step()
    for shadow, start, weight in zip(ema.rows[param], (0.0, 1.0), (0.25, 0.75), strict=True):
        assert torch.allclose(plain(shadow), start + weight * (plain(param) - start))
