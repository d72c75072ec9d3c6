"""Properties of a step over random shapes, strides, dtypes, values and flags."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st
from reference import (
    FULL_DTYPES,
    HALF_DTYPES,
    Rule,
    assert_ema_update,
    assert_same_bits,
    assert_sgd_step,
    random_tensor,
)
from torch import Tensor

from fused_opt import EMA, SGD
from fused_opt.functional import ema_update_, sgd_step_

seeds = st.integers(0, 2**16)
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
dtypes = st.sampled_from((*FULL_DTYPES, *HALF_DTYPES))
decays = st.floats(0.0, 1.0)


@st.composite
def rules(draw: st.DrawFn, *, with_momentum: bool | None = None) -> dict[str, Any]:
    """Hyper-parameters that the constructor accepts."""
    rule = {
        "lr": draw(st.floats(0.0, 2.0)),
        "weight_decay": draw(st.just(0.0) | st.floats(0.0, 1.0)),
        "maximize": draw(st.booleans()),
        "formulation": draw(st.sampled_from(("torch", "sutskever"))),
        "momentum": 0.0,
    }
    if draw(st.booleans()) if with_momentum is None else with_momentum:
        rule["momentum"] = draw(st.floats(0.01, 1.0))
        rule["nesterov"] = draw(st.booleans())
        rule["dampening"] = 0.0 if rule["nesterov"] else draw(st.just(0.0) | st.floats(0.0, 1.0))
    return rule


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers of a drawn magnitude, some of them zero, as a contiguous tensor."""
    result = random_tensor(shape, torch.float64, seed=draw(seeds))
    result *= 2.0 ** draw(st.integers(-12, 8))
    if draw(st.booleans()):
        result[random_tensor(shape, seed=draw(seeds)) > 1.0] = 0.0
    return result.to(dtype)


@st.composite
def views(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, *, may_overlap: bool = False
) -> Tensor:
    """Values laid out in any order of dimensions, with steps, gaps and offsets in their storage."""
    content = draw(values(shape, dtype))
    expanded = []
    if may_overlap:
        expanded = [d for d in range(len(shape)) if shape[d] > 1 and draw(st.booleans())]
    for d in expanded:
        content = content.narrow(d, 0, 1)
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    starts = [draw(st.integers(0, 2)) for _ in shape]
    inner = [content.shape[d] for d in order]
    whole = torch.full(
        [a + n * step for a, n, step in zip(starts, inner, steps, strict=True)], 7.0, dtype=dtype
    )
    window = whole[tuple(slice(a, None, step) for a, step in zip(starts, steps, strict=True))]
    view = window.permute(sorted(range(len(order)), key=order.__getitem__))
    view.copy_(content)
    return view.expand(shape)


@st.composite
def step_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor, dict[str, Any]]:
    """A parameter, gradient, momentum (or None) and shadow, each laid out its own way; a rule."""
    shape, dtype, rule = draw(shapes), draw(dtypes), draw(rules())
    narrow = (torch.float32, *HALF_DTYPES)
    grad_dtype = dtype if dtype == torch.float64 else draw(st.sampled_from(narrow))
    shadow_dtype = draw(
        st.sampled_from((dtype, max(dtype, torch.float32, key=lambda d: d.itemsize)))
    )
    momentum = None
    if rule["momentum"] and draw(st.booleans()):
        momentum = draw(views(shape, dtype))
    return (
        draw(views(shape, dtype)),
        draw(views(shape, grad_dtype, may_overlap=True)),
        momentum,
        draw(views(shape, shadow_dtype)),
        rule,
    )


def copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def surroundings(view: Tensor) -> Tensor:
    """The elements of the view's storage outside the view."""
    storage = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return storage[outside].clone()


@given(step_inputs(), decays)
def test_one_step_equals_the_oracle(inputs, decay):
    param, grad, momentum, shadow, rule = inputs
    before = param.clone(), grad.clone(), copy(momentum)
    old_shadow = shadow.clone()
    around = [surroundings(t) for t in (param, shadow)]
    buffers = [momentum]

    sgd_step_([param], [grad], buffers, shadows=[shadow], decay=decay, **rule)

    assert_sgd_step(Rule(**rule), before, param, buffers[0])
    assert_ema_update(decay, old_shadow, param, shadow)
    assert_same_bits(grad, before[1], "gradient")
    for old, tensor in zip(around, (param, shadow), strict=True):
        assert_same_bits(surroundings(tensor), old, "the surroundings")


