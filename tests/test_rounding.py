"""`stochastic_rounding`: without bias, by numbers that only seed, step and place decide."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import (
    HALF_DTYPES,
    MOMENTUM_KEYS,
    assert_same_bits,
    make_params,
    random_tensor,
    set_gradients,
)
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fused_opt import _C, EMA, SGD
from fused_opt.functional import ema_update_, sgd_step_

BF16, F16 = HALF_DTYPES
halves = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
STREAMS = ("param", "momentum", "shadow")
streams = pytest.mark.parametrize("stream", STREAMS)

#: Below and above the tiles of the CPU and the vectors and blocks of CUDA, and a CPU's share.
SIZES = (1, 7, 8, 9, 63, 64, 65, 129, 8191, 8192, 8193, 70_001)


def rounded(
    values: Tensor, dtype: torch.dtype, stream: str, key: tuple[int, int] | None, ordinal: int = 0
) -> Tensor:
    """Float32 values as one step stores them; only the one stream is narrow."""
    device, shape = values.device, values.shape

    def zeros(count: int, of: torch.dtype) -> list[Any]:
        return [torch.zeros(1, dtype=of, device=device) for _ in range(count)]

    wide = torch.float32
    before = ordinal  # parameters that come first
    param = torch.zeros(shape, dtype=dtype if stream == "param" else wide, device=device)
    momentum = torch.zeros(shape, dtype=dtype if stream == "momentum" else wide, device=device)
    shadow = torch.zeros(shape, dtype=dtype if stream == "shadow" else wide, device=device)
    sgd_step_(
        [*zeros(before, wide), param],
        [*zeros(before, wide), -values],
        [*zeros(before, wide), momentum],
        lr=1.0,
        momentum=0.5,
        shadows=[*zeros(before, wide), shadow],
        decay=0.0,
        rounding=key,
    )
    if stream == "momentum":
        return -momentum
    return param if stream == "param" else shadow


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle: the largest number of the dtype below each value, and the smallest above."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    numbers = every[~every.isnan()].unique()
    wide = values.double().cpu()
    above = torch.searchsorted(numbers, wide)
    below = torch.searchsorted(numbers, wide, right=True) - 1
    return numbers[below], numbers[above]


# --- unbiased, and never beyond the neighbours

#: In the middle of the range and at its ends; fractions of the spacing from 1 % to 99 %.
VALUES = {
    BF16: [1.003, -1.0077, 3.14159, 0.1, -1e-3, 1e-10, -1e30, 3.33e38, -3.385e38, 1e-38, 2e-40],
    F16: [1.0003, -1.0007, 3.14159, 0.1, -1e-3, 6.09e-5, -6.1e-5, 1e-6, 3e-8, -1.2e-7, 65490.0],
}


@streams
@halves
def test_the_mean_of_many_roundings_is_the_value(
    dtype: torch.dtype, stream: str, device: torch.device
) -> None:
    count = 100_000
    for n, number in enumerate(VALUES[dtype]):
        values = torch.full((count,), number)
        results = rounded(values.to(device), dtype, stream, (17, n)).double().cpu()
        value, (low, high) = float(values[0]), map(float, neighbours(values[:1], dtype))
        assert low < value < high
        assert set(results.unique().tolist()) == {low, high}, number
        odds = (value - low) / (high - low)
        error = (float(results.mean()) - value) / (high - low)
        assert abs(error) <= 4 * math.sqrt(odds * (1 - odds) / count), number


@halves
def test_the_mean_over_steps_is_the_value(dtype: torch.dtype) -> None:
    value = torch.full((4,), 1.0 + 0.3 * torch.finfo(dtype).eps)
    results = torch.stack([rounded(value, dtype, "param", (3, step)) for step in range(10_000)])
    ups = (results > 1).double().mean(0)
    assert (ups - 0.3).abs().max() <= 4 * math.sqrt(0.3 * 0.7 / 10_000)


def values_of_all_sizes(dtype: torch.dtype) -> Tensor:
    """Finite ones from the smallest float32 to the dtype's largest number, and beyond."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-150, 128, (100_000,), generator=generator)
    near = torch.randint(-27, 17, (100_000,), generator=generator)  # of float16
    exponents = torch.cat([exponents, near])
    values = torch.ldexp(torch.randn(exponents.shape, generator=generator), exponents)
    return values[(values != 0) & values.isfinite()]


@streams
@halves
def test_no_result_is_beyond_the_neighbours(
    dtype: torch.dtype, stream: str, device: torch.device
) -> None:
    values = values_of_all_sizes(dtype)
    values = values[values.abs() < torch.finfo(dtype).max].to(device)
    low, high = neighbours(values, dtype)
    got = rounded(values, dtype, stream, (0, 0)).cpu()
    assert ((got.double() == low) | (got.double() == high)).all()
    # -1e-30 becomes -0.0 and not 0.0.
    assert torch.equal(got.signbit(), values.cpu().signbit())


@streams
@halves
def test_exact_values_are_unchanged(dtype: torch.dtype, stream: str, device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every != 0]  # 0 + 0 and 0 - 0 have signs of their own
    for step in range(3):
        got = rounded(every.to(device).float(), dtype, stream, (1, step))
        assert_same_bits(got, every)


