"""`master_weights`: what keeps half-precision parameters moving, against masters kept by hand."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from reference import (
    HALF_DTYPES,
    Rule,
    assert_ema_update,
    assert_same_bits,
    assert_sgd_step,
    legal_flags,
    make_params,
    random_tensor,
    set_gradients,
    sgd,
)
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fused_opt import _C, EMA, SGD, clip_grad_norm_
from fused_opt._masters import exact_value, store_
from fused_opt.functional import sgd_step_

MODES = ("fp32", "split", "kahan")
KEYS = {"fp32": "master", "split": "residual", "kahan": "compensation"}
REFINEMENT_DTYPES = {"fp32": torch.float32, "split": torch.int16}

#: Below and above the tiles of the CPU and the vectors and blocks of CUDA.
SHAPES = [(1,), (7,), (63,), (65,), (3, 43), (8193,)]

BF16, F16 = HALF_DTYPES
CASES = [
    (mode, dtype) for mode in MODES for dtype in HALF_DTYPES if (mode, dtype) != ("split", F16)
]
cases = pytest.mark.parametrize(("mode", "dtype"), CASES, ids=str)
modes = pytest.mark.parametrize("mode", MODES)

SPECIAL = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.39e38, 65519.0]
SPECIAL += [1e-40, -1e-45, 2.0**-126, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-9, -1.0 - 2.0**-8, 2.0**-25]


def ties_away(x: Tensor) -> Tensor:
    """The oracle of the rounding to bfloat16, in fp64: to nearest, ties away from zero."""
    down = (x.view(torch.int32) & -0x10000).view(torch.float32).double()
    # The next bfloat16 away from zero; beyond the largest one the spacing goes on.
    exponent = torch.frexp(down.where(down != 0, torch.tensor(2.0**-126).double()))[1]
    spacing = torch.ldexp(torch.ones_like(down), exponent.clamp(min=-125) - 8)
    up = down + spacing * torch.where(x < 0, -1.0, 1.0)
    nearest = torch.where((x.double() - down).abs() * 2 >= spacing, up, down)
    finite = torch.where(nearest.abs() >= 2.0**128, torch.inf * x.sign(), nearest)
    return torch.where(x.isfinite(), finite, x.double()).to(BF16)


def state_of(optimizer: SGD, param: Tensor) -> dict[str, Any]:
    return optimizer.state.get(param, {})


def exact(optimizer: SGD, param: Tensor) -> Tensor:
    """The value that the parameter and its refinement stand for."""
    state = state_of(optimizer, param)
    return next(exact_value(param, state[k]).clone() for k in KEYS.values() if k in state)


def assert_is_compensated_sum(param: Tensor, compensation: Tensor, expected: Tensor) -> None:
    """The parameter is the rounded result, and the compensation what that lost, rounded as well."""
    eps = torch.finfo(param.dtype).eps
    size = 1.0 + expected.abs()
    assert ((param.double() - expected).abs() <= eps / 2 * (1 + 1e-4) * size).all()
    total = param.double() + compensation.double()
    assert ((total - expected).abs() <= (eps / 2) ** 2 * size + 2.0**-20 * size).all()
    assert bool((compensation != 0).any()) or param.numel() < 8


# --- the equations


@cases
@pytest.mark.parametrize("with_ema", [False, True])
@pytest.mark.parametrize("flags", legal_flags(formulation=("torch", "sutskever")), ids=str)
def test_the_step_is_that_of_the_exact_value(
    mode: Any, dtype: torch.dtype, flags: dict[str, Any], with_ema: bool, device: torch.device
) -> None:
    params = make_params(SHAPES[2:5], dtype, device)
    ema = EMA(params, decay=0.75) if with_ema else None
    optimizer = SGD(params, lr=0.1, master_weights=mode, ema=ema, **flags)
    group = optimizer.param_groups[0]
    key = {"torch": "momentum_buffer", "sutskever": "velocity"}[flags["formulation"]]
    for step in range(4):
        set_gradients(params, step)
        before = []
        for p in params:
            value = exact(optimizer, p) if step else p.detach().float()
            momentum = state_of(optimizer, p).get(key)
            before.append((value, p.grad.clone(), None if momentum is None else momentum.clone()))
        shadows = [s.clone() for s in ema.shadows.values()] if ema else []
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            state = state_of(optimizer, p)
            refinement = state[KEYS[mode]]
            assert refinement.dtype == REFINEMENT_DTYPES.get(mode, dtype)
            momentum = state.get(key)
            if momentum is not None:
                assert momentum.dtype == (dtype if mode == "kahan" else torch.float32)
            if mode == "kahan":
                assert_is_compensated_sum(p, refinement, sgd(Rule.of(group), *old).param)
                follows = p
            else:
                value = exact(optimizer, p)
                assert_sgd_step(Rule.of(group), old, value, momentum, str(step))
                assert_same_bits(p, ties_away(value) if dtype == BF16 else value.to(dtype))
                follows = value
            if ema is not None:
                assert_ema_update(0.75, shadows[i], follows, list(ema.shadows.values())[i])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@cases
def test_every_size_is_stepped(
    mode: Any, dtype: torch.dtype, shape: Any, device: torch.device
) -> None:
    params = make_params([shape], dtype, device)
    twins = [torch.nn.Parameter(p.detach().reshape(-1)[:1].clone()) for p in params]
    ours = SGD(params, lr=0.1, momentum=0.9, master_weights=mode, ema=EMA(params, 0.9))
    alone = SGD(twins, lr=0.1, momentum=0.9, master_weights=mode, ema=EMA(twins, 0.9))
    for step in range(3):
        set_gradients(params, step)
        twins[0].grad = params[0].grad.reshape(-1)[:1].clone()
        ours.step()
        alone.step()
    assert_same_bits(params[0].detach().reshape(-1)[:1], twins[0].detach())
    last = params[0].detach().reshape(-1)[-1]
    assert not torch.equal(last, make_params([shape], dtype, device)[0].detach().reshape(-1)[-1])


# --- split is fp32


def run(mode: Any, steps: int, resume_at: int | None = None, **flags: Any) -> list[Tensor]:
    """A trajectory on special values and large ones; through a checkpoint, if asked for."""
    values = torch.tensor(SPECIAL * 8, dtype=torch.float32).to(BF16)
    params = [torch.nn.Parameter(values.clone()), *make_params(SHAPES, BF16)]
    generator = torch.Generator().manual_seed(0)

    def make() -> SGD:
        ema = EMA(params, decay=0.99)
        return SGD(params, lr=1e-3, momentum=0.9, weight_decay=1e-3, master_weights=mode, ema=ema)

    optimizer = make()
    for step in range(steps):
        if step == resume_at:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            averages = optimizer.ema.state_dict()
            optimizer.ema = None
            optimizer = make()
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            optimizer.ema.load_state_dict(averages)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(BF16)
            if step % 50 == 3:
                p.grad.view(-1)[step % p.numel()] = SPECIAL[step // 50 % len(SPECIAL)]
        optimizer.step()
    return [
        *(p.detach() for p in params),
        *(exact(optimizer, p) for p in params),
        *(state_of(optimizer, p)["momentum_buffer"] for p in params),
        *optimizer.ema.shadows.values(),
    ]


def test_split_equals_fp32_over_a_thousand_steps_and_through_a_checkpoint() -> None:
    whole = run("fp32", 1000)
    for resume_at in (None, 400):
        for a, b in zip(run("split", 1000, resume_at), whole, strict=True):
            assert_same_bits(a, b)
    for a, b in zip(run("fp32", 1000, 700), whole, strict=True):
        assert_same_bits(a, b)


def test_a_master_becomes_a_residual_and_back() -> None:
    params = make_params(SHAPES, BF16)
    optimizer = SGD(params, lr=0.1, momentum=0.9, master_weights="fp32")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    steady = SGD(twins, lr=0.1, momentum=0.9, master_weights="fp32")
    for step in range(6):
        optimizer.param_groups[0]["master_weights"] = "split" if step in (2, 3) else "fp32"
        for some, one in ((params, optimizer), (twins, steady)):
            set_gradients(some, step)
            one.step()
        keys = {"momentum_buffer", "residual" if step in (2, 3) else "master"}
        assert set(state_of(optimizer, params[0])) == keys
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p, q)
            assert_same_bits(exact(optimizer, p), exact(steady, q))


def test_a_compensation_is_not_taken_for_a_master() -> None:
    params = make_params([(5,)], BF16)
    optimizer = SGD(params, lr=0.1, master_weights="kahan")
    set_gradients(params, 0)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0]["master_weights"] = "split"
    with pytest.raises(ValueError, match=r"parameter 0 in group 0.*cannot be converted exactly"):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.slow
def test_every_float_is_split_and_joined_to_the_bit() -> None:
    torch.set_num_threads(1)  # on tensors that stay in the cache: 40 s
    count = 2**18
    param, residual = torch.empty(count, dtype=BF16), torch.empty(count, dtype=torch.int16)
    grad = torch.zeros(count, dtype=BF16)
    first = torch.arange(count, dtype=torch.int32)
    for start in range(-(2**31), 2**31, count):
        bits = first + start
        store_(bits.view(torch.float32), param, residual)
        joined = exact_value(param, residual).view(torch.int32)
        wrong = joined != bits
        assert not wrong.any() or bits.view(torch.float32)[wrong].isnan().all()
        # A step of 0 joins and splits in the kernel; of all values only -0 + 0 is another.
        sgd_step_([param], [grad], None, lr=0.0, refinements=[residual])
        changed = exact_value(param, residual).view(torch.int32) != joined
        assert not changed.any() or bits[changed].tolist() == [-(2**31)]


def test_kernels_split_as_the_oracle_rounds() -> None:
    coarse = torch.arange(-(2**31), 2**31, 2**11 - 1, dtype=torch.int64).to(torch.int32)
    values = torch.cat([coarse.view(torch.float32), torch.tensor(SPECIAL)])
    param = torch.zeros(values.shape, dtype=BF16)
    residual = torch.zeros(values.shape, dtype=torch.int16)
    sgd_step_([param], [-values], None, lr=1.0, refinements=[residual])
    expected = values + 0.0
    assert_same_bits(param, ties_away(expected))
    assert_same_bits(exact_value(param, residual), expected)


@pytest.mark.parametrize("sparse", [False, True])
@cases
def test_an_overflow_stays_infinite(mode: Any, dtype: torch.dtype, sparse: bool) -> None:
    # inf - inf as a compensation would turn it into NaN at the next step.
    param = torch.nn.Parameter(torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype))
    optimizer = SGD([param], lr=1.0, master_weights=mode)
    for _ in range(3):
        grad = torch.full((2, 3), -torch.finfo(dtype).max, dtype=dtype)
        param.grad = grad.to_sparse() if sparse else grad
        optimizer.step()
    assert_same_bits(param, torch.full((2, 3), torch.inf, dtype=dtype))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_plain_torch_settles_nan_like_the_kernels(bits: int) -> None:
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    param, residual = torch.zeros(1, dtype=BF16), torch.zeros(1, dtype=torch.int16)
    store_(value, param, residual)
    assert param.isnan()
    assert exact_value(param, residual).isnan()
    by_kernel = torch.zeros(1, dtype=BF16)
    sgd_step_([by_kernel], [value], None, lr=1.0, refinements=[residual.clone()])
    assert by_kernel.isnan()


# --- what it is for


def train(dtype: torch.dtype, gradient: Any, **options: Any) -> float:
    """From 1, 10,000 steps of 1e-4 with momentum."""
    param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = SGD([param], lr=1e-4, momentum=0.9, **options)
    for _ in range(10_000):
        param.grad = gradient(param.detach())
        optimizer.step()
    return float(param.detach()[0])


@cases
def test_small_steps_reach_the_target(mode: Any, dtype: torch.dtype) -> None:
    def gradient(param: Tensor) -> Tensor:
        return (param.float() - 1.25).to(param.dtype)

    single = train(torch.float32, gradient)
    assert abs(single - 1.25) < 1e-3
    assert abs(train(dtype, gradient) - single) > 0.1 * 0.25  # stalls on the way
    assert abs(train(dtype, gradient, master_weights=mode) - single) < 0.01 * single


@pytest.mark.parametrize(("mode", "dtype"), [c for c in CASES if c[0] != "kahan"], ids=str)
def test_no_update_is_lost_beside_a_master(mode: Any, dtype: torch.dtype) -> None:
    def gradient(param: Tensor) -> Tensor:
        return torch.full_like(param, -0.001)

    single = train(torch.float32, gradient)
    assert single > 1.009
    assert train(dtype, gradient) == 1.0
    spacing = torch.finfo(dtype).eps
    assert abs(train(dtype, gradient, master_weights=mode) - single) <= spacing / 2


# --- state


@cases
def test_a_checkpoint_resumes_to_the_same_bits(
    mode: Any, dtype: torch.dtype, device: torch.device
) -> None:
    def make(params: list[Any]) -> SGD:
        return SGD(params, lr=0.1, momentum=0.9, master_weights=mode)

    params = make_params(SHAPES, dtype, device)
    optimizer = make(params)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(resumed_params)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    copied_params = copied.param_groups[0]["params"]
    for step in range(3, 6):
        for some, one in (
            (params, optimizer),
            (resumed_params, resumed),
            (copied_params, copied),
        ):
            set_gradients(some, step)
            one.step()
    for p, q, r in zip(params, resumed_params, copied_params, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(p, r)
        assert_same_bits(exact(optimizer, p), exact(resumed, q))


@modes
def test_a_torch_checkpoint_starts_from_the_parameter(mode: Any) -> None:
    params = make_params(SHAPES, BF16)
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False)
    set_gradients(params, 0)
    theirs.step()
    ours = SGD(params, lr=0.1, momentum=0.9, master_weights=mode)
    ours.load_state_dict(theirs.state_dict())
    before = [p.detach().float() for p in params]
    momentums = [theirs.state[p]["momentum_buffer"].clone() for p in params]
    set_gradients(params, 1)
    ours.step()
    for p, old, v in zip(params, before, momentums, strict=True):
        torch.testing.assert_close(
            exact(ours, p), old - 0.1 * (0.9 * v.float() + p.grad.float()), rtol=1e-4, atol=1e-4
        )
    # And back: torch takes the momentum and does not mind the rest.
    theirs.load_state_dict(ours.state_dict())
    theirs.step()


@cases
def test_masters_follow_outside_changes_only_when_told(mode: Any, dtype: torch.dtype) -> None:
    params = make_params([(9,)], dtype)
    optimizer = SGD(params, lr=2.0**-20, master_weights=mode)
    set_gradients(params, 0)
    optimizer.step()
    with torch.no_grad():
        params[0].fill_(1.0)
    optimizer.sync_masters()
    assert_same_bits(params[0], torch.ones(9, dtype=dtype))
    assert_same_bits(exact(optimizer, params[0]), torch.ones(9))
    optimizer.step()
    expected = 1 - 2.0**-20 * params[0].grad.float()
    torch.testing.assert_close(exact(optimizer, params[0]), expected, rtol=2.0**-22, atol=0)


@modes
def test_full_precision_parameters_need_no_refinement(mode: Any, device: torch.device) -> None:
    single, half = make_params([(9,)], torch.float32, device), make_params([(9,)], BF16, device)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in single]
    optimizer = SGD([*single, *half], lr=0.1, momentum=0.9, master_weights=mode)
    plain = SGD(twins, lr=0.1, momentum=0.9)
    for step in range(3):
        set_gradients([*single, *half], step)
        set_gradients(twins, step)
        optimizer.step()
        plain.step()
    assert set(state_of(optimizer, single[0])) <= {"momentum_buffer"}
    assert KEYS[mode] in state_of(optimizer, half[0])
    assert_same_bits(single[0], twins[0])


@modes
def test_the_average_follows_the_master_without_a_gradient_too(mode: Any) -> None:
    params = make_params([(65,)], BF16)
    ema = EMA(params, decay=0.5)
    optimizer = SGD(params, lr=1e-3, master_weights=mode, ema=ema)
    set_gradients(params, 0)
    optimizer.step()
    follows = params[0].detach() if mode == "kahan" else exact(optimizer, params[0])
    shadow = ema.shadows["0"].clone()
    params[0].grad = None
    optimizer.step()
    assert_ema_update(0.5, shadow, follows, ema.shadows["0"])


@cases
def test_clipping_goes_with_a_refinement(
    mode: Any, dtype: torch.dtype, device: torch.device
) -> None:
    params, twins = (make_params(SHAPES, dtype, device) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "master_weights": mode}
    ours = SGD(params, max_grad_norm=0.5, **options)
    clipped = SGD(twins, state_dtype=None, **options)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad_dtype = q.grad_dtype = torch.float32
            p.grad = random_tensor(p.shape, torch.float32, device, seed=10 * step + i)
            q.grad = p.grad.clone()
        norm = clip_grad_norm_(twins, 0.5)
        assert norm > 0.5
        ours.step()
        clipped.step()
        assert_same_bits(ours.grad_norm, norm)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(exact(ours, p), exact(clipped, q), rtol=1e-5, atol=1e-5)


# --- where the kernels do not reach


@cases
def test_scattered_tensors_keep_their_refinement(mode: Any, dtype: torch.dtype) -> None:
    wide = random_tensor((6, 10), dtype)
    params = [torch.nn.Parameter(wide.clone()[:, ::2]), torch.nn.Parameter(wide.clone().t())]
    twins = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in params]
    ours, dense = (SGD(some, lr=0.1, momentum=0.9, master_weights=mode) for some in (params, twins))
    for step in range(3):
        set_gradients(twins, step)
        for p, q in zip(params, twins, strict=True):
            p.grad = q.grad.clone()
        ours.step()
        dense.step()
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(exact(ours, p), exact(dense, q))


@cases
def test_a_refinement_with_gaps_is_updated_in_place(mode: Any, dtype: torch.dtype) -> None:
    params = [random_tensor((33,), dtype) for _ in range(2)]
    of = REFINEMENT_DTYPES.get(mode, dtype)
    dense = params[0].float() if mode == "fp32" else torch.zeros(33, dtype=of)
    memory = torch.full((66,), 7, dtype=of)
    memory[::2] = dense
    for param, refinement in zip(params, (dense, memory[::2]), strict=True):
        sgd_step_([param], [torch.full((33,), 2.0**-12)], None, lr=1.0, refinements=[refinement])
    assert_same_bits(params[0], params[1])
    assert torch.equal(memory[::2], dense)
    assert torch.equal(memory[1::2], torch.full((33,), 7, dtype=of))


@cases
def test_sparse_gradients_step_the_exact_value(mode: Any, dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(4, 2, dtype=dtype))
    optimizer = SGD([param], lr=2.0**-12, master_weights=mode)
    for _ in range(4):
        rows, values = torch.tensor([[1]]), torch.ones(1, 2, dtype=dtype)
        param.grad = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
        optimizer.step()
    expected = torch.ones(4, 2)
    expected[1] -= 4 * 2.0**-12
    assert_same_bits(exact(optimizer, param), expected)
    assert_same_bits(param, expected.to(dtype))


def test_a_subclass_keeps_a_master() -> None:
    inner = random_tensor((5,), F16)
    param = torch.nn.Parameter(TwoTensor(inner.clone(), inner.clone()))
    plain = torch.nn.Parameter(inner.clone())
    optimizer = SGD([param, plain], lr=0.5, momentum=0.5, master_weights="fp32")
    for step in range(3):
        grad = random_tensor((5,), F16, seed=step)
        param.grad, plain.grad = TwoTensor(grad.clone(), grad.clone()), grad.clone()
        optimizer.step()
    assert_same_bits(param.a.detach(), plain.detach())


# --- refusals


def test_split_needs_bfloat16() -> None:
    params = make_params([(3,)], F16)
    optimizer = SGD(params, lr=0.1, master_weights="split")
    set_gradients(params, 0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="parameter 0 in group 0: expected a bfloat16 parameter"):
        optimizer.step()
    assert_same_bits(params[0], before)
    assert not optimizer.state


@pytest.mark.parametrize("wrong", ["bf16", "master", True, 32])
def test_what_is_no_mode_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="Invalid master_weights"):
        SGD(make_params([(3,)]), lr=0.1, master_weights=wrong)
    optimizer = SGD(make_params([(3,)]), lr=0.1)
    with pytest.raises(ValueError, match="Invalid master_weights"):
        optimizer.add_param_group({"params": make_params([(3,)]), "master_weights": wrong})
    assert len(optimizer.param_groups) == 1


def test_a_differentiable_step_refuses_masters() -> None:
    with pytest.raises(ValueError, match="master_weights would hide the parameters"):
        SGD(make_params([(3,)]), lr=0.1, differentiable=True, master_weights="fp32")


@pytest.mark.parametrize(
    ("dtype", "refinement", "names"),
    [
        (torch.float32, torch.float32, "float32 refinement beside a float32 parameter"),
        (F16, torch.int16, "int16 refinement beside a float16 parameter"),
        (BF16, F16, "float16 refinement beside a bfloat16 parameter"),
        (BF16, torch.int32, "int32 refinement beside a bfloat16 parameter"),
    ],
    ids=str,
)
def test_a_refinement_that_does_not_fit_is_refused_by_name(
    dtype: torch.dtype, refinement: torch.dtype, names: str
) -> None:
    param = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=names):
        sgd_step_(
            [param], [torch.ones(3)], None, lr=0.1, refinements=[torch.zeros(3, dtype=refinement)]
        )
    assert torch.equal(param, torch.ones(3, dtype=dtype))


def test_a_master_may_not_share_memory() -> None:
    memory = torch.zeros(8)
    param, other = torch.ones(8, dtype=BF16), torch.ones(8, dtype=BF16)
    with pytest.raises(ValueError, match=r"refinements.*shares memory"):
        sgd_step_([param, other], [torch.ones(8)] * 2, None, lr=0.1, refinements=[memory, memory])


@pytest.mark.parametrize("isa", _C.cpu_isas())
@cases
def test_every_isa_level_and_thread_count_gives_the_same_bits(
    mode: Any, dtype: torch.dtype, isa: str
) -> None:
    def run(level: str, threads: int) -> list[Tensor]:
        best = _C.cpu_isa()
        _C.set_cpu_isa(level)
        torch.set_num_threads(threads)
        try:
            params = make_params([*SHAPES, (70_001,)], dtype)
            optimizer = SGD(params, lr=0.1, momentum=0.9, master_weights=mode, ema=EMA(params))
            for step in range(3):
                set_gradients(params, step)
                optimizer.step()
        finally:
            _C.set_cpu_isa(best)
        return [*(p.detach() for p in params), *(exact(optimizer, p) for p in params)]

    for a, b in zip(run(isa, 1), run(_C.cpu_isa(), 2), strict=True):
        assert_same_bits(a, b)
