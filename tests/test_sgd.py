"""fused_opt.SGD: what a step computes and touches, and that it drops in for torch.optim.SGD."""

from __future__ import annotations

import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from reference import (
    DTYPES,
    FULL_DTYPES,
    HALF_DTYPES,
    Rule,
    assert_same_bits,
    assert_sgd_step,
    assert_within_the_promise,
    checked_step,
    flag_id,
    legal_flags,
    make_params,
    momentum_of,
    random_tensor,
    set_gradients,
    sgd,
    trajectory,
)
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.two_tensor import TwoTensor

import fused_opt
from fused_opt import _C, EMA, SGD

CHUNK = _C.chunk_elements
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 1000, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1)
SHAPES = [(17,), (3, 5), (), (0,), (2, 3, 4)]

#: Rules that between them run every path of the equations.
RULES = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "formulation": "sutskever"},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "formulation": "sutskever"},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
]
FORMULATIONS = ("torch", "sutskever")

all_rules = pytest.mark.parametrize("rule", RULES, ids=flag_id)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
full_dtypes = pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
half_dtypes = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
both_formulations = pytest.mark.parametrize("formulation", FORMULATIONS)


def tracked_by(params: list[torch.nn.Parameter], decay: float = 0.9) -> EMA:
    """An EMA of `params` whose shadows have already left them."""
    ema = EMA(params, decay=decay)
    for i, shadow in enumerate(ema.shadows.values()):
        shadow.copy_(random_tensor(shadow.shape, shadow.dtype, shadow.device, seed=500 + i))
    return ema


def clones(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Equal parameters with the same strides."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# --- the equations


@pytest.mark.parametrize(
    "flags",
    legal_flags(formulation=FORMULATIONS, ema=(False, True), reset_grads=(False, True)),
    ids=flag_id,
)
@all_dtypes
def test_every_combination_of_flags_follows_the_equations(flags, dtype, device):
    params = make_params(SHAPES, dtype, device)
    flags = dict(flags)
    ema = tracked_by(params) if flags.pop("ema") else None
    optimizer = SGD(params, lr=0.1, ema=ema, **flags)
    trajectory(optimizer, steps=5, tracked=params if ema else ())


DECOUPLED = [f for f in legal_flags(formulation=FORMULATIONS) if f["weight_decay"]]


@pytest.mark.parametrize("flags", DECOUPLED, ids=flag_id)
@all_dtypes
def test_decoupled_weight_decay_shrinks_the_parameter_alone(flags, dtype, device):
    params = make_params(SHAPES, dtype, device)
    trajectory(SGD(params, lr=0.1, decoupled_weight_decay=True, **flags))


@pytest.mark.parametrize("flags", DECOUPLED, ids=flag_id)
def test_decoupled_weight_decay_is_the_same_where_torch_steps(flags):
    wrapped, plain = (make_params([(5,)], torch.float64) for _ in range(2))
    wrapped = [torch.nn.Parameter(TwoTensor(p.detach().clone(), p.detach())) for p in wrapped]
    ours, kernels = (
        SGD(params, lr=0.1, decoupled_weight_decay=True, **flags) for params in (wrapped, plain)
    )
    for step in range(3):
        set_gradients(plain, step)
        wrapped[0].grad = TwoTensor(plain[0].grad.clone(), plain[0].grad.clone())
        ours.step()
        kernels.step()
        torch.testing.assert_close(wrapped[0].a.detach(), plain[0].detach(), rtol=1e-14, atol=0)


def test_decoupled_weight_decay_goes_with_sparse_gradients():
    param = torch.nn.Parameter(torch.ones(4, 2))
    param.grad = torch.sparse_coo_tensor([[1]], [[2.0, 2.0]], (4, 2), check_invariants=True)
    SGD([param], lr=0.5, weight_decay=0.5, decoupled_weight_decay=True).step()
    assert param.tolist() == [[0.75, 0.75], [-0.25, -0.25], [0.75, 0.75], [0.75, 0.75]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", [RULES[2], RULES[3]], ids=flag_id)
@all_dtypes
def test_every_size_follows_the_equations(size, rule, dtype, device):
    params = make_params([(size,)], dtype, device)
    trajectory(SGD(params, ema=tracked_by(params), **rule), steps=2, tracked=params)


@pytest.mark.parametrize("flags", legal_flags(), ids=flag_id)
@full_dtypes
def test_error_stays_within_the_promised_bound(flags, dtype, device):
    # Terms of one sign, and |p| larger than 10 |lr * u|: nothing cancels.
    def positive(seed: int) -> Tensor:
        return random_tensor((20_000,), dtype, device, seed).abs().clamp(max=1.0)

    param = torch.nn.Parameter(1.0 + positive(0))
    optimizer = SGD([param], lr=0.01, **flags)
    for step in range(5):
        param.grad = positive(1 + step) * (-1.0 if flags["maximize"] else 1.0)
        momentum = momentum_of(optimizer, param)
        before = (
            param.detach().clone(),
            param.grad.clone(),
            None if momentum is None else momentum.clone(),
        )
        optimizer.step()
        assert_within_the_promise(Rule.of(optimizer.param_groups[0]), before, param)


#: Twenty steps of rounding, on values of size 1 and with momentum summing up to ten gradients.
TRAJECTORY_TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-5},
    torch.float64: {"rtol": 1e-15, "atol": 1e-14},
}


@pytest.mark.parametrize("flags", legal_flags(), ids=flag_id)
@full_dtypes
def test_trajectory_equals_torch(flags, dtype, device):
    ours, theirs = (make_params(SHAPES, dtype, device) for _ in range(2))
    optimizer = SGD(ours, lr=0.1, **flags)
    expected = torch.optim.SGD(theirs, lr=0.1, foreach=False, **flags)
    for step in range(20):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **TRAJECTORY_TOLERANCE[dtype])
        assert optimizer.state[p].keys() == expected.state[q].keys()
        for key, value in expected.state[q].items():
            torch.testing.assert_close(
                optimizer.state[p][key], value, **TRAJECTORY_TOLERANCE[dtype]
            )


@both_formulations
def test_first_step_is_undamped(formulation, device):
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0], device=device))
    optimizer = SGD([param], lr=0.5, momentum=0.5, dampening=0.5, formulation=formulation)
    param.grad = torch.tensor([2.0, 4.0], device=device)
    optimizer.step()
    assert param.tolist() == [0.0, -4.0]
    optimizer.step()  # torch: v = .5 v + .5 g = g; sutskever: the same times -lr
    assert param.tolist() == [-1.0, -6.0]