@streams
@halves
def test_beyond_the_largest_number_rounding_is_to_nearest(
    dtype: torch.dtype, stream: str, device: torch.device
) -> None:
    largest = torch.tensor(torch.finfo(dtype).max)
    spacing = torch.ldexp(torch.tensor(torch.finfo(dtype).eps), torch.frexp(largest)[1] - 1)
    parts = torch.tensor([0.0, 0.1, 0.49, 0.5, 0.51, 0.9])
    values = largest + parts * spacing
    values = torch.cat([values, -values, torch.tensor([math.inf, -math.inf, 3.4028e38, math.nan])])
    values = values.repeat(1000).to(device)
    assert_same_bits(rounded(values, dtype, stream, (4, 2)), values.to(dtype))


def test_what_is_far_below_the_smallest_number_vanishes() -> None:
    values = torch.full((1000,), 2.0**-56)
    assert not rounded(values, F16, "param", (0, 0)).any()
    # As often as not 1000 roundings of half the smallest one: it does not vanish.
    assert 400 < rounded(torch.full((1000,), 2.0**-25), F16, "param", (0, 0)).count_nonzero() < 600


# --- the random numbers


def random_bits(
    count: int,
    *,
    seed: int = 0,
    step: int = 0,
    ordinal: int = 0,
    stream: str = "param",
    device: torch.device | str = "cpu",
) -> np.ndarray[Any, Any]:
    """The 16 random bits that each element is rounded by, found by bisection.

    1 + f 2^-23 in bfloat16 is rounded up iff f + bits reach 2^16.
    """
    low = torch.zeros(count, dtype=torch.int32, device=device)  # bits that are too few
    for place in reversed(range(16)):
        fraction = 2**16 - (low + 2**place)
        values = (fraction + 0x3F800000).view(torch.float32)
        up = rounded(values, BF16, stream, (seed, step), ordinal) > 1
        # Fraction 2^16 would be the next number itself; it is never asked for.
        low += torch.where(up, 2**place, 0).to(torch.int32)
    return low.cpu().numpy().astype(np.int64)


def as_unit(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With mean 0 and variance 1."""
    return (bits + 0.5 - 2**15) / 2**16 * math.sqrt(12)


def assert_uncorrelated(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """Within 5 standard errors, in place, shifted, and with places exchanged."""
    a, b = as_unit(a), as_unit(b)
    n = len(a)
    shifted = [(a[s:], b[: n - s]) for s in (1, 2, 3, 7, 8, 64, 1000)]
    shifted += [(y, x) for x, y in ((b[s:], a[: n - s]) for s in (1, 2, 3, 7, 8, 64, 1000))]
    exchanged = [(a, b[np.arange(n) ^ mask]) for mask in (0, 1, 2, 16, 255, 1024)]
    for x, y in [*shifted, *exchanged]:
        assert abs(np.mean(x * y)) <= 5 / math.sqrt(len(x))


COUNT = 2**16


def chi_square(counts: np.ndarray[Any, Any]) -> float:
    """How far counts are from equal ones, in standard deviations."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    freedom = counts.size - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@streams
def test_numbers_are_uniform(stream: str, device: torch.device) -> None:
    bits = random_bits(16 * COUNT, seed=5, step=9, stream=stream, device=device)
    for shift in (0, 4, 8):  # 256 cells of neighbouring bits
        assert abs(chi_square(np.bincount((bits >> shift) & 255, minlength=256))) < 5
    # Neighbours together.
    for lag in (1, 2, 8, 64):
        pairs = (bits[:-lag:2] >> 12) * 16 + (bits[lag::2][: len(bits[:-lag:2])] >> 12)
        assert abs(chi_square(np.bincount(pairs, minlength=256))) < 5


def test_numbers_of_different_keys_are_independent() -> None:
    base: dict[str, Any] = {"seed": 0, "step": 0, "ordinal": 0, "stream": "param"}
    keys = [base]
    keys += [{**base, "seed": s} for s in (1, 2, 2**32, 2**63, 2**64 - 1)]
    keys += [{**base, "step": s} for s in (1, 2, 3, 2**32, 2**64 - 1)]
    keys += [{**base, "ordinal": o} for o in (1, 2, 3)]
    keys += [{**base, "stream": s} for s in STREAMS[1:]]
    # What an exchange of two parts would not tell apart.
    keys += [{**base, "seed": 1, "step": 1}, {**base, "step": 1, "ordinal": 1}]
    keys += [{**base, "seed": 1, "ordinal": 1}]
    numbers = [random_bits(COUNT, **key) for key in keys]
    for a, b in itertools.combinations(numbers, 2):
        assert_uncorrelated(a, b)
    # The mean over all keys of an element, as a parameter sees it step by step.
    mean = as_unit(np.stack(numbers)).mean(0) * math.sqrt(len(keys))
    assert abs((mean**2).mean() - 1) < 0.05


def test_numbers_of_an_element_are_independent_over_steps() -> None:
    numbers = np.stack([random_bits(64, seed=1, step=step) for step in range(1024)])
    for lag in (1, 2, 7):
        products = as_unit(numbers[lag:]) * as_unit(numbers[:-lag])
        assert abs(products.mean()) <= 5 / math.sqrt(products.size)
    assert abs(chi_square(np.bincount(numbers.ravel() >> 8, minlength=256))) < 5


# --- the same for any thread count, level, chunking, alignment and device


def state_after(
    size: int,
    dtype: torch.dtype,
    *,
    offset: int = 0,
    total: int | None = None,
    device: torch.device | str = "cpu",
    steps: int = 3,
) -> list[Tensor]:
    """Parameter, momentum and shadow of `size` elements of `total` random ones, in half precision.

    The tensors start at an offset in their memory.
    """
    total = size if total is None else total

    def placed(seed: int, of: torch.dtype) -> Tensor:
        memory = torch.zeros(offset + size, dtype=of, device=device)
        memory[offset:] = random_tensor((total,), of, device, seed)[:size]
        return memory[offset:]

    param, momentum, shadow = (placed(seed, dtype) for seed in range(3))
    for step in range(steps):
        grad = placed(10 + step, torch.float32)
        sgd_step_(
            [torch.ones(1, device=device), param],
            [torch.ones(1, device=device), grad],
            [torch.ones(1, device=device), momentum],
            lr=0.1,
            momentum=0.9,
            shadows=[None, shadow],
            decay=0.9,
            rounding=(12, step),
        )
    return [param, momentum, shadow]


@pytest.mark.parametrize("isa", _C.cpu_isas())
@halves
def test_every_isa_level_and_thread_count_gives_the_same_bits(dtype: torch.dtype, isa: str) -> None:
    best = _C.cpu_isa()

    def run() -> list[Tensor]:
        special = torch.tensor([math.nan, math.inf, -math.inf, 65519.9, 65520.0, 3.4028e38, -0.0])
        values = torch.cat([values_of_all_sizes(dtype), special])
        states = [state for size in SIZES for state in state_after(size, dtype)]
        return [*states, rounded(values, dtype, "param", (2, 3))]

    expected = run()
    _C.set_cpu_isa(isa)
    torch.set_num_threads(1)
    try:
        found = run()
    finally:
        _C.set_cpu_isa(best)
        torch.set_num_threads(2)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b, f"{a.numel()} elements")


