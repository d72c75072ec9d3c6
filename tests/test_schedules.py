"""Schedules against their published equations in extended precision, and CosineWarmup in torch."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, SequentialLR

from fused_opt import _C, SGD, schedules
from fused_opt.schedules import CosineWarmup, Schedule

Exact = np.longdouble
PI = 4 * np.arctan(Exact(1))

#: What evaluation in fp64 may differ by, for values up to 1: two units in the last place.
TOLERANCE = 5e-16

needs_extended = pytest.mark.skipif(
    np.finfo(Exact).eps > 1e-18, reason="long double is no wider than double here"
)

# --- the published equations, with k counting the updates before this one


def clamp(value: Exact, low: float, high: float) -> Exact:
    return max(Exact(low), min(value, Exact(high)))


def tf_warmup(n: Exact, decay: float, min_decay: float = 0) -> Exact:
    return clamp((1 + n) / (10 + n), min_decay, decay)


def inverse_power(
    k: Exact, decay: float, gamma: float, power: float, min_decay: float = 0
) -> Exact:
    return clamp(1 - (1 + k / gamma) ** -Exact(power), min_decay, decay) if k > 0 else Exact(0)


def largest_root(sigma_rel: float) -> Exact:
    """The γ of the paper's cubic, from numpy's eigenvalues and two steps of Newton."""
    s = 1 / Exact(sigma_rel) ** 2
    x = Exact(max(root.real for root in np.roots([1, 7, float(16 - s), float(12 - s)])))
    for _ in range(2):
        x -= (((x + 7) * x + 16 - s) * x + 12 - s) / ((3 * x + 14) * x + 16 - s)
    return x


def power_function(t: Exact, sigma_rel: float) -> Exact:
    return (1 - 1 / t) ** (largest_root(sigma_rel) + 1)


def zero_debias(n: Exact, decay: float) -> Exact:
    return 1 - (1 - Exact(decay)) / (1 - Exact(decay) ** n)


def cosine(k: Exact, base: float, steps: int) -> Exact:
    return 1 - (1 - Exact(base)) * (np.cos(PI * min(k, Exact(steps)) / steps) + 1) / 2


def cosine_warmup(
    k: Exact, max_update: int, base: float, final: float, w: int, begin: float
) -> Exact:
    if k < w:
        return Exact(begin) + (Exact(base) - begin) * k / w
    if k >= max_update:
        return Exact(final)
    return Exact(final) + (Exact(base) - final) * (1 + np.cos(PI * (k - w) / (max_update - w))) / 2


Equation = Callable[[Exact], Exact]

CASES: list[tuple[Schedule, Equation]] = [
    (schedules.constant(0.999), lambda k: Exact(0.999)),
    (schedules.half_life(500), lambda k: Exact(2) ** (-1 / Exact(500))),
    (schedules.half_life(10_000, 256), lambda k: Exact(2) ** (-Exact(256) / 10_000)),
    (schedules.tf_warmup(0.9999), lambda k: tf_warmup(k, 0.9999)),
    (schedules.tf_warmup(0.999, 0.5, offset=1), lambda k: tf_warmup(k + 1, 0.999, 0.5)),
    (schedules.inverse_power(0.9999), lambda k: inverse_power(k, 0.9999, 1, 2 / 3)),
    (schedules.inverse_power(1.0, 20, 0.75, 0.1), lambda k: inverse_power(k, 1, 20, 0.75, 0.1)),
    (schedules.inverse_power(1.0, 1e5, 3), lambda k: inverse_power(k, 1, 1e5, 3)),
    (schedules.exponential_ramp(0.9999), lambda k: Exact(0.9999) * (1 - np.exp(-(k + 1) / 2000))),
    (schedules.exponential_ramp(0.5, 0.3), lambda k: 0.5 * (1 - np.exp(-(k + 1) / Exact(0.3)))),
    (schedules.exponential_ramp(1.0, 1e8), lambda k: 1 - np.exp(-(k + 1) / Exact(1e8))),
    (schedules.equal(), lambda k: 1 - 1 / (k + 1)),
    (schedules.power_function(0.05), lambda k: power_function(k + 1, 0.05)),
    (schedules.power_function(0.1), lambda k: power_function(k + 1, 0.1)),
    (schedules.power_function(0.25), lambda k: power_function(k + 1, 0.25)),
    (schedules.power_function(1e-4), lambda k: power_function(k + 1, 1e-4)),
    (schedules.zero_debias(0.0), lambda k: Exact(0)),
    (schedules.zero_debias(0.3), lambda k: zero_debias(k + 1, 0.3)),
    (schedules.zero_debias(0.999), lambda k: zero_debias(k + 1, 0.999)),
    (schedules.zero_debias(1 - 2**-20), lambda k: zero_debias(k + 1, 1 - 2**-20)),
    (schedules.cosine(0.996, 1000), lambda k: cosine(k, 0.996, 1000)),
    (schedules.cosine(0.0, 1), lambda k: cosine(k, 0.0, 1)),
    (schedules.cosine(0.5, 10**9), lambda k: cosine(k, 0.5, 10**9)),
    (CosineWarmup(1000, 0.4), lambda k: cosine_warmup(k, 1000, 0.4, 0, 0, 0)),
    (
        CosineWarmup(700, 0.1, 0.3, 123, 0.9),
        lambda k: cosine_warmup(k, 700, 0.1, 0.3, 123, 0.9),
    ),
    (
        CosineWarmup(10**9, 1.0, 1e-3, 10**6, 1e-5),
        lambda k: cosine_warmup(k, 10**9, 1.0, 1e-3, 10**6, 1e-5),
    ),
    (CosineWarmup(50, 0.3, 0.01, 50, 0.0), lambda k: cosine_warmup(k, 50, 0.3, 0.01, 50, 0)),
]
SCHEDULES = [schedule for schedule, _ in CASES]


def thousand_updates() -> list[int]:
    """The first 600, those around what the cases end at, and others up to 10^9."""
    ends = [end + d for end in (700, 1000, 10**6, 10**9) for d in (-1, 0, 1)]
    spread = {round(600 * (10**9 / 600) ** (i / 420)) for i in range(421)}
    return sorted({*range(600), *spread, *ends})


@needs_extended
@pytest.mark.parametrize(("schedule", "equation"), CASES, ids=map(repr, SCHEDULES))
def test_values_are_those_of_the_published_equation(schedule: Schedule, equation: Equation) -> None:
    updates = thousand_updates()
    assert len(updates) >= 1000
    for k in updates:
        assert abs(Exact(schedule(k)) - equation(Exact(k))) <= TOLERANCE, k


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.inverse_power(0.999),
        schedules.inverse_power(0.999, min_decay=0.5),
        schedules.equal(),
        schedules.power_function(0.05),
        schedules.zero_debias(0.9),
    ],
    ids=repr,
)
def test_first_update_copies(schedule: Schedule) -> None:
    assert math.copysign(1, schedule(0)) == 1
    assert schedule(0) == 0
    assert schedule(1) > 0


@pytest.mark.parametrize("extreme", [5e-324, 1e-310, 2.0**-60, 2.0**60, 1.7e308], ids=str)
@pytest.mark.parametrize("k", [0, 1, 1000, 2**53, 2**63 - 1])
def test_extreme_arguments_keep_a_decay_a_decay(extreme: float, k: int) -> None:
    decay = min(extreme, 1 - 2.0**-53)
    for schedule in (
        schedules.tf_warmup(decay),
        schedules.tf_warmup(0.9, offset=min(int(extreme), 10**15)),
        schedules.inverse_power(decay, extreme, extreme, decay / 2),
        schedules.inverse_power(1.0, gamma=extreme),
        schedules.inverse_power(1.0, power=extreme),
        schedules.exponential_ramp(decay, extreme),
        schedules.half_life(extreme),
        schedules.half_life(1.0, extreme),
        schedules.zero_debias(decay),
        schedules.power_function(min(max(extreme, 1e-6), 0.3)),
        schedules.cosine(decay, max(1, min(int(extreme), 10**15))),
    ):
        assert 0 <= schedule(k) <= 1, schedule


def test_ends_are_exact() -> None:
    cosine = schedules.cosine(0.996, 300)
    assert (cosine(0), cosine(300), cosine(301)) == (0.996, 1.0, 1.0)
    warmup = CosineWarmup(90, base_lr=0.3, final_lr=0.07, warmup_steps=30, warmup_begin_lr=0.01)
    assert [warmup(k) for k in (0, 30, 90, 91, 10**12)] == [0.01, 0.3, 0.07, 0.07, 0.07]
    assert CosineWarmup(50, 0.3, 0.1, warmup_steps=50)(50) == 0.1
    for final_lr, base_lr in ((0.03, 0.3), (0.07, 0.6), (0.07, 0.9)):  # a + (b - a) is not b
        assert CosineWarmup(50, base_lr, final_lr)(0) == base_lr


#: The bits of some values. exp, log and sin are ours, so they are the same on every machine.
BITS = {
    schedules.inverse_power(0.9999): ["0x1.7aeba0ce51aeap-2", "0x1.f8e99bc40af93p-1"],
    schedules.exponential_ramp(0.9999): ["0x1.05fc9cfbd9d5cp-10", "0x1.0eaaadda790dep-2"],
    schedules.zero_debias(0.999): ["0x1.ffbe6e6425652p-2", "0x1.fee26e2e5c1e4p-1"],
    schedules.cosine(0.996, 1000): ["0x1.fdf3b69a69438p-1", "0x1.ff54f98755b47p-1"],
}


@pytest.mark.parametrize("schedule", BITS, ids=repr)
def test_bits_are_the_same_on_every_machine(schedule: Schedule) -> None:
    assert [schedule(1).hex(), schedule(613).hex()] == BITS[schedule]


# --- what the decays are for


def average(schedule: Callable[[int], float], values: torch.Tensor) -> float:
    shadow = 123.0  # which every schedule here that copies at first forgets
    for k, value in enumerate(values.tolist()):
        shadow += (1 - schedule(k)) * (value - shadow)
    return shadow


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_equal_is_the_mean(values: torch.Tensor) -> None:
    assert average(schedules.equal(), values) == pytest.approx(values.mean().item(), abs=1e-13)


def test_zero_debias_is_adams_corrected_moment(values: torch.Tensor) -> None:
    moment = 0.0
    for value in values.tolist():
        moment = 0.9 * moment + 0.1 * value
    corrected = moment / (1 - 0.9 ** len(values))
    assert average(schedules.zero_debias(0.9), values) == pytest.approx(corrected, abs=1e-13)


def test_power_function_weighs_by_the_profile(values: torch.Tensor) -> None:
    exponent = float(largest_root(0.1)) + 1
    times = torch.arange(len(values) + 1, dtype=torch.float64)
    weights = (times / len(values)).pow(exponent).diff()
    expected = (weights @ values).item()
    assert average(schedules.power_function(0.1), values) == pytest.approx(expected, abs=1e-13)
    mean = weights @ times[1:] / len(values)
    width = (weights @ (times[1:] / len(values) - mean) ** 2).sqrt()
    assert width.item() == pytest.approx(0.1, rel=1e-3)


def test_half_life_halves_the_share_of_the_past() -> None:
    share = math.prod(schedules.half_life(40)(k) for k in range(40))
    assert share == pytest.approx(0.5, rel=1e-13)


def test_schedule_of_images_does_not_depend_on_the_batch() -> None:
    small, large = (schedules.half_life(10_000, interval) for interval in (32, 64))
    assert large(0) == pytest.approx(small(0) ** 2, rel=1e-15)


# --- arguments

BAD_ARGUMENTS: list[tuple[Callable[[], object], str]] = [
    (lambda: schedules.constant(1.01), r"Invalid decay: 1\.01, expected a number in \[0, 1\]"),
    (lambda: schedules.constant(-0.1), "Invalid decay"),
    (lambda: schedules.constant(math.nan), "Invalid decay: nan"),
    (lambda: schedules.constant("0.9"), "Invalid decay: '0.9'"),  # type: ignore[arg-type]
    (lambda: schedules.constant(True), "Invalid decay: True"),
    (lambda: schedules.tf_warmup(2), "Invalid decay: 2"),
    (lambda: schedules.tf_warmup(0.9, 0.95), r"Invalid min_decay: 0\.95, .* in \[0, 0\.9\]"),
    (lambda: schedules.tf_warmup(0.9, offset=-1), r"Invalid offset: -1, expected an integer"),
    (lambda: schedules.tf_warmup(0.9, offset=1.0), "Invalid offset"),  # type: ignore[arg-type]
    (lambda: schedules.inverse_power(1.5), "Invalid decay"),
    (lambda: schedules.inverse_power(0.9, gamma=0), r"Invalid gamma: 0, .* in \(0, inf\)"),
    (lambda: schedules.inverse_power(0.9, gamma=math.inf), "Invalid gamma: inf"),
    (lambda: schedules.inverse_power(0.9, power=0), "Invalid power"),
    (lambda: schedules.inverse_power(0.9, min_decay=-0.1), "Invalid min_decay"),
    (lambda: schedules.exponential_ramp(1.1), "Invalid decay"),
    (lambda: schedules.exponential_ramp(0.9, tau=0), "Invalid tau"),
    (lambda: schedules.half_life(0), "Invalid half_life"),
    (lambda: schedules.half_life(10, interval=0), "Invalid interval"),
    (lambda: schedules.power_function(0.0), "Invalid sigma_rel"),
    (lambda: schedules.power_function(0.31), r"Invalid sigma_rel: 0\.31, expected"),
    (lambda: schedules.power_function(math.nan), "Invalid sigma_rel"),
    (lambda: schedules.zero_debias(1.0), r"Invalid decay: 1\.0, .* in \[0, 1\)"),
    (lambda: schedules.cosine(1.5, 10), "Invalid base"),
    (lambda: schedules.cosine(0.9, 0), r"Invalid steps: 0, expected an integer in \[1, 1e15\]"),
    (lambda: schedules.cosine(0.9, 10.0), "Invalid steps"),  # type: ignore[arg-type]
    (lambda: CosineWarmup(0, 0.1), "Invalid max_update"),
    (lambda: CosineWarmup(10, 0), r"Invalid base_lr: 0, expected a number in \(0, inf\)"),
    (lambda: CosineWarmup(10, 0.1, -0.1), "Invalid final_lr"),
    (lambda: CosineWarmup(10, 0.1, warmup_steps=11), r"Invalid warmup_steps: 11, .* \[0, 10\]"),
    (lambda: CosineWarmup(10, 0.1, warmup_begin_lr=math.inf), "Invalid warmup_begin_lr"),
    (lambda: schedules.equal()(-1), "Invalid k: -1, expected an integer"),
    (lambda: schedules.equal()(1.0), r"Invalid k: 1\.0"),  # type: ignore[arg-type]
    (lambda: schedules.equal()(True), "Invalid k: True"),
    (lambda: schedules.equal()(2**63), "Invalid k"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_become_builtin_ones() -> None:
    schedule = schedules.cosine(np.float32(0.5), np.int64(10))  # type: ignore[arg-type]
    assert type(schedule.base) is float
    assert type(schedule.steps) is int
    assert schedule(np.int64(5)) == schedules.cosine(0.5, 10)(5)  # type: ignore[arg-type]


def test_native_evaluation_refuses_what_it_does_not_know() -> None:
    for kind, parameters, k in ((-1, [], 0), (9, [], 0), (0, [0.5] * 6, 0), (0, [0.5], -1)):
        expected = r"expected (a kind of schedule, and its parameters|k >= 0)"
        with pytest.raises(ValueError, match=expected):
            _C.evaluate_schedule(kind, parameters, k)


# --- schedules as values


def test_base_class_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Schedule()  # type: ignore[abstract]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_values(schedule: Schedule) -> None:
    used = copy.deepcopy(schedule)
    used(3)
    written = eval(repr(schedule), dict(vars(schedules)))
    for same in (used, copy.copy(used), pickle.loads(pickle.dumps(used)), written):
        assert same == schedule
        assert hash(same) == hash(schedule)
        assert same(7) == schedule(7)
    assert [other for other in SCHEDULES if other == schedule] == [schedule]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_dict_survives_a_checkpoint(schedule: Schedule) -> None:
    schedule(3)
    file = io.BytesIO()
    torch.save(schedule.to_dict(), file)
    file.seek(0)
    loaded = Schedule.from_dict(torch.load(file, weights_only=True))
    assert loaded == schedule
    assert loaded._hyper == schedule._hyper


def test_dict_has_names() -> None:
    expected = {"schedule": "exponential_ramp", "decay": 0.9, "tau": 2000.0}
    assert schedules.exponential_ramp(0.9).to_dict() == expected


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"state\['schedule'\]: expected one of .*'cosine'.* got None"),
        ({"schedule": "linear"}, "got 'linear'"),
        ({"schedule": "constant"}, "missing .* 'decay'"),
        ({"schedule": "constant", "decay": 0.9, "tau": 1}, "unexpected .* 'tau'"),
        ({"schedule": "constant", "decay": 2.0}, "Invalid decay"),
    ],
)
def test_foreign_dicts_are_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_dict(state)


def test_schedules_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedules.constant(0.9).decay = 0.5  # type: ignore[misc]


# --- CosineWarmup as a scheduler


def optimizer_of(*lrs: float | torch.Tensor, **options: Any) -> SGD:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "lr": lr} for lr in lrs]
    return SGD(groups, lr=0.0, momentum=0.9, **options)


def lrs_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def train(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int
) -> list[list[float]]:
    """The lrs that the steps used."""
    used = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        used.append(lrs_of(optimizer))
        optimizer.step()
        scheduler.step()
    return used


WARMUP = CosineWarmup(40, base_lr=0.3, final_lr=0.03, warmup_steps=8, warmup_begin_lr=0.003)


def test_scheduler_sets_the_schedule() -> None:
    optimizer = optimizer_of(0.3)
    scheduler = WARMUP.scheduler(optimizer)
    assert isinstance(scheduler, LRScheduler)
    assert train(optimizer, scheduler, 50) == [[WARMUP(k)] for k in range(50)]
    assert scheduler.get_last_lr() == [WARMUP(50)] == [0.03]


def test_without_warmup_it_is_torchs_cosine_annealing() -> None:
    ours, theirs = optimizer_of(0.3), optimizer_of(0.3)
    used = train(ours, CosineWarmup(60, 0.3, 0.01).scheduler(ours), 60)
    expected = train(theirs, CosineAnnealingLR(theirs, T_max=60, eta_min=0.01), 60)
    torch.testing.assert_close(
        torch.tensor(used, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,  # theirs multiplies its own last value
        atol=1e-15,
    )


def test_groups_are_scaled_by_their_own_lr() -> None:
    optimizer = optimizer_of(0.3, 0.6, 0.03, 0.0)
    for k, used in enumerate(train(optimizer, WARMUP.scheduler(optimizer), 45)):
        lr = WARMUP(k)
        assert used == pytest.approx([lr, 2 * lr, lr / 10, 0.0], rel=1e-15)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("capturable", [False, True])
def test_lr_tensors_are_filled_in_place(shape: tuple[int, ...], capturable: bool) -> None:
    lrs = [torch.full(shape, lr, dtype=torch.float64) for lr in (0.3, 0.6)]
    optimizer = optimizer_of(*lrs, capturable=capturable)
    plain = optimizer_of(0.3, 0.6)
    used = train(optimizer, WARMUP.scheduler(optimizer), 45)
    assert used == train(plain, WARMUP.scheduler(plain), 45)
    for lr, group in zip(lrs, optimizer.param_groups, strict=True):
        assert group["lr"] is lr


@pytest.mark.cuda
def test_lr_on_a_gpu_is_filled_without_waiting() -> None:
    lr = torch.tensor(0.3, device="cuda")
    optimizer = SGD([nn.Parameter(torch.ones(3, device="cuda"))], lr=lr, capturable=True)
    scheduler = WARMUP.scheduler(optimizer)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(WARMUP(1))


def saved_and_loaded(*states: object) -> Any:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_resumes_exactly(as_tensors: bool) -> None:
    def make() -> SGD:
        lrs: list[Any] = [0.3, 0.06]
        return optimizer_of(*map(torch.tensor, lrs) if as_tensors else lrs)

    straight = make()
    expected = train(straight, WARMUP.scheduler(straight), 45)
    first = make()
    scheduler = WARMUP.scheduler(first)
    used = train(first, scheduler, 13)
    optimizer_state, scheduler_state = saved_and_loaded(first.state_dict(), scheduler.state_dict())

    second = make()
    resumed = CosineWarmup(7, base_lr=1.0).scheduler(second)  # which the state replaces
    second.load_state_dict(optimizer_state)
    resumed.load_state_dict(scheduler_state)
    assert resumed.last_epoch == 13
    assert used + train(second, resumed, 32) == expected
    assert scheduler_state["schedule"] == WARMUP.to_dict()  # not the scheduler's own


def test_resumes_from_the_optimizers_state_alone() -> None:
    straight = optimizer_of(0.3)
    expected = train(straight, WARMUP.scheduler(straight), 45)
    first = optimizer_of(0.3)
    used = train(first, WARMUP.scheduler(first), 13)
    second = optimizer_of(0.3)
    second.load_state_dict(first.state_dict())
    assert used + train(second, WARMUP.scheduler(second, last_epoch=12), 32) == expected
    with pytest.raises(KeyError, match="initial_lr"):
        WARMUP.scheduler(optimizer_of(0.3), last_epoch=12)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_group_that_is_added_later_is_scaled_by_its_lr(as_tensors: bool) -> None:
    def add(optimizer: SGD) -> None:
        lr: Any = torch.tensor(0.6, dtype=torch.float64) if as_tensors else 0.6
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": lr})

    optimizer = optimizer_of(0.3)
    scheduler = WARMUP.scheduler(optimizer)
    train(optimizer, scheduler, 5)
    add(optimizer)
    for k, used in enumerate(train(optimizer, scheduler, 15), start=5):
        expected = [WARMUP(k), 0.6 if k == 5 else 2 * WARMUP(k)]
        assert used == pytest.approx(expected, rel=1e-15)
    assert scheduler.get_last_lr() == pytest.approx([WARMUP(20), 2 * WARMUP(20)], rel=1e-15)

    optimizer_state, scheduler_state = saved_and_loaded(
        optimizer.state_dict(), scheduler.state_dict()
    )
    resumed = optimizer_of(0.3)
    again = WARMUP.scheduler(resumed)
    again.load_state_dict(scheduler_state)
    add(resumed)
    resumed.load_state_dict(optimizer_state)
    assert train(resumed, again, 9) == train(optimizer, scheduler, 9)


def test_state_of_another_scheduler_is_refused() -> None:
    optimizer = optimizer_of(0.3)
    scheduler = WARMUP.scheduler(optimizer)
    foreign = CosineAnnealingLR(optimizer_of(0.1), T_max=10).state_dict()
    for state in (foreign, {**foreign, "schedule": schedules.equal().to_dict()}):
        before = scheduler.state_dict()
        with pytest.raises(ValueError, match="schedule"):
            scheduler.load_state_dict(state)
        assert scheduler.state_dict() == before


def test_scheduler_warns_as_torchs_do() -> None:
    scheduler = WARMUP.scheduler(optimizer_of(0.3))
    with pytest.warns(UserWarning, match=r"please use `get_last_lr\(\)`"):
        scheduler.get_lr()
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()
    optimizer = optimizer_of(0.3)
    scheduler = WARMUP.scheduler(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, scheduler, 3)


def test_scheduler_runs_inside_torchs_combinations() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.3)
    first = ConstantLR(optimizer, factor=0.5, total_iters=5)
    both = SequentialLR(optimizer, [first, WARMUP.scheduler(optimizer)], milestones=[5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR itself passes an epoch
        used = train(optimizer, both, 20)
    assert used == [[0.15]] * 5 + [[WARMUP(k)] for k in range(15)]


# --- pictures


@pytest.fixture
def figure_module() -> Iterator[Any]:
    return pytest.importorskip("matplotlib.figure")


def lines_of(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist())
        for axes in figure.axes
        for line in axes.get_lines()
    }


def tick_labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_yticklabels()]


def test_plot_draws_every_value(figure_module: Any) -> None:
    several = [schedules.tf_warmup(0.99, offset=1), schedules.cosine(0.9, 30)]
    figure = schedules.plot(several, 50)
    assert isinstance(figure, figure_module.Figure)
    assert lines_of(figure) == {
        "tf_warmup(0.99, offset=1)": (list(range(50)), [several[0](k) for k in range(50)]),
        "cosine(0.9, 30)": (list(range(50)), [several[1](k) for k in range(50)]),
    }
    assert [axes.get_ylabel() for axes in figure.axes] == ["decay", "1 / (1 - decay), in updates"]
    figure.savefig(io.BytesIO())


def test_plot_scales_decays_by_their_nines(figure_module: Any) -> None:
    left, right = schedules.plot(schedules.constant(0.999), 5000).axes
    figure = left.get_figure()
    figure.savefig(io.BytesIO())
    assert tick_labels(left) == ["0", "0.5", "0.9", "0.99", "0.999"]
    assert tick_labels(right) == ["1", "2", "10", "100", "1,000"]
    assert left.get_ylim() == right.get_ylim() == (0, 0.999)
    heights = [left.transData.transform((0, decay))[1] for decay in (0, 0.9, 0.99, 0.999)]
    gaps = np.diff(heights)
    assert gaps == pytest.approx([gaps[0]] * 3)
    for decay in (0.5, 0.99):
        assert right.transData.transform((0, decay)) == pytest.approx(
            left.transData.transform((0, decay))
        )


def test_plot_of_many_updates_is_thinned_between_its_ends(figure_module: Any) -> None:
    ((updates, _),) = lines_of(schedules.plot(schedules.equal(), 10**6)).values()
    assert len(updates) == 1000
    assert (updates[0], updates[-1]) == (0, 10**6 - 1)


def test_plot_ends_where_decays_are_beyond_its_updates(figure_module: Any) -> None:
    tops = {
        schedules.constant(1.0): 1 - 1e-3,
        schedules.constant(0.9): 0.9,
        schedules.constant(0.0): 0.5,
    }
    for schedule, top in tops.items():
        for axes in schedules.plot(schedule, 100).axes:
            assert axes.get_ylim() == pytest.approx((0, top))
    assert lines_of(schedules.plot(schedules.equal(), 1)) == {"equal()": ([0], [0.0])}


def test_plot_of_learning_rates_and_of_functions_is_linear(figure_module: Any) -> None:
    def mine(k: int) -> float:
        return 2.0 * k

    (axes,) = schedules.plot(WARMUP, 50).axes
    assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "learning rate")
    (axes,) = schedules.plot([mine, schedules.equal()], 50).axes
    assert axes.get_yscale() == "linear"
    assert set(lines_of(axes.get_figure())) == {"mine", "equal()"}


def test_plot_draws_into_given_axes_with_given_labels(figure_module: Any) -> None:
    figure = figure_module.Figure()
    upper, lower = figure.subplots(2)
    assert schedules.plot({"teacher": WARMUP}, 9, ax=lower) is figure
    assert upper.get_lines() == []
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["teacher"]


def test_plot_beside_decays_shows_all_of_them(figure_module: Any) -> None:
    figure = figure_module.Figure()
    ax, below = figure.subplots(2, sharex=True)
    schedules.plot(schedules.half_life(1000), 5000, ax=below)
    schedules.plot(schedules.constant(0.999), 5000, ax=ax)
    schedules.plot(schedules.constant(0.9), 50, ax=ax)
    figure.savefig(io.BytesIO())
    _, _, *twins = figure.axes
    assert len(twins) == 2  # one each
    assert ax.get_ylim() == twins[1].get_ylim() == (0, 0.999)
    assert tick_labels(twins[1]) == ["1", "2", "10", "100", "1,000"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "constant(0.999)",
        "constant(0.9)",
    ]


def test_plot_of_decays_beside_others_is_linear(figure_module: Any) -> None:
    for pair in ([WARMUP, schedules.equal()], [schedules.equal(), lambda k: 2.0 * k]):
        for first, second in (pair, pair[::-1]):
            ax = figure_module.Figure().subplots()
            for curve in (first, second):
                figure = schedules.plot(curve, 50, ax=ax)
            assert (figure.axes, ax.get_yscale(), ax.get_ylabel()) == ([ax], "linear", "")
            highest = max(line.get_ydata().max() for line in ax.get_lines())
            assert ax.get_ylim()[1] > highest


def test_plot_drops_no_curve_for_its_label(figure_module: Any) -> None:
    def doubled(k: int) -> float:
        return 2.0 * k

    twice = [doubled, lambda k: 3.0 * k, lambda k: 4.0 * k]
    assert len(schedules.plot(twice, 5).axes[0].get_lines()) == 3
    near = [schedules.constant(0.9999999), schedules.constant(0.99999999)]
    labels = list(lines_of(schedules.plot(near, 5)))
    assert labels == ["constant(0.9999999)", "constant(0.99999999)"]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_plot_refuses_bad_steps(figure_module: Any, steps: Any) -> None:
    with pytest.raises(ValueError, match="Invalid steps"):
        schedules.plot(schedules.equal(), steps)
    with pytest.raises(ValueError, match="expected at least one"):
        schedules.plot([], 5)


def test_plot_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fused_opt\[demo\]"):
        schedules.plot(schedules.equal(), 5)