def test_formulations_store_the_momentum_of_their_equations(device):
    for formulation, key, expected in (
        ("torch", "momentum_buffer", [[4.0], [6.0]]),
        ("sutskever", "velocity", [[-2.0], [-2.0]]),
    ):
        param = torch.nn.Parameter(torch.tensor([1.0], device=device))
        optimizer = SGD([param], lr=0.5, momentum=0.5, formulation=formulation)
        for lr, momentum in zip((0.5, 0.25), expected, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            param.grad = torch.tensor([4.0], device=device)
            optimizer.step()
            assert list(optimizer.state[param]) == [key]
            assert optimizer.state[param][key].tolist() == momentum


@pytest.mark.parametrize("flags", [f for f in legal_flags() if f["momentum"]], ids=flag_id)
def test_formulations_share_their_path_at_constant_lr_only(flags, device):
    params = {f: make_params(SHAPES, torch.float64, device) for f in FORMULATIONS}
    optimizers = {f: SGD(params[f], lr=0.1, formulation=f, **flags) for f in FORMULATIONS}

    def step(seed: int) -> list[float]:
        for formulation in FORMULATIONS:
            set_gradients(params[formulation], seed)
            optimizers[formulation].step()
        pairs = zip(params["torch"], params["sutskever"], strict=True)
        return [(p - q).abs().max().item() for p, q in pairs if p.numel()]

    for seed in range(5):
        assert max(step(seed)) < 1e-13
    for p, q in zip(params["torch"], params["sutskever"], strict=True):
        velocity = -0.1 * momentum_of(optimizers["torch"], p)
        torch.testing.assert_close(momentum_of(optimizers["sutskever"], q), velocity)
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.01
    assert min(step(5)) > 1e-3


def test_sutskever_with_changing_lr_follows_its_own_equation(device):
    # v = mu v - lr g, p = p + v, in numbers without rounding.
    param = torch.nn.Parameter(torch.tensor([8.0], device=device))
    optimizer = SGD([param], lr=0.5, momentum=0.5, formulation="sutskever")
    for lr, expected in ((0.5, 6.0), (0.25, 4.0), (1.0, -1.0)):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.tensor([4.0], device=device)
        optimizer.step()
        assert param.item() == expected


def test_sutskever_nesterov_looks_ahead(device):
    # v = mu v - lr g, p = p + mu v - lr g.
    param = torch.nn.Parameter(torch.tensor([8.0], device=device))
    optimizer = SGD([param], lr=0.5, momentum=0.5, nesterov=True, formulation="sutskever")
    for lr, velocity, expected in ((0.5, -2.0, 5.0), (0.25, -2.0, 3.0), (1.0, -5.0, -3.5)):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.tensor([4.0], device=device)
        optimizer.step()
        assert optimizer.state[param]["velocity"].item() == velocity
        assert param.item() == expected


@both_formulations
def test_maximize_climbs(formulation, device):
    param = torch.nn.Parameter(torch.tensor([3.0], device=device))
    optimizer = SGD([param], lr=0.1, momentum=0.5, maximize=True, formulation=formulation)
    values = []
    for _ in range(10):
        objective = -((param - 5.0) ** 2).sum()
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        values.append(objective.item())
    assert values[-1] > values[1] > values[0]


def test_weight_decay_is_added_after_the_sign_of_maximize(device):
    param = torch.nn.Parameter(torch.tensor([2.0], device=device))
    param.grad = torch.tensor([1.0], device=device)
    SGD([param], lr=0.5, weight_decay=0.5, maximize=True).step()
    assert param.item() == 2.0  # 2 - .5 (-1 + .5 * 2)


def test_zero_lr_still_builds_momentum(device):
    params = make_params(SHAPES, device=device)
    before = [p.detach().clone() for p in params]
    optimizer = SGD(params, lr=0.0, momentum=0.9)
    trajectory(optimizer, steps=2)
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p, old)


# --- dtypes


@half_dtypes
@pytest.mark.parametrize("flags", [f for f in legal_flags() if f["momentum"]], ids=flag_id)
@both_formulations
def test_half_parameters_use_the_unrounded_momentum(flags, formulation, dtype, device):
    # Starting at 0, the parameter is the update itself; times 3, its rounding is its own.
    param = torch.nn.Parameter(random_tensor((4096,), dtype, device))
    optimizer = SGD([param], lr=3.0, formulation=formulation, **flags)
    for seed in range(5):
        param.data.zero_()
        set_gradients([param], seed)
        checked_step(optimizer)


@half_dtypes
def test_momentum_is_rounded_only_to_be_stored(dtype, device):
    # v = .5 (1 + eps) + 1 = 1.5 + eps / 2 is halfway: stored as 1.5. The parameter is -5 v, where
    # 4 eps is an ulp: 7.5 + 2.5 eps is nearest to 7.5 + 4 eps, and 5 times the stored v is 7.5.
    eps = torch.finfo(dtype).eps
    param = torch.nn.Parameter(torch.zeros(9, dtype=dtype, device=device))
    optimizer = SGD([param], lr=5.0, momentum=0.5)
    optimizer.state[param]["momentum_buffer"] = torch.full_like(param.detach(), 1 + eps)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert momentum_of(optimizer, param).tolist() == [1.5] * 9
    assert param.tolist() == [-7.5 - 4 * eps] * 9


@pytest.mark.parametrize("grad_dtype", DTYPES[:1] + HALF_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:1] + HALF_DTYPES, ids=str)
@all_rules
def test_gradients_of_another_dtype_are_read_as_they_are(rule, dtype, grad_dtype, device):
    params = make_params(SHAPES, dtype, device)
    optimizer = SGD(params, ema=tracked_by(params), **rule)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad_dtype = grad_dtype
            p.grad = random_tensor(p.shape, grad_dtype, device, seed=10 * step + i)
        checked_step(optimizer, params)


@pytest.mark.parametrize("reset_grads", [False, True])
@all_rules
def test_dtypes_mix_in_one_optimizer(rule, reset_grads, device):
    params = [p for dtype in DTYPES for p in make_params(SHAPES, dtype, device)]
    optimizer = SGD(params, ema=tracked_by(params), reset_grads=reset_grads, **rule)
    trajectory(optimizer, steps=5, tracked=params)


@half_dtypes
def test_every_half_value_is_widened_and_rounded_exactly(dtype, device):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    param = torch.nn.Parameter(torch.zeros_like(every, device=device))
    param.grad = every.to(device)
    SGD([param], lr=1.0, maximize=True).step()
    assert_same_bits(param, every + 0.0)  # 0 + -0 is 0


@half_dtypes
def test_results_are_rounded_to_the_nearest_even_half(dtype, device):
    # fp16 drops 13 bits of fp32 and bf16 drops 16: every 2^12-th value contains all ties. With
    # their neighbours, and overflow, underflow and NaN.
    coarse = torch.arange(-(2**31), 2**31, 2**12, dtype=torch.int64)
    bits = torch.cat([coarse, coarse + 1, coarse - 1]).clamp(-(2**31), 2**31 - 1)
    values = bits.to(torch.int32).view(torch.float32)
    param = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype, device=device))
    param.grad_dtype = torch.float32
    param.grad = values.to(device)
    SGD([param], lr=1.0, maximize=True).step()
    assert_same_bits(param, (values + 0.0).to(dtype))


# --- special values

SPECIAL_VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38]
SPECIAL_VALUES += [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
@pytest.mark.parametrize("flags", [{}, {"momentum": 1.0}, {"momentum": 1.0, "nesterov": True}])
@pytest.mark.parametrize("maximize", [False, True])
@all_dtypes
def test_special_values_propagate_as_in_torch(flags, maximize, weight_decay, dtype, device):
    # Hyper-parameters of 1 make every product exact, so torch's bits are the only right ones. For
    # half types that is torch in fp32, rounded once after each step.
    values = torch.tensor(SPECIAL_VALUES, dtype=torch.float64).to(device, dtype)
    p, g, later = (t.contiguous() for t in torch.meshgrid(values, values, values, indexing="ij"))
    compute = torch.float32 if dtype in HALF_DTYPES else dtype
    ours, theirs = torch.nn.Parameter(p), torch.nn.Parameter(p.to(compute, copy=True))
    flags = {"lr": 1.0, "maximize": maximize, "weight_decay": weight_decay, **flags}
    optimizer, expected = SGD([ours], **flags), torch.optim.SGD([theirs], foreach=False, **flags)
    for gradient in (g, later):
        ours.grad, theirs.grad = gradient.clone(), gradient.to(compute, copy=True)
        optimizer.step()
        expected.step()
        theirs.data = theirs.data.to(dtype).to(compute)
        assert_same_bits(ours, theirs.to(dtype))
        if flags.get("momentum"):
            buffer = momentum_of(expected, theirs)
            assert_same_bits(momentum_of(optimizer, ours), buffer.to(dtype), "momentum")
            buffer.copy_(buffer.to(dtype))


@both_formulations
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_first_momentum_of_a_zero_gradient_keeps_its_sign(zero, formulation, device):
    param = torch.nn.Parameter(torch.ones(1, device=device))
    optimizer = SGD([param], lr=1.0, momentum=0.5, formulation=formulation)
    param.grad = torch.tensor([zero], device=device)
    optimizer.step()
    expected = sgd(Rule.of(optimizer.param_groups[0]), torch.ones(1), param.grad.cpu(), None)
    assert_same_bits(momentum_of(optimizer, param).cpu(), expected.momentum.float())


@full_dtypes
def test_subnormals_are_not_flushed(dtype, device):
    tiny = torch.finfo(dtype).smallest_normal
    param = torch.nn.Parameter(torch.zeros(9, dtype=dtype, device=device))
    param.grad = torch.full((9,), tiny / 4, dtype=dtype, device=device)
    SGD([param], lr=0.5, momentum=0.5).step()
    assert param.tolist() == [-tiny / 8] * 9


# --- shapes, strides and storage


#: Ways to lay out the elements of a (4, 3, 5, 2) tensor in a storage of their own.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "last_of_pairs": lambda t: torch.stack([t, t], -1)[..., 1],
    "column_of_matrix": lambda t: torch.stack([t.flatten()] * 3, 1)[:, 1].unflatten(0, t.shape),
    "every_second_row": lambda t: torch.cat([t, t], 1)[:, ::2].copy_(t),
    "odd_offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "odd_offset_3": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
}
#: Only for gradients: a parameter's elements may not overlap.
GRADIENT_LAYOUTS = {
    **LAYOUTS,
    "expanded": lambda t: t[:1, :, :1].expand(t.shape),
}
LAYOUT_SHAPE = (4, 3, 5, 2)