@halves
def test_an_element_rounds_by_its_place_in_memory_alone(
    dtype: torch.dtype, device: torch.device
) -> None:
    whole = state_after(SIZES[-1], dtype, device=device)
    for size in SIZES:
        for offset in (0, 1, 3, 8):
            part = state_after(size, dtype, offset=offset, total=SIZES[-1], device=device)
            for a, b in zip(part, whole, strict=True):
                assert_same_bits(a, b[:size], f"{size} from {offset}")


@pytest.mark.cuda
@halves
def test_cuda_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    for size in SIZES:
        for a, b in zip(
            state_after(size, dtype, device="cuda"), state_after(size, dtype), strict=True
        ):
            assert_same_bits(a, b, f"{size}")


@pytest.mark.cuda
def test_cuda_launches_many_rows_and_groups_with_the_bits_of_the_cpu() -> None:
    def run(device: str) -> list[Tensor]:
        params = make_params([(1 + i % 19,) for i in range(1500)], BF16, device)
        groups = [
            {"params": params[g::25], "rounding_seed": g, "stochastic_rounding": g % 3 != 0}
            for g in range(25)
        ]
        optimizer = SGD(groups, lr=0.1, momentum=0.9)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        return [p.detach() for p in params]

    for a, b in zip(run("cuda"), run("cpu"), strict=True):
        assert_same_bits(a, b)


@halves
def test_views_round_by_the_order_of_memory(dtype: torch.dtype, device: torch.device) -> None:
    def step(param: Tensor, grad: Tensor) -> None:
        first, other = torch.zeros(1, device=device), torch.zeros(1, device=device)
        sgd_step_([first, param], [other, grad], None, lr=0.01, rounding=(1, 1))

    values = random_tensor((6, 10), dtype, device)
    grads = random_tensor((6, 10), torch.float32, device, seed=1)
    plain, turned = values.clone(), values.clone()
    step(plain, grads)
    step(turned.t(), grads.t())
    assert_same_bits(turned, plain)
    # With gaps: as a dense tensor of the same order.
    memory = torch.zeros(6, 20, dtype=dtype, device=device)
    memory[:, ::2] = values
    step(memory[:, ::2], grads)
    assert_same_bits(memory[:, ::2], plain)
    # A gradient in another order than its parameter.
    other = values.clone()
    step(other, grads.t().contiguous().t())
    assert_same_bits(other, plain)


# --- in an optimizer


def trained(
    params: list[Any], optimizer: SGD, steps: range = range(3), grads: Any = None
) -> list[Tensor]:
    for step in steps:
        set_gradients(params, step)
        if grads is not None:
            grads(params)
        optimizer.step()
    return [p.detach() for p in params]


def momentum(optimizer: SGD, param: Tensor) -> Tensor:
    buffer: Tensor = optimizer.state[param][MOMENTUM_KEYS["torch"]]
    return buffer


def half_shadows(ema: EMA, dtype: torch.dtype) -> None:
    for shadow in ema.shadows.values():
        shadow.data = shadow.data.to(dtype)