@given(st.lists(step_inputs(), min_size=1, max_size=6), rules(with_momentum=True), decays)
def test_one_step_of_many_tensors_equals_steps_of_each(inputs, rule, decay):
    def state() -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor]]:
        columns = list(zip(*inputs, strict=True))[:4]
        return tuple([copy(t) for t in column] for column in columns)

    params, grads, buffers, shadows = state()
    sgd_step_(params, grads, buffers, shadows=shadows, decay=decay, **rule)
    for i, (p, g, v, s) in enumerate(zip(*state(), strict=True)):
        buffer = [v]
        sgd_step_([p], [g], buffer, shadows=[s], decay=decay, **rule)
        for alone, together in ((p, params[i]), (buffer[0], buffers[i]), (s, shadows[i])):
            assert_same_bits(together, alone)


@given(st.data(), st.integers(1, 3000), dtypes, rules(with_momentum=True))
def test_one_step_of_a_tensor_equals_steps_of_its_parts(data, size, dtype, rule):
    whole = [data.draw(values((size,), dtype)) for _ in range(3)]
    parts = [t.clone() for t in whole]
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    sgd_step_([whole[0]], [whole[1]], [whole[2]], **rule)
    pieces = [list(t.tensor_split(cuts)) for t in parts]
    sgd_step_(*pieces, **rule)
    for a, b in zip(whole, parts, strict=True):
        assert_same_bits(b, a)


@given(st.data(), shapes, dtypes, rules(with_momentum=True), st.integers(-4, 4))
def test_step_scales_with_powers_of_two(data, shape, dtype, rule, exponent):
    # The equations are linear, and a power of two shifts no rounding.
    state = [random_tensor(shape, dtype, seed=data.draw(seeds)) for _ in range(3)]
    if dtype == torch.float16:
        # Below its normal numbers fp16 rounds at a fixed place: stay clear of them.
        state = [t.sign() + t for t in state]
        rule = {**rule, "lr": 1.0, "momentum": 1.0, "dampening": 0.0, "weight_decay": 0.0}
    scaled = [t * 2.0**exponent for t in state]
    for p, g, v in (state, scaled):
        sgd_step_([p], [g], [v], **rule)
    if dtype == torch.float16:
        normal = [t.abs() >= torch.finfo(dtype).smallest_normal * 2**4 for t in state]
    else:
        normal = [torch.ones_like(t, dtype=torch.bool) for t in state]
    for a, b, where in zip(scaled, state, normal, strict=True):
        assert_same_bits(a[where], (b * 2.0**exponent)[where])


@given(st.data(), shapes, dtypes, decays)
def test_one_update_equals_the_oracle(data, shape, dtype, decay):
    shadow, param = data.draw(views(shape, dtype)), data.draw(views(shape, dtype))
    before, kept, around = shadow.clone(), param.clone(), surroundings(shadow)
    ema_update_([shadow], [param], decay=decay)
    assert_ema_update(decay, before, param, shadow)
    assert_same_bits(param, kept, "parameter")
    assert_same_bits(surroundings(shadow), around, "the surroundings")


@given(st.data(), shapes, dtypes, decays)
def test_shadow_stays_between_its_old_value_and_the_parameter(data, shape, dtype, decay):
    shadow, param = data.draw(values(shape, dtype)), data.draw(values(shape, dtype))
    low, high = torch.minimum(shadow, param), torch.maximum(shadow, param)
    ema_update_([shadow], [param], decay=decay)
    slack = torch.finfo(dtype).eps * (low.abs() + high.abs()).double()
    assert ((low.double() - slack <= shadow) & (shadow <= high.double() + slack)).all()


@given(st.lists(step_inputs(), min_size=1, max_size=4), rules(), decays, st.booleans())
def test_optimizer_equals_step_then_update(inputs, rule, decay, reset_grads):
    def build(attached: bool) -> tuple[list[torch.nn.Parameter], EMA, SGD]:
        params = [torch.nn.Parameter(p.clone()) for p, *_ in inputs]
        ema = EMA(params, decay=decay)
        return params, ema, SGD(params, ema=ema if attached else None, **rule)

    (ours, ema, optimizer), (twins, apart, plain) = build(True), build(False)
    optimizer.param_groups[0]["reset_grads"] = reset_grads
    for _ in range(2):
        for params in (ours, twins):
            for p, (_, grad, *_) in zip(params, inputs, strict=True):
                p.grad = grad.to(p.dtype, copy=True)
        optimizer.step()
        plain.step()
        apart.update()
    for p, q in zip(ours, twins, strict=True):
        assert_same_bits(p, q)
        assert p.grad.count_nonzero() == 0 or not reset_grads
    for name, shadow in apart.shadows.items():
        assert_same_bits(ema.shadows[name], shadow)