def whole_storage(view: Tensor) -> Tensor:
    """All elements of the storage that `view` looks at."""
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())


@pytest.mark.parametrize("grad_layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_of_parameter_and_gradient_is_stepped(layout, grad_layout, dtype, device):
    param = torch.nn.Parameter(LAYOUTS[layout](random_tensor(LAYOUT_SHAPE, dtype, device)))
    strides = param.stride()
    storage = whole_storage(param.data)
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(param.shape, strides, param.storage_offset()).fill_(False)
    untouched = storage[outside].clone()

    tracked = [param, *make_params([(3, 2)], dtype, device, seed=9)]  # the second has no gradient
    optimizer = SGD(tracked, lr=0.1, momentum=0.9, weight_decay=0.1, ema=tracked_by(tracked))
    for seed in range(5):
        values = random_tensor(LAYOUT_SHAPE, dtype, device, seed=1 + seed)
        param.grad = GRADIENT_LAYOUTS[grad_layout](values)
        checked_step(optimizer, tracked)
    assert param.stride() == strides
    assert_same_bits(storage[outside], untouched, "elements around the parameter")


#: Tensors whose memory holds the negative of their values, dense and with gaps.
NEGATIVE_VIEWS = {
    "dense": lambda t: torch._neg_view(-t),
    "imaginary part": lambda t: torch.complex(t, -t).conj().imag,
}


@pytest.mark.parametrize("view", NEGATIVE_VIEWS)
@full_dtypes
def test_gradients_behind_a_negative_bit_are_read_negated(view, dtype, device):
    params = make_params([(17,), (3, 5)], dtype, device)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    for step in range(3):
        for p in params:
            p.grad = NEGATIVE_VIEWS[view](random_tensor(p.shape, dtype, device, seed=step))
            assert p.grad.is_neg()
        checked_step(optimizer)


@pytest.mark.parametrize("view", NEGATIVE_VIEWS)
def test_parameters_behind_a_negative_bit_are_stepped(view, device):
    params = [torch.nn.Parameter(NEGATIVE_VIEWS[view](random_tensor((9,), device=device)))]
    assert params[0].is_neg()
    trajectory(SGD(params, lr=0.1, momentum=0.9, ema=tracked_by(params)), 3, tracked=params)


@pytest.mark.parametrize(
    "layout", [k for k in LAYOUTS if k not in ("last_of_pairs", "column_of_matrix")]
)
def test_momentum_takes_the_strides_of_a_dense_parameter(layout, device):
    param = torch.nn.Parameter(LAYOUTS[layout](random_tensor(LAYOUT_SHAPE, device=device)))
    param.grad = random_tensor(LAYOUT_SHAPE, device=device).transpose(0, 1).clone().transpose(0, 1)
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    assert momentum_of(optimizer, param).stride() == torch.empty_like(param).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_momentum_of_any_strides_is_accepted(layout, device):
    # As after loading a checkpoint, or after a memory format conversion of the model.
    param = torch.nn.Parameter(random_tensor(LAYOUT_SHAPE, device=device))
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    buffer = LAYOUTS[layout](random_tensor(LAYOUT_SHAPE, device=device, seed=1))
    optimizer.state[param]["momentum_buffer"] = buffer
    trajectory(optimizer, steps=2)


@pytest.mark.parametrize("layout", [k for k in LAYOUTS if "offset" not in k])
def test_reset_of_strided_gradients_clears_only_the_gradient(layout, device):
    param = torch.nn.Parameter(random_tensor(LAYOUT_SHAPE, device=device))
    param.grad = LAYOUTS[layout](random_tensor(LAYOUT_SHAPE, device=device, seed=1))
    total = whole_storage(param.grad).count_nonzero()
    checked_step(SGD([param], lr=0.1, momentum=0.9, reset_grads=True))
    assert total - whole_storage(param.grad).count_nonzero() == param.numel()


def test_neighbours_in_one_buffer_are_stepped_separately(device):
    # As flattened models have them: views of one storage, at every alignment.
    buffer = random_tensor((200,), device=device)
    ends = (0, 1, 3, 6, 10, 27, 60, 61, 200)
    params = [torch.nn.Parameter(buffer[a:b]) for a, b in itertools.pairwise(ends)]
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    trajectory(optimizer, steps=5)


@all_rules
@all_dtypes
def test_many_tensors_are_stepped_together(rule, dtype, device):
    # More than a launch carries. What is right for the whole is right for its parts.
    sizes = [1 + i % 5 for i in range(1700)]
    whole = make_params([(sum(sizes),)], dtype, device)
    parts = [torch.nn.Parameter(t.clone()) for t in whole[0].detach().split(sizes)]
    one, many = (SGD(params, ema=EMA(params, decay=0.9), **rule) for params in (whole, parts))
    for step in range(3):
        set_gradients(whole, seed=step)
        for p, grad in zip(parts, whole[0].grad.split(sizes), strict=True):
            p.grad = grad.clone()
        one.step()
        many.step()
    assert_same_bits(torch.cat([p.detach() for p in parts]), whole[0])
    assert_same_bits(torch.cat(list(many.ema.shadows.values())), one.ema.shadows["0"], "shadow")


def test_no_parameter_has_a_gradient(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    checked_step(optimizer)
    assert not optimizer.state


def test_frozen_parameters_stay(device):
    params = make_params(SHAPES, device=device)
    frozen = params[1].requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, ema=tracked_by(params))
    for step in range(5):
        set_gradients([p for p in params if p.requires_grad], seed=step)
        checked_step(optimizer, params)
    assert_same_bits(frozen, before)
    assert frozen not in optimizer.state


@both_formulations
@pytest.mark.parametrize("fused", [None, False, True])
def test_gradients_may_come_and_go(formulation, fused, device):
    params = make_params([(5,), (6,), (7,)], device=device)
    optimizer = SGD(
        params, lr=0.1, momentum=0.9, dampening=0.5, formulation=formulation, fused=fused
    )
    for step, present in enumerate(([0], [0, 1], [1, 2], [], [0, 1, 2])):
        optimizer.zero_grad()
        set_gradients([params[i] for i in present], seed=step)
        checked_step(optimizer)


def test_a_none_in_the_state_counts_as_no_momentum(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    for p in params:
        optimizer.state[p]["momentum_buffer"] = None
    trajectory(optimizer, steps=2)


def test_replaced_data_and_buffers_are_used(device):
    param = make_params([(9,)], device=device)[0]
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    for step in range(5):
        set_gradients([param], seed=step)
        checked_step(optimizer)
        param.data = random_tensor((9,), device=device, seed=40 + step)
        optimizer.state[param]["momentum_buffer"] = random_tensor((9,), device=device, seed=step)


def test_parameters_may_change_their_nature_between_steps(device):
    # What the step has learnt about a tensor must not outlive it.
    param = torch.nn.Parameter(random_tensor(LAYOUT_SHAPE, device=device))
    optimizer = SGD([param], lr=0.1, weight_decay=0.1)
    for seed, (layout, dtype) in enumerate(
        (
            ("contiguous", torch.float32),
            ("channels_last", torch.float32),
            ("column_of_matrix", torch.bfloat16),
            ("contiguous", torch.float64),
            ("odd_offset", torch.float16),
        )
    ):
        param.grad = None
        param.data = LAYOUTS[layout](random_tensor(LAYOUT_SHAPE, dtype, device, seed=seed))
        param.grad = random_tensor(LAYOUT_SHAPE, dtype, device, seed=10 + seed)
        for _ in range(2):
            checked_step(optimizer)


def test_momentum_buffers_keep_their_storage(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    trajectory(optimizer, steps=1)
    buffers = [momentum_of(optimizer, p) for p in params]
    trajectory(optimizer, steps=2)
    assert all(momentum_of(optimizer, p) is b for p, b in zip(params, buffers, strict=True))


def test_first_momentum_does_not_alias_the_gradient(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, seed=0)
    optimizer.step()
    before = [momentum_of(optimizer, p).clone() for p in params]
    for p in params:
        p.grad.zero_()
    for p, old in zip(params, before, strict=True):
        assert_same_bits(momentum_of(optimizer, p), old)


# --- hyper-parameters


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@both_formulations
def test_lr_may_be_a_tensor_of_one_element(shape, dtype, formulation, device):
    lr = torch.full(shape, 0.125, dtype=dtype)
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=lr, momentum=0.9, formulation=formulation)
    trajectory(optimizer, steps=2)
    lr.fill_(0.5)
    trajectory(optimizer, steps=2)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.shape == shape
    assert lr.item() == 0.5


@pytest.mark.cuda
def test_lr_may_be_a_tensor_on_the_gpu():
    params = make_params(SHAPES, device="cuda")
    lr = torch.tensor(0.125, device="cuda")
    optimizer = SGD(params, lr=lr, momentum=0.9)
    trajectory(optimizer, steps=2)
    lr.fill_(0.5)
    trajectory(optimizer, steps=2)


def test_weight_decay_may_be_a_tensor(device):
    params = make_params(SHAPES, device=device)
    trajectory(SGD(params, lr=0.1, momentum=0.9, weight_decay=torch.tensor(0.125)), steps=2)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0 / (1 + epoch)),
    # These two write the momentum of a group as well.
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_schedulers_drive_the_step(name, tensor_lr, device):
    params = make_params(SHAPES, torch.float64, device)
    twins = clones(params)
    flags = {"lr": torch.tensor(0.1) if tensor_lr else 0.1, "momentum": 0.9, "nesterov": True}
    optimizer, expected = SGD(params, **flags), torch.optim.SGD(twins, foreach=False, **flags)
    if tensor_lr:
        expected.param_groups[0]["lr"] = torch.tensor(0.1)
    schedulers = [SCHEDULERS[name](optimizer), SCHEDULERS[name](expected)]
    seen = set()
    for step in range(6):
        seen.add(float(optimizer.param_groups[0]["lr"]))
        set_gradients(params, seed=step)
        set_gradients(twins, seed=step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where a scheduler runs before the step
            checked_step(optimizer)
            expected.step()
            for scheduler in schedulers:
                scheduler.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, **TRAJECTORY_TOLERANCE[torch.float64])
    assert len(seen) > 1


def test_groups_have_their_own_settings(device):
    groups = [
        {"params": make_params(SHAPES, device=device, seed=1), "lr": 0.5},
        {"params": make_params(SHAPES, device=device, seed=2), "momentum": 0.0},
        {"params": make_params(SHAPES, device=device, seed=3), "formulation": "sutskever"},
        {"params": make_params(SHAPES, device=device, seed=4), "nesterov": True, "maximize": True},
        {"params": make_params(SHAPES, device=device, seed=5), "dampening": 0.5},
        {"params": make_params(SHAPES, device=device, seed=6), "weight_decay": 0.3},
        {"params": make_params(SHAPES, device=device, seed=7), "reset_grads": True},
    ]
    params = [p for group in groups for p in group["params"]]
    optimizer = SGD(groups, lr=0.1, momentum=0.9, ema=tracked_by(params))
    trajectory(optimizer, steps=5, tracked=params)


def test_a_group_may_join_later(device):
    first, second = (make_params(SHAPES, device=device, seed=i) for i in range(2))
    optimizer = SGD(first, lr=0.1, momentum=0.9, dampening=0.5)
    trajectory(optimizer, steps=2)
    optimizer.add_param_group({"params": second, "lr": 0.3})
    assert optimizer.param_groups[1]["formulation"] == "torch"
    trajectory(optimizer, steps=2)


@both_formulations
def test_momentum_may_be_turned_on_later(formulation, device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, dampening=0.5, formulation=formulation)
    trajectory(optimizer, steps=2)
    assert all(momentum_of(optimizer, p) is None for p in params)
    optimizer.param_groups[0]["momentum"] = 0.9
    trajectory(optimizer, steps=2)


def test_momentum_may_be_turned_off_and_on_again(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    for momentum in (0.9, 0.0, 0.9):  # the buffer rests, then goes on from where it was
        optimizer.param_groups[0]["momentum"] = momentum
        trajectory(optimizer, steps=2)


# --- the average in the step

DECAYS = (0.0, 0.3, 0.999, 1.0)


@pytest.mark.parametrize("decay", DECAYS)
@all_rules
@all_dtypes
def test_average_in_the_step_equals_step_then_update(rule, decay, dtype, device):
    shapes = [*SHAPES, (1001,)]
    ours, twins = (make_params(shapes, dtype, device) for _ in range(2))
    attached, alone = (tracked_by(p, decay) for p in (ours, twins))
    optimizer, plain = SGD(ours, ema=attached, **rule), SGD(twins, **rule)
    for step in range(5):
        set_gradients(ours[: 3 + step], seed=step)
        set_gradients(twins[: 3 + step], seed=step)
        optimizer.step()
        plain.step()
        alone.update()
    assert attached.num_updates == alone.num_updates == 5
    for p, q in zip(ours, twins, strict=True):
        assert_same_bits(p, q, "parameter")
        if q in plain.state:
            assert_same_bits(momentum_of(optimizer, p), momentum_of(plain, q), "momentum")
    for name, shadow in alone.shadows.items():
        assert_same_bits(attached.shadows[name], shadow, f"shadow {name}")


def test_average_follows_parameters_outside_the_optimizer(device):
    inside, outside = (make_params(SHAPES, device=device, seed=i) for i in range(2))
    optimizer = SGD(inside, lr=0.1, momentum=0.9, ema=tracked_by([*inside, *outside]))
    for step in range(3):
        set_gradients(inside, seed=step)
        checked_step(optimizer, [*inside, *outside])


def test_average_tracks_only_what_it_was_given(device):
    inside, more = (make_params(SHAPES, device=device, seed=i) for i in range(2))
    optimizer = SGD([*inside, *more], lr=0.1, momentum=0.9, ema=tracked_by(inside))
    trajectory(optimizer, steps=3, tracked=inside)


def test_average_goes_on_without_any_gradient(device):
    params = make_params(SHAPES, device=device)
    checked_step(SGD(params, lr=0.1, momentum=0.9, ema=tracked_by(params)), params)


def test_average_may_be_attached_and_detached(device):
    params = make_params(SHAPES, device=device)
    ema = tracked_by(params)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    assert optimizer.ema is None
    trajectory(optimizer, steps=1)
    optimizer.ema = ema
    trajectory(optimizer, steps=2, tracked=params)
    optimizer.ema = None
    before = [s.clone() for s in ema.shadows.values()]
    trajectory(optimizer, steps=1)
    for shadow, old in zip(ema.shadows.values(), before, strict=True):
        assert_same_bits(shadow, old)


# --- gradients


def test_reset_leaves_none_and_keeps_storage(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, reset_grads=True)
    set_gradients(params[:2], seed=0)
    gradients = [p.grad for p in params]
    checked_step(optimizer)  # asserts zeros in the same storage
    assert [p.grad for p in params] == gradients
    assert all(p.grad is None for p in params[2:])


def test_reset_gradients_accumulate_the_next_backward_alone(device):
    model = torch.nn.Linear(3, 2).to(device)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, reset_grads=True)
    inputs = random_tensor((4, 3), device=device)
    for _ in range(3):
        loss = model(inputs).square().sum()
        expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        for p, g in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g)
        optimizer.step()