@halves
def test_the_optimizer_counts_steps_and_parameters(
    dtype: torch.dtype, device: torch.device
) -> None:
    shapes = [(5,), (70,), (3, 9)]
    params, twins = (make_params(shapes, dtype, device) for _ in range(2))
    ema = EMA(params, decay=0.9)
    half_shadows(ema, dtype)
    optimizer = SGD(
        [{"params": params[:1]}, {"params": params[1:], "rounding_seed": 7}],
        lr=0.1,
        momentum=0.9,
        ema=ema,
        stochastic_rounding=True,
        rounding_seed=3,
    )
    shadows = [t.detach().clone() for t in twins]
    buffers: list[Any] = [None] * len(twins)
    differs = False
    for step in range(4):
        assert [g["rounding_steps"] for g in optimizer.param_groups] == [step, step]
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        plain = [t.detach().clone() for t in twins]
        hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "decay": 0.9}
        for seed, only in ((3, (0,)), (7, (1, 2))):
            # The others take part as copies, so that each has its place among all.
            grads = [t.grad for t in twins]
            own = [t.detach() if i in only else t.detach().clone() for i, t in enumerate(twins)]
            if step == 0:
                new: list[Any] = [None] * len(twins)
            else:
                new = [b if i in only else b.clone() for i, b in enumerate(buffers)]
            averages = [s if i in only else s.clone() for i, s in enumerate(shadows)]
            sgd_step_(own, grads, new, shadows=averages, rounding=(seed, step), **hyper)
            for i in only:
                buffers[i] = new[i]
        nearest = [p.clone() for p in plain]
        sgd_step_(nearest, grads, [b.clone() for b in buffers], lr=0.1, momentum=0.9)
        for p, t in zip(params, twins, strict=True):
            assert_same_bits(p, t)
        for i, p in enumerate(params):
            assert_same_bits(momentum(optimizer, p), buffers[i])
            assert_same_bits(ema.shadows[str(i)], shadows[i])
        differs = differs or any(
            not torch.equal(n, p) for n, p in zip(nearest, params, strict=True)
        )
    assert differs


def test_a_parameter_without_a_gradient_keeps_its_number(device: torch.device) -> None:
    def run(missing: tuple[int, ...]) -> list[Tensor]:
        params = make_params([(40,)] * 4, BF16, device)
        optimizer = SGD(params, lr=1e-3, stochastic_rounding=True)

        def without(some: list[Any]) -> None:
            for i in missing:
                some[i].grad = None

        return trained(params, optimizer, grads=without)

    some, every = run((0, 2)), run(())
    for i in (1, 3):
        assert_same_bits(some[i], every[i])


def test_groups_that_do_not_ask_round_to_nearest(device: torch.device) -> None:
    params, twins = (make_params([(300,)] * 2, BF16, device) for _ in range(2))
    mixed = SGD(
        [{"params": params[:1]}, {"params": params[1:], "stochastic_rounding": True}],
        lr=0.01,
        momentum=0.9,
    )
    plain = SGD(twins, lr=0.01, momentum=0.9)
    trained(params, mixed)
    trained(twins, plain)
    assert_same_bits(params[0], twins[0])
    assert not torch.equal(params[1], twins[1])
    assert [g["rounding_steps"] for g in mixed.param_groups] == [3, 3]
    assert plain.param_groups[0]["rounding_steps"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_does_not_change(dtype: torch.dtype, device: torch.device) -> None:
    params, twins = (make_params([(300,)], dtype, device) for _ in range(2))
    averages = [EMA(some, 0.9) for some in (params, twins)]
    flags: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    rounding = SGD(params, **flags, ema=averages[0], stochastic_rounding=True)
    trained(params, rounding)
    trained(twins, SGD(twins, **flags, ema=averages[1]))
    assert_same_bits(params[0], twins[0])
    assert_same_bits(averages[0].shadows["0"], averages[1].shadows["0"])
    assert rounding.param_groups[0]["rounding_steps"] == 3


@pytest.mark.parametrize(
    ("mode", "dtype"), [("fp32", BF16), ("fp32", F16), ("split", BF16), ("kahan", BF16)], ids=str
)
def test_beside_a_refinement_only_momentum_and_shadow_round_stochastically(
    mode: Any, dtype: torch.dtype, device: torch.device
) -> None:
    params, twins = (make_params([(300,)], dtype, device) for _ in range(2))
    flags: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "master_weights": mode}
    ours = SGD(params, **flags, state_dtype=torch.float32, stochastic_rounding=True)
    trained(params, ours)
    trained(twins, SGD(twins, **flags, state_dtype=torch.float32))
    assert_same_bits(params[0], twins[0])

    params, twins = (make_params([(300,)], dtype, device) for _ in range(2))
    averages = [EMA(some, 0.9) for some in (params, twins)]
    for ema in averages:
        half_shadows(ema, dtype)
    ours, theirs = (
        SGD(some, **flags, state_dtype=dtype, ema=ema, stochastic_rounding=on)
        for some, ema, on in zip((params, twins), averages, (True, False), strict=True)
    )
    for step in range(2):
        for p, q in zip(params, twins, strict=True):
            p.grad_dtype = q.grad_dtype = torch.float32
            p.grad = random_tensor(p.shape, torch.float32, device, seed=step)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        if step == 0:  # from the same state: the same parameters
            assert_same_bits(params[0], twins[0])
    assert not torch.equal(momentum(ours, params[0]), momentum(theirs, twins[0]))
    assert not torch.equal(averages[0].shadows["0"], averages[1].shadows["0"])