def test_zero_grad_is_torchs(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, reset_grads=True)
    set_gradients(params, seed=0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.count_nonzero() == 0 for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


# --- autograd


def stale_graph(tensor: Tensor) -> Tensor:
    """A scalar whose backward needs the present value of `tensor`."""
    weight = torch.ones_like(tensor, requires_grad=True)
    return (weight * tensor).sum()


@pytest.mark.parametrize("what", ["parameter", "shadow", "reset gradient"])
@pytest.mark.parametrize("fused", [None, True])
def test_a_stale_graph_raises_instead_of_using_new_values(what, fused, device):
    param = make_params([(4,)], device=device)[0]
    set_gradients([param], seed=0)
    ema = tracked_by([param])
    optimizer = SGD([param], lr=0.1, momentum=0.9, ema=ema, reset_grads=True, fused=fused)
    tensor = {"parameter": param, "shadow": ema.shadows["0"], "reset gradient": param.grad}[what]
    loss = stale_graph(tensor)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_on_kept_gradients_stays_valid(device):
    param = make_params([(4,)], device=device)[0]
    set_gradients([param], seed=0)
    loss = stale_graph(param.grad)
    SGD([param], lr=0.1, momentum=0.9, nesterov=True).step()
    loss.backward()


def test_momentum_of_a_step_with_graph_gradients_is_detached(device):
    param = make_params([(4,)], device=device)[0]
    (param.grad,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
    assert param.grad.requires_grad
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    assert not momentum_of(optimizer, param).requires_grad
    assert param.is_leaf


def test_closure_runs_once_with_gradients_enabled(device):
    param = torch.nn.Parameter(torch.tensor([3.0], device=device))
    optimizer = SGD([param], lr=0.25)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert loss.item() == 9.0
    assert param.item() == 1.5
    assert torch.is_grad_enabled()
    assert optimizer.step() is None


def test_step_runs_in_inference_mode(device):
    params = make_params(SHAPES, device=device)
    twins = clones(params)
    optimizer, expected = (
        SGD(params, lr=0.1, momentum=0.9, ema=tracked_by(params)),
        SGD(twins, lr=0.1, momentum=0.9),
    )
    for step in range(2):
        set_gradients(params, seed=step)
        set_gradients(twins, seed=step)
        with torch.inference_mode():
            optimizer.step()
        expected.step()
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)


# --- hooks


@pytest.fixture
def fired() -> Iterator[list[str]]:
    """The names of the global step hooks in the order in which they ran."""
    names: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: names.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: names.append("global post")),
    ]
    yield names
    for handle in handles:
        handle.remove()


def dense_gradient(param: Tensor) -> None:
    param.grad = torch.ones_like(param)


def sparse_gradient(param: Tensor) -> None:
    param.grad = torch.ones_like(param).to_sparse()


@pytest.mark.parametrize(
    ("give_gradient", "differentiable"),
    [(dense_gradient, False), (dense_gradient, True), (sparse_gradient, False)],
)
def test_hooks_fire_exactly_once(give_gradient, differentiable, fired, device):
    # torch wraps a class's step when its first instance is made; ours must not be wrapped twice.
    torch.optim.SGD(make_params(SHAPES))
    param = random_tensor((4,), device=device)
    optimizer = SGD([param], lr=0.1, momentum=0.9, differentiable=differentiable)
    torch.optim.SGD(make_params(SHAPES))
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    for _ in range(2):
        fired.clear()
        give_gradient(param)
        optimizer.step()
        assert sorted(fired[:2]) == ["global pre", "pre"]
        assert sorted(fired[2:]) == ["global post", "post"]


def test_pre_hook_sees_the_state_before_and_post_hook_after(device):
    param = torch.nn.Parameter(torch.tensor([3.0], device=device))
    param.grad = torch.tensor([1.0], device=device)
    optimizer = SGD([param], lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(param.item()))
    optimizer.register_step_post_hook(lambda *_: seen.append(param.item()))
    optimizer.step()
    assert seen == [3.0, 2.0]


# --- the same bits everywhere


def bits_of_a_run(rule: dict, seed: int = 0) -> list[Tensor]:
    """Parameters, momentum and shadows after three steps over awkward sizes in every dtype."""
    sizes = [(n,) for n in (1, 7, 31, 33, 1000, CHUNK + 17, 70_001)]
    params = [p for dtype in DTYPES for p in make_params(sizes, dtype, seed=seed)]
    # A view at an odd offset runs the peeled or the scalar loop.
    params += [torch.nn.Parameter(random_tensor((CHUNK + 5,), dtype)[3:]) for dtype in DTYPES]
    ema = tracked_by(params, decay=0.99)
    optimizer = SGD(params, ema=ema, **rule)
    for step in range(3):
        set_gradients(params, seed=step)
        optimizer.step()
    momentum = [momentum_of(optimizer, p) for p in params if rule.get("momentum")]
    return [p.detach() for p in params] + momentum + list(ema.shadows.values())


def assert_all_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"tensor {i}")


@all_rules
def test_bits_do_not_depend_on_the_number_of_threads(rule):
    torch.set_num_threads(1)
    expected = bits_of_a_run(rule)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_all_same_bits(bits_of_a_run(rule), expected)


def test_bits_do_not_depend_on_the_calling_thread():
    expected = bits_of_a_run(RULES[2])
    results: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(bits_of_a_run(RULES[2])))
    thread.start()
    thread.join()
    assert_all_same_bits(results[0], expected)


@pytest.fixture
def restored_isa() -> Iterator[None]:
    """Puts the instruction set level back."""
    before = _C.cpu_isa()
    yield
    _C.set_cpu_isa(before)


@all_rules
def test_bits_do_not_depend_on_the_instruction_set(rule, restored_isa):
    levels = _C.cpu_isas()
    assert levels[0] == "baseline"
    _C.set_cpu_isa(levels[0])
    expected = bits_of_a_run(rule)
    for level in levels[1:]:
        _C.set_cpu_isa(level)
        assert _C.cpu_isa() == level
        assert_all_same_bits(bits_of_a_run(rule), expected)


@half_dtypes
@pytest.mark.parametrize("level", _C.cpu_isas())
def test_every_instruction_set_converts_halves_exactly(level, dtype, restored_isa):
    _C.set_cpu_isa(level)
    test_every_half_value_is_widened_and_rounded_exactly(dtype, torch.device("cpu"))
    test_results_are_rounded_to_the_nearest_even_half(dtype, torch.device("cpu"))


@pytest.mark.parametrize("level", _C.cpu_isas())
def test_every_instruction_set_follows_the_equations(level, restored_isa):
    _C.set_cpu_isa(level)
    assert fused_opt.build_info()["cpu_isa"] == level
    for rule in RULES:
        test_dtypes_mix_in_one_optimizer(rule, True, torch.device("cpu"))


# --- loss scaling


class ScaledRun:
    """A parameter of ones under a GradScaler, whose gradient is a chosen vector times the scale."""

    SCALE = 1024.0

    def __init__(self, device: torch.device, **options) -> None:
        self.param = torch.nn.Parameter(torch.ones(3, device=device))
        self.ema = tracked_by([self.param])
        self.optimizer = SGD([self.param], momentum=0.9, lr=0.1, ema=self.ema, **options)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=self.SCALE)

    def backward(self, *gradient: float) -> None:
        self.optimizer.zero_grad()
        weights = torch.tensor(gradient, device=self.param.device)
        self.scaler.scale((self.param * weights).sum()).backward()

    def state(self) -> list[Tensor]:
        momentum = momentum_of(self.optimizer, self.param)
        tensors = [self.param, *self.ema.shadows.values(), momentum]
        return [t.detach().clone() for t in tensors if t is not None]