def test_shadows_without_a_gradient_round_stochastically_too(device: torch.device) -> None:
    """Frozen parameters, those of another group, and those of no optimizer."""

    ones = torch.ones(2000, dtype=BF16, device=device)
    members = [torch.nn.Parameter(ones.clone()) for _ in range(4)]
    ema = EMA(members, decay=0.999)
    half_shadows(ema, BF16)
    with torch.no_grad():
        for p in members:
            p.fill_(2.0)
    groups = [
        {"params": members[:1], "stochastic_rounding": False},
        {"params": members[1:2], "rounding_seed": 5},
        {"params": members[2:3], "rounding_seed": 6},
    ]
    optimizer = SGD(groups, lr=0.0, ema=ema, stochastic_rounding=True)
    members[1].grad = torch.zeros_like(members[1])
    for _ in range(10):
        optimizer.step()
    shadows = list(ema.shadows.values())
    assert (shadows[0] == 1).all()  # its group rounds to nearest, and 0.001 is too little
    for shadow in shadows[1:]:
        # 10 steps of 0.001 toward 2, in units of 2^-7: mean 1.28, over 2000 elements.
        assert abs(float(shadow.double().mean()) - 1.00996) < 4 * 2**-7 * math.sqrt(1.28 / 2000)
    for a, b in itertools.combinations(shadows[1:], 2):
        assert not torch.equal(a, b)
    # By the numbers of its own group and place, with or without a gradient. The fourth one is of no
    # group: after the three that are, the fourth of the EMA, and as in the first group that rounds.
    for shadow, seed, place in ((shadows[2], 6, 2), (shadows[3], 5, 3 + 3)):
        expected = ones.clone()
        for step in range(10):
            first, grads = ([torch.zeros(1, device=device) for _ in range(place)] for _ in range(2))
            sgd_step_(
                [*first, 2 * ones],
                [*grads, 0 * ones],
                None,
                lr=0.0,
                shadows=[*[None] * place, expected],
                decay=0.999,
                rounding=(seed, step),
            )
        assert_same_bits(shadow, expected)


def test_an_average_on_its_own_rounds_to_nearest() -> None:
    param, shadow = torch.full((500,), 2.0), torch.ones(500, dtype=BF16)
    for _ in range(10):
        ema_update_([shadow], [param], decay=0.999)
    assert (shadow == 1).all()


# --- the count