INF = float("inf")
fused_or_not = pytest.mark.parametrize("fused", [None, True])


@fused_or_not
@pytest.mark.parametrize("unscale", ["in the step", "before the step"])
def test_scaler_steps_as_without_it(fused, unscale, device):
    run = ScaledRun(device, fused=fused)
    twin = torch.nn.Parameter(torch.ones(3, device=device))
    expected = torch.optim.SGD([twin], momentum=0.9, lr=0.1, foreach=False)
    for gradient in ((1.0, 2.0, -3.0), (0.5, -1.0, 4.0)):
        run.backward(*gradient)
        if unscale == "before the step":
            run.scaler.unscale_(run.optimizer)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        twin.grad = torch.tensor(gradient, device=device)
        expected.step()
        torch.testing.assert_close(run.param, twin)
    assert run.ema.num_updates == 2
    assert not hasattr(run.optimizer, "grad_scale")
    assert not hasattr(run.optimizer, "found_inf")


@fused_or_not
def test_overflow_on_the_first_step_leaves_no_trace(fused, device):
    run = ScaledRun(device, fused=fused)
    before = run.state()
    run.backward(INF, 1.0, 1.0)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    assert run.scaler.get_scale() == run.SCALE / 2
    assert_same_bits(run.param, before[0])
    assert_same_bits(run.ema.shadows["0"], before[1])
    assert run.ema.num_updates == 0

    run.backward(1.0, 2.0, -3.0)
    run.scaler.step(run.optimizer)
    assert_sgd_step(
        Rule(lr=0.1, momentum=0.9),
        (before[0], torch.tensor([1.0, 2.0, -3.0], device=device), None),
        run.param,
        momentum_of(run.optimizer, run.param),
    )


@both_formulations
def test_a_damped_first_step_after_an_overflow_is_undamped(formulation, device):
    run = ScaledRun(device, dampening=0.5, formulation=formulation)
    run.backward(INF, 1.0, 1.0)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.backward(1.0, 2.0, -3.0)
    run.scaler.step(run.optimizer)
    expected = 1.0 - 0.1 * torch.tensor([1.0, 2.0, -3.0], device=device)
    torch.testing.assert_close(run.param.detach(), expected)


@pytest.mark.parametrize("found", [1.0, 2.0, 0.5])
@fused_or_not
def test_any_nonzero_found_inf_skips_everything(found, fused, device):
    run = ScaledRun(device, fused=fused)
    run.param.grad = torch.ones(3, device=device)
    run.optimizer.step()
    before = run.state()
    run.optimizer.found_inf = torch.tensor(found, device=device)
    run.optimizer.grad_scale = torch.tensor(2.0, device=device)
    run.optimizer.step()
    for after, old in zip(run.state(), before, strict=True):
        assert_same_bits(after, old)
    assert run.ema.num_updates == 1


@all_rules
@fused_or_not
def test_grad_scale_divides_the_gradients_without_writing_them(fused, rule, device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, fused=fused, **rule)
    for step in range(3):
        set_gradients(params, seed=step)
        optimizer.grad_scale = torch.tensor(8.0, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
        checked_step(optimizer, grad_scale=8.0)


def test_a_skipped_step_still_resets_the_gradients(device):
    run = ScaledRun(device, reset_grads=True)
    run.backward(INF, 1.0, 1.0)
    run.scaler.step(run.optimizer)
    assert run.param.grad.tolist() == [0.0] * 3
    assert run.param.tolist() == [1.0] * 3


def test_scaler_handles_sparse_gradients(device):
    weight = torch.nn.Parameter(torch.ones(4, 2, device=device))
    optimizer = SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    index = torch.tensor([1, 3], device=device)

    def lookup() -> Tensor:
        return torch.nn.functional.embedding(index, weight, sparse=True).sum()

    scaler.scale(lookup()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight[:, 0].tolist() == [1.0, 0.5, 1.0, 0.5]
    optimizer.zero_grad()
    scaler.scale(lookup() * INF).backward()
    scaler.step(optimizer)
    assert weight[:, 0].tolist() == [1.0, 0.5, 1.0, 0.5]


# --- where torch's own fused step is wrong


@half_dtypes
def test_fused_step_updates_half_parameters(dtype, device):
    params = make_params([(100,)], dtype, device)
    trajectory(SGD(params, lr=0.1, momentum=0.9, fused=True), steps=5)


@all_rules
def test_fused_step_takes_gradients_of_other_strides(rule, device):
    param = torch.nn.Parameter(random_tensor((6, 4), device=device))
    optimizer = SGD([param], fused=True, **rule)
    for seed in range(5):
        param.grad = random_tensor((4, 6), device=device, seed=seed).t()
        checked_step(optimizer)


@pytest.mark.parametrize("foreach", [None, True])
def test_nesterov_without_weight_decay_does_not_write_the_gradient(foreach, device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    trajectory(optimizer, steps=3)  # asserts the bits of every gradient


# A late first gradient: test_gradients_may_come_and_go. An overflow on the first step and a
# found_inf of 2: above, under "loss scaling". Version counters: test_a_stale_graph_raises_...
# A wrong meta-gradient: below.


# --- differentiable steps


def inner_loop(weight: Tensor, lr: Tensor, wd: Tensor | float, steps: int = 4, **flags) -> Tensor:
    """The outer loss after `steps` differentiable steps on a quartic, as a function."""
    w = weight.clone()
    optimizer = SGD([w], lr=lr, weight_decay=wd, differentiable=True, **flags)
    for _ in range(steps):
        # The copy keeps what backward saves apart from what the step writes in place.
        here = w.clone()
        (w.grad,) = torch.autograd.grad((here**4).sum() / 4 + here.sum(), here, create_graph=True)
        optimizer.step()
    return (w**2).sum()


DIFFERENTIABLE_RULES = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.5, "dampening": 0.25},
    {"momentum": 0.5, "nesterov": True},
    {"momentum": 0.5, "dampening": 0.25, "formulation": "sutskever"},
    {"momentum": 0.5, "nesterov": True, "formulation": "sutskever"},
    {"momentum": 0.5, "maximize": True},
]


@pytest.mark.parametrize("flags", DIFFERENTIABLE_RULES, ids=flag_id)
@pytest.mark.parametrize("lr_shape", [(), (1,), (1, 1)])
def test_meta_gradients_equal_finite_differences(flags, lr_shape, device):
    weight = random_tensor((3,), torch.float64, device).mul_(0.5).requires_grad_()
    lr = torch.full(lr_shape, 0.05, dtype=torch.float64, device=device, requires_grad=True)
    wd = torch.tensor(0.1, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: inner_loop(*args, **flags), (weight, lr, wd))


def test_meta_gradient_of_the_lr_with_momentum_is_not_torchs(device):
    # torch detaches the first buffer from the graph and loses a part of this gradient.
    weight = torch.tensor([1.0, -0.5], dtype=torch.float64, device=device, requires_grad=True)
    lr = torch.tensor(0.05, dtype=torch.float64, device=device, requires_grad=True)

    def outer_loss(x: Tensor) -> Tensor:
        return inner_loop(weight, x, 0.0, momentum=0.5)

    (gradient,) = torch.autograd.grad(outer_loss(lr), lr)
    above, below = (outer_loss((lr + h).detach()).item() for h in (1e-5, -1e-5))
    assert gradient.item() == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_first_buffer_stays_in_the_graph(device):
    param = random_tensor((3,), device=device)
    param.grad = random_tensor((3,), device=device, seed=1).requires_grad_()
    optimizer = SGD([param], lr=0.1, momentum=0.5, differentiable=True)
    optimizer.step()
    buffer = momentum_of(optimizer, param)
    (slope,) = torch.autograd.grad(buffer.sum(), param.grad)
    assert slope.tolist() == [1.0] * 3


@pytest.mark.parametrize("flags", legal_flags(formulation=FORMULATIONS), ids=flag_id)
@full_dtypes
def test_differentiable_step_follows_the_equations(flags, dtype, device):
    params = [random_tensor(shape, dtype, device, seed=i) for i, shape in enumerate(SHAPES)]
    optimizer = SGD(params, lr=0.1, differentiable=True, **flags)
    trajectory(optimizer, steps=5)


def test_a_differentiable_step_with_a_decay_out_of_range_changes_nothing(device):
    param = random_tensor((3,), device=device).requires_grad_().clone()
    decays = iter([0.5, 1.5, 0.5])
    ema = EMA([param], decay=lambda _: next(decays))
    optimizer = SGD([param], lr=0.1, momentum=0.5, differentiable=True, ema=ema)
    param.grad = torch.ones_like(param)
    optimizer.step()
    tensors = [param, momentum_of(optimizer, param), ema.shadows["0"]]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(ValueError, match="Invalid decay"):
        optimizer.step()
    assert tensors[1] is momentum_of(optimizer, param)
    for tensor, old in zip(tensors, before, strict=True):
        assert_same_bits(tensor, old)
    assert ema.num_steps == 1
    optimizer.step()
    assert ema.num_steps == 2


def test_differentiable_step_moves_the_average(device):
    params = [random_tensor(shape, device=device, seed=i) for i, shape in enumerate(SHAPES)]
    optimizer = SGD(params, lr=0.1, momentum=0.5, differentiable=True, ema=tracked_by(params))
    trajectory(optimizer, steps=2, tracked=params)


# --- where the kernels do not reach

FALLBACK_RULES = [
    {"lr": 0.1},
    {"lr": 0.1, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
]
fallback_rules = pytest.mark.parametrize("rule", FALLBACK_RULES, ids=flag_id)


def assert_equals_torch(
    rule: dict,
    make: Callable[[], list[torch.nn.Parameter]],
    give_gradients: Callable[[list[torch.nn.Parameter], int], None],
    **options,
) -> None:
    """Five steps of both, compared exactly after each but for the last bit of a complex product."""
    ours, theirs = make(), make()
    optimizer = SGD(ours, **rule, **options)
    expected = torch.optim.SGD(theirs, foreach=False, **rule)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        expected.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            a, b = momentum_of(optimizer, p), momentum_of(expected, q)
            assert (a is None) == (b is None)
            if a is not None and options.get("formulation") == "sutskever":
                torch.testing.assert_close(a, -rule["lr"] * b, rtol=1e-6, atol=1e-6)
            elif a is not None:
                torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-6, atol=1e-6)


def give_sparse_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """Gradients at two rows, one of them twice; the last parameter's is dense."""
    for p in params[:-1]:
        rows = torch.tensor([[seed % 4, 3, 3]], device=p.device)
        values = random_tensor((3, *p.shape[1:]), p.dtype, p.device, seed=seed)
        p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)
    set_gradients(params[-1:], seed)


@fallback_rules
@pytest.mark.parametrize("fused", [None, True])
def test_sparse_gradients_step_as_in_torch(rule, fused, device):
    def make() -> list[torch.nn.Parameter]:
        return make_params([(4, 2), (5, 3), (7,)], device=device)

    assert_equals_torch(rule, make, give_sparse_gradients, fused=fused)


@fallback_rules
def test_sparse_gradients_reach_views_inside_a_storage(rule, device):
    """torch's step misses them, and writes beyond their end."""

    def views(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory = tensor.new_zeros(tensor.numel() + 200)
        return memory, memory[50 : 50 + tensor.numel()].view(tensor.shape).copy_(tensor)

    ours, theirs = (make_params([(4, 2), (7,)], torch.float64, device) for _ in range(2))
    memories = []
    for p in ours:
        memory, p.data = views(p.detach())
        memories.append((memory, p))
    optimizer, expected = SGD(ours, **rule), torch.optim.SGD(theirs, foreach=False, **rule)
    for step in range(3):
        for p in (*ours, *theirs):
            p.grad = random_tensor(p.shape, p.dtype, device, seed=step).to_sparse()
        optimizer.step()
        expected.step()
        for p in ours if step == 0 and rule.get("momentum") else []:
            momentum = optimizer.state[p]["momentum_buffer"].to_dense()
            memory, optimizer.state[p]["momentum_buffer"] = views(momentum)
            memories.append((memory, optimizer.state[p]["momentum_buffer"]))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    for memory, view in memories:
        assert not memory[:50].any()
        assert not memory[50 + view.numel() :].any()


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_a_sparse_gradient_is_stepped_where_nesterov_has_lost_its_momentum(formulation):
    """Options may change; the constructor alone asks for momentum."""
    params = make_params([(4, 2)])
    optimizer = SGD(params, 0.1, 0.9, nesterov=True, formulation=formulation)
    optimizer.param_groups[0]["momentum"] = 0.0
    expected = params[0].detach() - 0.1
    params[0].grad = torch.ones(4, 2).to_sparse()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected)


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_narrow_momentum_of_a_sparse_gradient_is_rounded_once(formulation):
    """As beside a dense gradient: what moves the parameter has not been rounded."""
    params = make_params([(40, 3)])
    optimizer = SGD(params, 0.1, 0.9, formulation=formulation, state_dtype=torch.bfloat16)
    set_gradients(params, 0)
    optimizer.step()
    before, (key, held) = params[0].detach().double(), *optimizer.state[params[0]].items()
    params[0].grad = random_tensor((40, 3), seed=1).to_sparse()
    scale = {"torch": 1.0, "sutskever": -0.1}[formulation]
    momentum = 0.9 * held.double() + scale * params[0].grad.to_dense().double()
    optimizer.step()
    moved = momentum if formulation == "sutskever" else -0.1 * momentum
    torch.testing.assert_close(params[0].detach().double(), before + moved, rtol=1e-6, atol=1e-7)
    assert_same_bits(optimizer.state[params[0]][key], momentum.to(torch.bfloat16))


def test_sparse_gradients_with_weight_decay_raise_as_in_torch():
    param = make_params([(4, 2)])[0]
    param.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError):
        torch.optim.SGD([param], lr=0.1, weight_decay=0.1, foreach=False).step()
    before = param.detach().clone()
    with pytest.raises(RuntimeError):
        SGD([param], lr=0.1, weight_decay=0.1).step()
    assert_same_bits(param, before)


@fallback_rules
def test_sparse_gradients_with_sutskever_keep_the_path_of_constant_lr(rule, device):
    ours, theirs = (make_params([(4, 2), (7,)], torch.float64, device) for _ in range(2))
    optimizer = SGD(ours, formulation="sutskever", **rule)
    expected = SGD(theirs, **rule)
    for step in range(4):
        give_sparse_gradients(ours, step)
        give_sparse_gradients(theirs, step)
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


@fallback_rules
def test_gradients_may_turn_sparse(rule, device):
    def give_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
        for p in params:
            p.grad = None
        (give_sparse_gradients if seed % 2 else set_gradients)(params, seed)

    def make() -> list[torch.nn.Parameter]:
        return make_params([(4, 2), (7,)], device=device)

    assert_equals_torch(rule, make, give_gradients)