@halves
def test_a_checkpoint_resumes_to_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    def make(some: list[Any]) -> SGD:
        # The seed comes from the checkpoint.
        return SGD(some, lr=0.01, momentum=0.9, stochastic_rounding=True)

    params = make_params([(70,), (3, 9)], dtype, device)
    optimizer = make(params)
    optimizer.param_groups[0]["rounding_seed"] = 2**64 - 1
    trained(params, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others: list[tuple[list[Any], SGD]] = []
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    others.append((resumed, make(resumed)))
    others[0][1].load_state_dict(torch.load(file, weights_only=True))
    for duplicate in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        clone = duplicate(optimizer)
        others.append((clone.param_groups[0]["params"], clone))
    trained(params, optimizer, range(3, 6))
    assert optimizer.param_groups[0]["rounding_steps"] == 6
    for some, other in others:
        trained(some, other, range(3, 6))
        for p, q in zip(params, some, strict=True):
            assert_same_bits(p, q)
            assert_same_bits(momentum(optimizer, p), momentum(other, q))


def test_torchs_checkpoints_load_and_leave_the_count() -> None:
    params = make_params([(9,)], BF16)
    optimizer = SGD(params, lr=0.1, momentum=0.9, stochastic_rounding=True, rounding_seed=5)
    trained(params, optimizer)
    theirs = torch.optim.SGD(make_params([(9,)], BF16), lr=0.2, momentum=0.9)
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rounding_seed"], group["rounding_steps"]) == (0.2, 5, 3)
    theirs.load_state_dict(optimizer.state_dict())


def test_a_skipped_step_does_not_count(device: torch.device) -> None:
    params = make_params([(65,)], BF16, device)
    optimizer = SGD(params, lr=0.1, stochastic_rounding=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    taken = 0
    for step in range(4):
        loss = scaler.scale((params[0].float() * (1 + step)).sum())
        params[0].grad = None
        loss.backward()
        if step % 2:
            params[0].grad[3] = math.inf
        scaler.step(optimizer)
        scaler.update()
        taken += step % 2 == 0
        assert optimizer.state_dict()["param_groups"][0]["rounding_steps"] == taken


def test_a_step_that_raises_does_not_count() -> None:
    params = make_params([(5,), (5,)], BF16)
    optimizer = SGD(params, lr=0.1, stochastic_rounding=True)
    set_gradients(params, 0)
    params[1].data = params[0].data
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.step()
    assert optimizer.param_groups[0]["rounding_steps"] == 0


def pair(device: torch.device) -> tuple[SGD, SGD]:
    """Two optimizers of the same parameters, the first of which counts steps on the device."""
    options = {"lr": 0.01, "momentum": 0.9, "stochastic_rounding": True, "rounding_seed": 7}
    pair = []
    for is_capturable in (True, False):
        *params, outside = make_params([(70,), (3, 9), (65,)], BF16, device)
        ema = EMA([*params, outside], decay=0.9)
        half_shadows(ema, BF16)
        ema.shadows["2"].add_(0.3)
        pair.append(SGD(params, **options, capturable=is_capturable, ema=ema))
    return pair[0], pair[1]


def assert_alike(one: SGD, two: SGD) -> None:
    params = [optimizer.param_groups[0]["params"] for optimizer in (one, two)]
    for p, q in zip(*params, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(momentum(one, p), momentum(two, q))
    averages = (optimizer.ema.shadows.values() for optimizer in (one, two))
    for s, t in zip(*averages, strict=True):
        assert_same_bits(s, t)


def step_or_skip(one: SGD, two: SGD, steps: range, skips: Callable[[int], bool]) -> int:
    """The first is told on the device to skip, the second does not step. Returns steps taken."""
    first, second = (optimizer.param_groups[0]["params"] for optimizer in (one, two))
    taken = 0
    for step in steps:
        one.found_inf = torch.tensor(float(skips(step)), device=first[0].device)
        trained(first, one, range(step, step + 1))
        if not skips(step):
            trained(second, two, range(step, step + 1))
            taken += 1
    del one.found_inf
    return taken


def test_steps_that_a_device_counts_round_like_others(device: torch.device) -> None:
    one, two = pair(device)
    taken = step_or_skip(one, two, range(6), lambda step: step % 3 == 0)
    assert_alike(one, two)
    # The host goes on where the device has stopped, and the other way round.
    one.param_groups[0]["capturable"] = False
    for optimizer in (one, two):
        trained(optimizer.param_groups[0]["params"], optimizer, range(6, 8))
    assert_alike(one, two)
    one.param_groups[0]["capturable"] = True
    taken += 2 + step_or_skip(one, two, range(8, 11), lambda step: step == 9)
    assert_alike(one, two)
    for optimizer in (one, two, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert optimizer.state_dict()["param_groups"][0]["rounding_steps"] == taken
    # What state_dict has counted is not counted again.
    taken += step_or_skip(one, two, range(11, 13), lambda _: False)
    assert_alike(one, two)
    assert one.state_dict()["param_groups"][0]["rounding_steps"] == taken


def test_a_checkpoint_of_steps_that_a_device_counts_resumes(device: torch.device) -> None:
    one, two = pair(device)
    step_or_skip(one, two, range(4), lambda step: step == 1)
    state, average = one.state_dict(), copy.deepcopy(one.ema.state_dict())
    resumed, _ = pair(device)
    params = [optimizer.param_groups[0]["params"] for optimizer in (resumed, one)]
    for p, q in zip(*params, strict=True):
        p.data.copy_(q.data)
    step_or_skip(resumed, pair(device)[1], range(3), lambda _: False)  # which loading forgets
    for p, q in zip(*params, strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(copy.deepcopy(state))
    resumed.ema.load_state_dict(average)
    step_or_skip(resumed, two, range(4, 7), lambda step: step == 5)
    assert_alike(resumed, two)


def test_what_torch_runs_rounds_by_the_steps_that_a_device_has_counted(
    device: torch.device,
) -> None:
    one, two = pair(device)
    step_or_skip(one, two, range(4), lambda step: step == 1)
    for optimizer in (one, two):
        params = optimizer.param_groups[0]["params"]
        set_gradients(params, 4)
        params[1].grad = params[1].grad.to_sparse()
        optimizer.step()
    assert_alike(one, two)


@pytest.mark.cuda
def test_replayed_steps_round_like_others() -> None:
    one, two = pair(torch.device("cuda"))
    first, second = (optimizer.param_groups[0]["params"] for optimizer in (one, two))
    set_gradients(first, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.step()
    kept = [p.grad for p in first]
    for step in range(4):
        set_gradients(first, step)
        for grad, p in zip(kept, first, strict=True):
            grad.copy_(p.grad)
        graph.replay()
        trained(second, two, range(step, step + 1))
    assert_alike(one, two)
    assert one.state_dict()["param_groups"][0]["rounding_steps"] == 4


@pytest.mark.parametrize("event", ["added", "switched on", "loaded from torch"])
def test_groups_count_alike_on_host_and_device(event: str, device: torch.device) -> None:
    def run(capturable: bool) -> tuple[list[Any], SGD]:
        params = make_params([(300,)] * 2, BF16, device)
        options: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "capturable": capturable}
        groups = [{"params": [p], "stochastic_rounding": i == 0} for i, p in enumerate(params)]
        optimizer = SGD(groups[: 1 if event == "added" else 2], **options)
        trained(params, optimizer, range(3))
        if event == "added":
            optimizer.add_param_group({**groups[1], "stochastic_rounding": True})
        elif event == "switched on":
            optimizer.param_groups[1]["stochastic_rounding"] = True
        else:
            optimizer.load_state_dict(
                torch.optim.SGD([{"params": [p]} for p in params]).state_dict()
            )
        trained(params, optimizer, range(3, 6))
        return params, optimizer

    (params, host), (twins, counted) = run(False), run(True)
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin)
    steps = [
        [group["rounding_steps"] for group in optimizer.state_dict()["param_groups"]]
        for optimizer in (host, counted)
    ]
    assert steps[0] == steps[1] == ([6, 3] if event == "added" else [6, 6])


def test_turning_it_off_keeps_the_count() -> None:
    params = make_params([(300,)], BF16)
    optimizer = SGD(params, lr=0.01, stochastic_rounding=True)
    group = optimizer.param_groups[0]
    trained(params, optimizer, range(2))
    group["stochastic_rounding"] = False
    before = params[0].detach().clone()
    trained(params, optimizer, range(2, 3))
    sgd_step_([before], [params[0].grad], None, lr=0.01)
    assert_same_bits(params[0], before)
    assert group["rounding_steps"] == 2


def test_replicas_round_alike_by_default_and_other_seeds_do_not() -> None:
    def run(**flags: Any) -> Tensor:
        params = make_params([(300,)], BF16)
        return trained(params, SGD(params, lr=0.01, stochastic_rounding=True, **flags))[0]

    assert_same_bits(run(), run())
    assert not torch.equal(run(), run(rounding_seed=1))


# --- with the rest of a step


@halves
def test_clipping_resets_and_scaling_go_with_it(dtype: torch.dtype, device: torch.device) -> None:
    params, twins = (make_params([(300,)], dtype, device) for _ in range(2))
    flags: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "stochastic_rounding": True}
    ours = SGD(params, **flags, max_grad_norm=0.125, reset_grads=True)
    plain = SGD(twins, **flags)
    for step in range(3):
        set_gradients(params, step)
        norm = params[0].grad.float().norm()
        for p, q in zip(params, twins, strict=True):
            q.grad_dtype = torch.float32
            q.grad = p.grad.float() * (0.125 / (norm + 1e-6))
        ours.step()
        plain.step()
        assert not params[0].grad.any()
    # The coefficient rounds otherwise, which changes a rounding now and then, not their mean.
    eps = torch.finfo(dtype).eps
    difference = (params[0].double() - twins[0].double()).abs()
    assert difference.max() <= 2 * eps * (1 + params[0].double().abs().max())
    assert (difference == 0).double().mean() > 0.95


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
@halves
def test_what_torch_runs_rounds_to_the_bits_of_the_kernels(
    dtype: torch.dtype, formulation: Any
) -> None:
    inner = random_tensor((700,), dtype)
    first = torch.nn.Parameter(torch.ones(2))
    param = torch.nn.Parameter(TwoTensor(inner.clone(), inner.clone()))
    plain = torch.nn.Parameter(inner.clone())
    # Powers of two, so that torch's order of operations rounds alike.
    flags: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "formulation": formulation}
    subclass = SGD([first, param], **flags, stochastic_rounding=True, rounding_seed=8)
    dense = SGD([torch.ones(2), plain], **flags, stochastic_rounding=True, rounding_seed=8)
    key = MOMENTUM_KEYS[formulation]
    for step in range(4):
        grad = random_tensor((700,), dtype, seed=step)
        param.grad, plain.grad = TwoTensor(grad.clone(), grad.clone()), grad.clone()
        subclass.step()
        dense.step()
        assert_same_bits(param.a.detach(), plain.detach(), str(step))
        assert_same_bits(param.b.detach(), plain.detach(), str(step))
        buffer = subclass.state[param][key]
        assert buffer.dtype == dtype
        assert_same_bits(buffer.a, dense.state[plain][key], str(step))


@halves
def test_torch_rounds_every_value_to_the_bits_of_the_kernels(dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 65512.0, 65524.0, 3.392e38, -3.398e38])
    values = torch.cat([values_of_all_sizes(dtype), special.repeat(20)])
    param = TwoTensor(*(torch.zeros(values.shape, dtype=dtype) for _ in range(2)))
    grad = TwoTensor(-values, -values)
    sgd_step_([param], [grad], None, lr=1.0, rounding=(2**64 - 1, 2**40))
    assert_same_bits(param.a, rounded(values, dtype, "param", (2**64 - 1, 2**40)))


@halves
def test_the_first_momentum_that_torch_computes_is_rounded_too(dtype: torch.dtype) -> None:
    grad = random_tensor((700,))
    new: list[Any] = [None, None]
    for i, kind in enumerate((lambda x: TwoTensor(x, x.clone()), torch.clone)):
        param, buffers = kind(torch.zeros(700, dtype=dtype)), [None]
        sgd_step_([param], [kind(grad)], buffers, lr=0.5, momentum=0.5, rounding=(1, 2))
        new[i] = buffers[0]
    assert_same_bits(new[0].a, new[1])
    assert not torch.equal(new[1], grad.to(dtype))


@halves
def test_the_average_of_what_torch_runs_rounds_to_the_bits_of_the_kernels(
    dtype: torch.dtype,
) -> None:
    inner = random_tensor((700,), dtype)
    for momentum_ in (0, 0.5):
        param = torch.nn.Parameter(TwoTensor(inner.clone(), inner.clone()))
        plain = torch.nn.Parameter(inner.clone())
        shadow, other = TwoTensor(inner * 2, inner * 2), inner * 2
        for step in range(3):
            grad = random_tensor((700,), dtype, seed=step)
            for p, g, s in ((param, TwoTensor(grad, grad), shadow), (plain, grad, other)):
                buffers = [torch.zeros_like(p, requires_grad=False)] if momentum_ else None
                sgd_step_(
                    [p],
                    [g],
                    buffers,
                    lr=0.5,
                    momentum=momentum_,
                    shadows=[s],
                    decay=0.5,
                    rounding=(1, step),
                )
        assert_same_bits(param.a.detach(), plain.detach())
        assert_same_bits(shadow.a, other)


def test_sparse_gradients_round_stochastically() -> None:
    dtype = BF16  # torch adds no sparse float16 on the CPU
    values = random_tensor((50, 8), dtype)
    sparse, dense = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    ours, twin = (SGD([p], lr=2.0**-8, stochastic_rounding=True) for p in (sparse, dense))
    for step in range(4):
        dense.grad = random_tensor((50, 8), dtype, seed=step)
        dense.grad[::2] = 0
        sparse.grad = dense.grad.to_sparse(1)
        ours.step()
        twin.step()
        assert_same_bits(sparse, dense)
    # Momentum of sparse gradients is sparse, and its parameter rounds all the same.
    param = torch.nn.Parameter(torch.ones(50, 8, dtype=dtype))
    optimizer = SGD([param], lr=1e-4, momentum=0.5, stochastic_rounding=True)
    for _ in range(20):
        param.grad = torch.ones(50, 8, dtype=dtype).to_sparse(1)
        optimizer.step()
    moved = 1 - float(param.detach().double().mean())
    assert abs(moved - 1e-4 * 38) < 4 * torch.finfo(dtype).eps / 2 * math.sqrt(1 / 400)


def test_distributed_tensors_round_their_own_part() -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours = torch.nn.Parameter(distribute_tensor(random_tensor((600,), BF16), mesh))
        plain = torch.nn.Parameter(random_tensor((600,), BF16))
        flags: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "stochastic_rounding": True}
        optimizer, expected = SGD([ours], **flags), SGD([plain], **flags)
        for step in range(3):
            plain.grad = random_tensor((600,), BF16, seed=step)
            ours.grad = distribute_tensor(plain.grad.clone(), mesh)
            optimizer.step()
            expected.step()
        assert isinstance(ours.data, DTensor)
        assert_same_bits(ours.to_local(), plain)
    finally:
        distributed.destroy_process_group()