def dense_gradients_like_sparse(params: list[torch.nn.Parameter], seed: int) -> None:
    give_sparse_gradients(params, seed)
    for p in params:
        p.grad = p.grad.to_dense()


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_sparse_gradients_meet_dense_momentum_with_nesterov(formulation, device):
    """As where all state is made in advance; torch cannot add dense momentum to them."""
    rule = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    params, twins = (make_params([(4, 2), (7,)], torch.float64, device) for _ in range(2))
    optimizer = SGD(params, **rule, formulation=formulation, capturable=True)
    expected = torch.optim.SGD(twins, **rule, foreach=False)
    for step in range(4):
        give_sparse_gradients(params, step)
        dense_gradients_like_sparse(twins, step)
        optimizer.step()
        expected.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_is_a_tensor_is_kept_for_sparse_gradients(formulation, nesterov, device):
    """It is 0 at first and in between; the rows that the kernels run do the same."""
    momentum = torch.tensor(0.9, dtype=torch.float64, device=device)
    rule = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "formulation": formulation}
    params, twins = (make_params([(4, 2), (7,)], torch.float64, device) for _ in range(2))
    optimizer, expected = SGD(params, **rule), SGD(twins, **rule)
    for step, number in enumerate([0.0, 0.9, 0.0, 0.9]):
        momentum.fill_(number)
        give_sparse_gradients(params, step)
        dense_gradients_like_sparse(twins, step)
        optimizer.step()
        expected.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(
            momentum_of(optimizer, p).to_dense(), momentum_of(expected, q).to_dense()
        )


def test_average_and_reset_reach_sparse_gradients(device):
    params = make_params([(4, 2), (7,)], device=device)
    twins = clones(params)
    attached, alone = tracked_by(params), tracked_by(twins)
    optimizer = SGD(params, lr=0.1, ema=attached, reset_grads=True)
    plain = SGD(twins, lr=0.1)
    for step in range(3):
        give_sparse_gradients(params, step)
        give_sparse_gradients(twins, step)
        optimizer.step()
        plain.step()
        alone.update()
        assert all(p.grad.to_dense().count_nonzero() == 0 for p in params)
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)
    for name, shadow in alone.shadows.items():
        assert_same_bits(attached.shadows[name], shadow)


@pytest.mark.parametrize("flags", legal_flags(), ids=flag_id)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_step_as_in_torch(flags, dtype, device):
    def complex_tensor(seed: int) -> Tensor:
        real, imag = (random_tensor((5, 3), torch.float64, device, seed + i) for i in (0, 1))
        return torch.complex(real, imag).to(dtype)

    def make() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(complex_tensor(0)), *make_params([(4,)], device=device)]

    def give_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
        params[0].grad = complex_tensor(10 + 2 * seed)
        set_gradients(params[1:], seed)

    assert_equals_torch({"lr": 0.1, **flags}, make, give_gradients)
    # At a constant lr the other formulation takes torch's path, too.
    assert_equals_torch({"lr": 0.1, **flags}, make, give_gradients, formulation="sutskever")


def test_average_and_reset_reach_complex_parameters(device):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    param.grad = torch.full_like(param, 1 - 1j)
    ema = EMA([param], decay=0.75)
    SGD([param], lr=1.0, ema=ema, reset_grads=True).step()
    assert param.tolist() == [1j] * 3
    assert ema.shadows["0"].tolist() == [0.75 + 0.25j] * 3
    assert param.grad.count_nonzero() == 0


@pytest.mark.parametrize("flags", legal_flags(), ids=flag_id)
def test_tensor_subclasses_step_as_in_torch(flags, device):
    def pair(seed: int) -> TwoTensor:
        return TwoTensor(*(random_tensor((5,), device=device, seed=seed + i) for i in (0, 1)))

    ours, theirs = (torch.nn.Parameter(pair(0)) for _ in range(2))
    dense = make_params([(3,)], device=device)
    optimizer = SGD([ours, *dense], lr=0.1, **flags)
    expected = torch.optim.SGD([theirs], lr=0.1, foreach=False, **flags)
    for step in range(5):
        ours.grad, theirs.grad = pair(10 + 2 * step), pair(10 + 2 * step)
        set_gradients(dense, step)
        checked_dense = dense[0].detach().clone()
        optimizer.step()
        expected.step()
        assert not torch.equal(dense[0], checked_dense)
    assert isinstance(ours.data, TwoTensor)
    for half in ("a", "b"):
        torch.testing.assert_close(getattr(ours, half), getattr(theirs, half))


def test_distributed_tensors_step_as_in_torch():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours, theirs = (
            torch.nn.Parameter(distribute_tensor(random_tensor((6,)), mesh)) for _ in range(2)
        )
        rule = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        optimizer, expected = SGD([ours], **rule), torch.optim.SGD([theirs], foreach=False, **rule)
        for step in range(3):
            for p in (ours, theirs):
                p.grad = distribute_tensor(random_tensor((6,), seed=step), mesh)
            optimizer.step()
            expected.step()
        assert isinstance(ours.data, DTensor)
        torch.testing.assert_close(ours.to_local(), theirs.to_local())
    finally:
        distributed.destroy_process_group()


def test_fake_tensors_step_without_data():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        param = torch.nn.Parameter(torch.randn(3))
        param.grad = torch.randn(3)
        optimizer = SGD([param], lr=0.1, momentum=0.9)
        optimizer.step()
        optimizer.step()
    assert isinstance(momentum_of(optimizer, param), FakeTensor)


def test_meta_tensors_step_without_data():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones(3, device="meta")
    optimizer = SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.step()
    assert momentum_of(optimizer, param).device.type == "meta"


def test_subclasses_without_a_dispatcher_are_stepped(device):
    class Named(torch.Tensor):
        """Only a name: the data is an ordinary tensor's."""

    param = torch.nn.Parameter(random_tensor((5,), device=device).as_subclass(Named))
    trajectory(SGD([param], lr=0.1, momentum=0.9), steps=3)


def test_parameters_behind_a_conjugate_bit_are_stepped(device):
    values = torch.complex(*(random_tensor((5,), torch.float64, device, i) for i in (0, 1)))
    ours, theirs = torch.nn.Parameter(values.conj()), torch.nn.Parameter(values.conj_physical())
    assert ours.is_conj()
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizer, expected = SGD([ours], **rule), torch.optim.SGD([theirs], foreach=False, **rule)
    for _ in range(3):
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours.resolve_conj(), theirs)


def test_a_compiled_training_step_matches_an_eager_one():
    params = make_params(SHAPES)
    twins = clones(params)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=tracked_by(params))
    eager = SGD(twins, lr=0.1, momentum=0.9, ema=tracked_by(twins))
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(3):
        set_gradients(params, seed=step)
        set_gradients(twins, seed=step)
        compiled()
        eager.step()
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)


# --- a drop-in


def test_signature_extends_torchs():
    theirs = inspect.signature(torch.optim.SGD.__init__).parameters
    ours = inspect.signature(SGD.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    assert all(ours[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(ours)[len(theirs) :])


def test_it_is_a_torch_sgd():
    params = make_params(SHAPES)
    optimizer = SGD(params, 0.1, 0.9, 0, 0.1, True)
    assert isinstance(optimizer, torch.optim.SGD)
    expected = torch.optim.SGD(params, 0.1, 0.9, 0, 0.1, True).param_groups[0]
    assert {k: optimizer.param_groups[0][k] for k in expected} == expected


@pytest.mark.parametrize(
    "options",
    [{"lr": float("nan")}, {"dampening": -0.5}, {"lr": torch.tensor(0.1), "foreach": True}],
    ids=str,
)
def test_what_torch_accepts_is_accepted(options):
    params = make_params(SHAPES)
    torch.optim.SGD(params, **options)
    SGD(params, **options)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"fused": False}], ids=str)
def test_implementation_flags_are_recorded_and_select_nothing(options, device):
    params = make_params(SHAPES, device=device)
    twins = clones(params)
    optimizer, plain = (
        SGD(params, lr=0.1, momentum=0.9, **options),
        SGD(twins, lr=0.1, momentum=0.9),
    )
    assert options.items() <= optimizer.param_groups[0].items()
    for step in range(3):
        set_gradients(params, seed=step)
        set_gradients(twins, seed=step)
        optimizer.step()
        plain.step()
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)


def test_named_parameters_are_accepted():
    model = torch.nn.Linear(2, 3)
    optimizer = SGD(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    trajectory(optimizer, steps=2)


def test_training_reaches_the_minimum(device):
    model = torch.nn.Linear(4, 1).to(device)
    inputs = random_tensor((64, 4), device=device)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]], device=device)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, reset_grads=True)
    for _ in range(200):
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6