def test_meta_and_complex_parameters_step() -> None:
    params = [
        torch.nn.Parameter(torch.ones(3, device="meta", dtype=BF16)),
        torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        torch.nn.Parameter(torch.ones(0, dtype=BF16)),
    ]
    optimizer = SGD(params, lr=0.5, momentum=0.5, stochastic_rounding=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(params[1].detach(), torch.full((3,), -0.25, dtype=torch.complex64))


# --- what it is for


def train(dtype: torch.dtype, gradient: Callable[[Tensor], Tensor], **options: Any) -> float:
    """From 1, 10,000 steps of 1e-4 with momentum: the mean of some parameters."""
    param = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = SGD([param], lr=1e-4, momentum=0.9, **options)
    for _ in range(10_000):
        param.grad = gradient(param.detach())
        optimizer.step()
    return float(param.detach().double().mean())


@halves
def test_small_steps_reach_the_target(dtype: torch.dtype) -> None:
    def gradient(param: Tensor) -> Tensor:
        return (param.float() - 1.25).to(param.dtype)

    single = train(torch.float32, gradient)
    assert abs(single - 1.25) < 1e-3
    assert abs(train(dtype, gradient) - single) > 0.1 * 0.25  # stalls on the way
    assert abs(train(dtype, gradient, stochastic_rounding=True) - single) < 0.01 * single


# --- refusals


@pytest.mark.parametrize("wrong", [-1, 2**64, 1.0, True, "0", None])
def test_a_seed_that_is_none_is_refused(wrong: Any) -> None:
    params = make_params([(3,)], BF16)
    with pytest.raises(ValueError, match=r"Invalid rounding_seed: .* expected an integer in \[0"):
        SGD(params, lr=0.1, rounding_seed=wrong)
    optimizer = SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="Invalid rounding_seed"):
        optimizer.add_param_group({"params": make_params([(3,)]), "rounding_seed": wrong})
    assert len(optimizer.param_groups) == 1
    for option in ("rounding_seed", "rounding_steps"):
        optimizer = SGD(params, lr=0.1, stochastic_rounding=True)
        optimizer.param_groups[0][option] = wrong
        set_gradients(params, 0)
        before = params[0].detach().clone()
        with pytest.raises(ValueError, match=f"Invalid {option}"):
            optimizer.step()
        assert_same_bits(params[0], before)
    optimizer = SGD(params, lr=0.1, stochastic_rounding=True)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(rounding_seed=wrong, lr=0.2)
    with pytest.raises(ValueError, match="Invalid rounding_seed"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("wrong", [7, (1,), (1, 2, 3), (-1, 0), (0, 2**64), (0.5, 0), [0, 1]])
def test_a_wrong_rounding_of_the_function_is_refused(wrong: Any) -> None:
    param = torch.ones(3, dtype=BF16)
    with pytest.raises(ValueError, match="rounding"):
        sgd_step_([param], [torch.ones(3)], None, lr=0.1, rounding=wrong)
    assert (param == 1).all()


def test_a_differentiable_step_refuses_it() -> None:
    with pytest.raises(ValueError, match="stochastic_rounding has no gradient"):
        SGD(make_params([(3,)]), lr=0.1, differentiable=True, stochastic_rounding=True)
