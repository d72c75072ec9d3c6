"""EMA: shadows follow the weights, by hand or inside the step, and swaps give the weights back."""

import contextlib
import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from reference import assert_ema_update, assert_same_bits, make_params, random_tensor, set_gradients
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_opt
from fused_opt import EMA, SGD

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

DEFAULT_SHADOW = {F32: F32, F64: F64, BF16: F32, F16: F32}
PAIRS = [(F32, F32), (F64, F64), (F64, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
CONTIGUOUS = torch.contiguous_format
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 1000)

Tensors = Mapping[str, Tensor] | Iterable[Tensor]


def listed(tensors: Tensors) -> list[Tensor]:
    return list(tensors.values() if isinstance(tensors, Mapping) else tensors)


def copies(tensors: Tensors) -> list[Tensor]:
    return [t.detach().clone() for t in listed(tensors)]


def pointers(tensors: Tensors) -> list[int]:
    return [t.data_ptr() for t in listed(tensors)]


def versions(tensors: Tensors) -> list[int]:
    return [t._version for t in listed(tensors)]


def assert_all_same(actual: Tensors, expected: Tensors) -> None:
    for i, (a, e) in enumerate(zip(listed(actual), listed(expected), strict=True)):
        assert_same_bits(a, e, f"tensor {i}")


def assert_bumped(tensors: Tensors, before: list[int]) -> None:
    """Every tensor that holds anything counts at least one more version."""
    for t, version in zip(listed(tensors), before, strict=True):
        assert t._version > version or not t.numel()


def all_differ(actual: Tensors, expected: Tensors) -> bool:
    pairs = zip(listed(actual), listed(expected), strict=True)
    return all(not torch.equal(a, e) for a, e in pairs)


def halfway(old: Tensor, new: Tensor) -> Tensor:
    """What decay 0.5 makes of a shadow, in the dtype of both."""
    return new - (new - old) * 0.5


def make_model(seed: int = 0, dtype: torch.dtype = F32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def perturb(params: Iterable[Tensor], seed: int) -> None:
    """Moves every parameter, as a training step would."""
    with torch.no_grad():
        for i, p in enumerate(params):
            p.add_(random_tensor(p.shape, p.dtype, seed=100 * seed + i), alpha=0.1)


# --- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("param_dtype", "shadow_dtype"), PAIRS)
def test_functional_updates_match_fp64(param_dtype, shadow_dtype, decay):
    shadows = [random_tensor((n,), shadow_dtype, seed=n) for n in SIZES]
    for step in range(6):
        params = [random_tensor((n,), param_dtype, seed=100 * step + n) for n in SIZES]
        before = copies(shadows)
        fused_opt.functional.ema_update_(shadows, params, decay=decay)
        for s, p, after in zip(before, params, shadows, strict=True):
            assert_ema_update(decay, s, p, after)


@pytest.mark.parametrize("dtype", DEFAULT_SHADOW)
def test_class_updates_match_fp64(dtype):
    params = make_params([(3, 5), (17,), ()], dtype=dtype)
    ema = EMA(params, decay=0.9)
    for step in range(6):
        before = copies(ema.shadows)
        perturb(params, seed=step)
        ema.update()
        for s, p, after in zip(before, params, ema.shadows.values(), strict=True):
            assert_ema_update(0.9, s, p, after)


@pytest.mark.parametrize(("dtype", "expected"), DEFAULT_SHADOW.items())
def test_shadows_are_fp32_for_half_types_and_the_parameters_dtype_otherwise(dtype, expected):
    params = make_params([(4,)], dtype=dtype)
    ema = EMA(params)
    (shadow,) = ema.shadows.values()
    assert_same_bits(shadow, params[0].detach().to(expected))
    assert shadow.data_ptr() != params[0].data_ptr()
    assert not shadow.requires_grad


SPECIAL = [0.0, -0.0, 1.5, -2.5, float("inf"), float("-inf"), float("nan"), 65504.0]


def special_pairs(param_dtype: torch.dtype, shadow_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every special value of a parameter beside every special value of a shadow."""
    param, shadow = torch.meshgrid(torch.tensor(SPECIAL), torch.tensor(SPECIAL), indexing="ij")
    return param.flatten().to(param_dtype), shadow.flatten().to(shadow_dtype)


@pytest.mark.parametrize(("param_dtype", "shadow_dtype"), PAIRS)
def test_decay_zero_copies_exactly(param_dtype, shadow_dtype):
    param, shadow = special_pairs(param_dtype, shadow_dtype)
    fused_opt.functional.ema_update_([shadow], [param], decay=0.0)
    assert_same_bits(shadow, param.to(shadow_dtype))


@pytest.mark.parametrize(("param_dtype", "shadow_dtype"), PAIRS)
def test_decay_one_freezes_exactly(param_dtype, shadow_dtype):
    param, shadow = special_pairs(param_dtype, shadow_dtype)
    before = shadow.clone()
    fused_opt.functional.ema_update_([shadow], [param], decay=1.0)
    assert_same_bits(shadow, before)


# p - s = ±(2^24 + 1) rounds to ±2^24 in fp32, so the two forms of the formula differ by one here.
BIG = 2.0**24 + 2


@pytest.mark.parametrize(
    ("decay", "shadow", "param", "expected"),
    [
        (0.75, 1.0, BIG, 1.0 + 0.25 * 2**24),  # from the shadow's end: s + w (p - s)
        (0.25, BIG, 1.0, 1.0 + 0.25 * 2**24),  # from the parameter's end: p - (p - s)(1 - w)
        (0.5, BIG, 1.0, 1.0 + 0.5 * 2**24),  # the boundary belongs to the parameter's end
    ],
)
def test_update_starts_from_the_nearer_end(decay, shadow, param, expected):
    params = [nn.Parameter(torch.full((9,), shadow))]
    ema = EMA(params, decay=decay)
    params[0].data.fill_(param)
    ema.update()
    assert ema.shadows["0"].tolist() == [expected] * 9


def test_matches_torchs_averaged_model():
    model = make_model()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # the first call copies, as our constructor does
    ours = EMA(model, decay=0.9)
    for step in range(8):
        perturb(model.parameters(), seed=step)
        theirs.update_parameters(model)
        ours.update()
    for name, p in theirs.module.named_parameters():
        torch.testing.assert_close(ours.shadows[name], p.detach(), rtol=1e-6, atol=1e-6)


def test_num_updates_counts():
    params = make_params([(3,)])
    ema = EMA(params)
    assert ema.num_updates == 0
    for n in range(1, 4):
        ema.update()
        assert ema.num_updates == n
    optimizer = SGD(params, lr=0.1, ema=ema)
    set_gradients(params, seed=0)
    optimizer.step()
    assert ema.num_updates == 4


def test_decay_can_be_changed_between_updates():
    params = make_params([(3,)])
    ema = EMA(params, decay=1.0)
    perturb(params, seed=0)
    ema.decay = 0.0
    ema.update()
    assert_all_same(ema.shadows, copies(params))


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), float("inf")])
def test_decay_outside_the_unit_interval_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(make_params([(3,)]), decay=decay)


def test_update_records_no_graph_and_bumps_the_shadows_versions():
    params = make_params([(3,), (0,), (2, 2)])
    ema = EMA(params)
    before, params_before = versions(ema.shadows), versions(params)
    ema.update()
    assert_bumped(ema.shadows, before)
    assert not any(s.requires_grad for s in ema.shadows.values())
    assert versions(params) == params_before


def test_update_follows_replaced_parameter_storage():
    params = make_params([(3,)])
    ema = EMA(params, decay=0.0)
    params[0].data = torch.tensor([7.0, 8.0, 9.0])
    ema.update()
    assert ema.shadows["0"].tolist() == [7.0, 8.0, 9.0]


# --- layouts -------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "channels_last": lambda d: randn(d, 4, 3, 5, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda d: randn(d, 2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda d: randn(d, 6, 9).t(),
    "column": lambda d: randn(d, 33, 4)[:, 1],
    "every_second": lambda d: randn(d, 50)[1::2],
    "inner_block": lambda d: randn(d, 9, 9)[2:7, 1:8],
    "odd_offset": lambda d: randn(d, 1001)[3:],
    "scalar": lambda d: randn(d),
    "empty": lambda d: randn(d, 0, 3),
}


def randn(dtype: torch.dtype, *shape: int) -> Tensor:
    return random_tensor(shape, dtype)


@pytest.mark.parametrize("dtype", DEFAULT_SHADOW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_updates_swaps_and_steps(layout, dtype):
    view = LAYOUTS[layout](dtype)
    param, plain = nn.Parameter(view), nn.Parameter(view.clone(memory_format=CONTIGUOUS))
    assert param.data_ptr() == view.data_ptr()
    ema, plain_ema = EMA([param], decay=0.7), EMA([plain], decay=0.7)
    optimizer = SGD([param], lr=0.1, momentum=0.9, ema=ema)
    plain_optimizer = SGD([plain], lr=0.1, momentum=0.9, ema=plain_ema)
    for step in range(3):
        set_gradients([param], seed=step)
        set_gradients([plain], seed=step)
        optimizer.step()
        plain_optimizer.step()
    assert_same_bits(param.detach(), plain.detach())
    assert_same_bits(ema.shadows["0"], plain_ema.shadows["0"])
    raw = param.detach().clone()
    with ema.average_parameters():
        assert_same_bits(param.detach(), plain_ema.shadows["0"].to(dtype))
    assert_same_bits(param.detach(), raw)


@pytest.mark.parametrize("dtype", DEFAULT_SHADOW)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "scalar"])
def test_a_shadow_may_be_laid_out_unlike_its_parameter(layout, dtype):
    """Each layout once as the shadow's and once as the parameter's."""
    view = LAYOUTS[layout](dtype)
    other = random_tensor(view.shape, dtype, seed=1)
    for shadow, param in ((view, other), (other, view)):
        before, same = shadow.clone(), param.clone()
        fused_opt.functional.ema_update_([shadow], [param], decay=0.7)
        assert_ema_update(0.7, before, param, shadow)
        assert_same_bits(param, same)


def test_updating_a_column_leaves_its_neighbours_alone():
    matrix = torch.arange(12.0).reshape(4, 3)
    before = matrix.clone()
    column = nn.Parameter(matrix[:, 1])
    assert column.data_ptr() == matrix[:, 1].data_ptr()
    ema = EMA([column], decay=0.5)
    with torch.no_grad():
        column.add_(1.0)
    ema.apply_shadow()
    assert torch.equal(matrix, before)
    ema.restore()
    before[:, 1] += 1
    assert torch.equal(matrix, before)


# --- what is tracked -----------------------------------------------------------------------------


def test_names_of_a_module_of_pairs_and_of_an_iterable():
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    assert list(EMA(model).shadows) == names
    assert list(EMA(model.named_parameters()).shadows) == names
    assert list(EMA(model.parameters()).shadows) == ["0", "1", "2", "3"]
    assert list(EMA(list(model.parameters())).shadows) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "source", [lambda m: m, lambda m: m.parameters(), lambda m: m.named_parameters()]
)
def test_every_kind_of_source_follows_the_same_weights(source):
    model = make_model()
    ema = EMA(source(model), decay=0.5)
    before = copies(model.parameters())
    perturb(model.parameters(), seed=1)
    ema.update()
    for s, old, p in zip(ema.shadows.values(), before, model.parameters(), strict=True):
        assert_ema_update(0.5, old, p, s)


def tied_by_object() -> tuple[nn.Module, list[nn.Parameter]]:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return model, [model[0].weight]


def tied_by_storage() -> tuple[nn.Module, list[nn.Parameter]]:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert model[0].weight is not model[1].weight
    return model, [model[0].weight, model[1].weight]


@pytest.mark.parametrize("tied", [tied_by_object, tied_by_storage])
@pytest.mark.parametrize("as_list", [False, True])
def test_tied_weights_are_averaged_and_swapped_once(tied, as_list):
    model, params = tied()
    ema = EMA(params if as_list else model, decay=0.5)
    assert len(set(pointers(ema.shadows))) == 1
    weight = params[0]
    old = weight.detach().clone()
    perturb(params[:1], seed=0)
    raw = weight.detach().clone()
    ema.update()
    expected = halfway(old, raw)  # twice would give three quarters
    for shadow in ema.shadows.values():
        assert_same_bits(shadow, expected)
    ema.apply_shadow()
    assert_all_same(params, [expected] * len(params))
    ema.restore()
    assert_all_same(params, [raw] * len(params))


def test_tied_weights_are_averaged_once_inside_a_step():
    model, (weight,) = tied_by_object()
    ema = EMA(model, decay=0.5)
    optimizer = SGD(model.parameters(), lr=1.0, ema=ema)
    old = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    new = old - 1.0
    assert_same_bits(weight.detach(), new)
    assert_same_bits(next(iter(ema.shadows.values())), halfway(old, new))


@pytest.mark.parametrize("inside_optimizer", [None, False, True])
def test_frozen_parameters_follow_the_model(inside_optimizer):
    model = make_model()
    model[0].weight.requires_grad_(False)
    ema = EMA(model, decay=0.5)
    assert "0.weight" in ema.shadows
    if inside_optimizer is not None:
        trained = [p for p in model.parameters() if p.requires_grad or inside_optimizer]
        optimizer = SGD(trained, lr=0.0, ema=ema)
    update = ema.update if inside_optimizer is None else optimizer.step
    update()
    assert_same_bits(ema.shadows["0.weight"], model[0].weight.detach())
    model[0].weight.data.mul_(3.0)
    for _ in range(80):
        update()
    torch.testing.assert_close(
        ema.shadows["0.weight"], model[0].weight.detach(), rtol=1e-6, atol=1e-6
    )


def test_register_copies_again_and_adds_new_parameters():
    model = make_model()
    ema = EMA(model, decay=0.9)
    perturb(model.parameters(), seed=0)
    ema.update()
    kept = pointers(ema.shadows)
    model.add_module("head", nn.Linear(3, 2))
    ema.register()
    assert list(ema.shadows) == [name for name, _ in model.named_parameters()]
    assert pointers(ema.shadows)[: len(kept)] == kept
    assert_all_same(ema.shadows, copies(model.parameters()))
    old = ema.shadows["head.weight"].clone()
    perturb(model.parameters(), seed=1)
    ema.update()
    assert_ema_update(0.9, old, model.head.weight, ema.shadows["head.weight"])


# --- swapping ------------------------------------------------------------------------------------


@pytest.fixture(params=[F32, BF16], ids=["f32", "bf16"])
def averaged(request) -> tuple[nn.Module, EMA]:
    """A model and an average that has moved away from it."""
    model = make_model(dtype=request.param)
    ema = EMA(model, decay=0.5)
    perturb(model.parameters(), seed=0)
    ema.update()
    perturb(model.parameters(), seed=1)
    return model, ema


def test_apply_and_restore_swap_in_place(averaged):
    model, ema = averaged
    params = list(model.parameters())
    raw, shadows = copies(params), copies(ema.shadows)
    places = pointers(params) + pointers(ema.shadows)
    ema.apply_shadow()
    for p, s in zip(params, shadows, strict=True):
        assert_same_bits(p.detach(), s.to(p.dtype))
    assert_all_same(ema.shadows, shadows)
    assert pointers(params) + pointers(ema.shadows) == places
    ema.restore()
    assert_all_same(params, raw)
    assert_all_same(ema.shadows, shadows)
    assert pointers(params) + pointers(ema.shadows) == places
    assert list(map(id, model.parameters())) == list(map(id, params))


def test_swaps_bump_the_parameters_versions(averaged):
    model, ema = averaged
    for swap in (ema.apply_shadow, ema.restore):
        before = versions(model.parameters())
        swap()
        assert_bumped(model.parameters(), before)


def test_average_parameters_swaps_inside_the_context_only(averaged):
    model, ema = averaged
    raw = copies(model.parameters())
    averages = [s.to(p.dtype) for s, p in zip(ema.shadows.values(), raw, strict=True)]
    with ema.average_parameters():
        assert_all_same(model.parameters(), averages)
    assert_all_same(model.parameters(), raw)
    with ema.average_parameters():  # it can be entered again
        assert_all_same(model.parameters(), averages)


def test_exception_inside_the_context_restores(averaged):
    model, ema = averaged
    raw = copies(model.parameters())
    with pytest.raises(KeyError, match="inside"), ema.average_parameters():
        raise KeyError("inside")
    assert_all_same(model.parameters(), raw)
    ema.update()  # no longer applied


def test_weights_edited_inside_the_context_do_not_survive_it(averaged):
    model, ema = averaged
    raw, shadows = copies(model.parameters()), copies(ema.shadows)
    with ema.average_parameters(), torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_all_same(model.parameters(), raw)
    assert_all_same(ema.shadows, shadows)


def test_a_swap_that_does_not_fit_is_refused_and_changes_nothing():
    params = make_params([(3,), (4,), (5,)])
    ema = EMA(params, decay=0.5)
    perturb(params, seed=0)
    params[1].data = torch.zeros(7)
    raw, counts = copies(params), versions(params)
    for swap in (ema.apply_shadow, ema.copy_to, ema.average_parameters().__enter__):
        with pytest.raises((ValueError, RuntimeError)):
            swap()
        assert_all_same(params, raw)
        assert versions(params) == counts
    params[1].data = torch.zeros(4)
    ema.update()  # nothing counts as applied


MISUSES: dict[str, tuple[bool, Callable[[EMA, SGD], object]]] = {
    "apply twice": (True, lambda ema, _: ema.apply_shadow()),
    "average while applied": (True, lambda ema, _: ema.average_parameters().__enter__()),
    "update while applied": (True, lambda ema, _: ema.update()),
    "register while applied": (True, lambda ema, _: ema.register()),
    "step while applied": (True, lambda _, optimizer: optimizer.step()),
    "restore without apply": (False, lambda ema, _: ema.restore()),
    "update while attached": (False, lambda ema, _: ema.update()),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_and_changes_nothing(misuse):
    applied, call = MISUSES[misuse]
    params = make_params([(3, 4), (5,)])
    ema = EMA(params, decay=0.5)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)
    for step in range(2):
        set_gradients(params, seed=step)
        optimizer.step()
    if applied:
        ema.apply_shadow()
    state = [optimizer.state[p]["momentum_buffer"] for p in params]
    everything = [*params, *ema.shadows.values(), *state, *(p.grad for p in params)]
    before, counts = copies(everything), versions(everything)
    with pytest.raises(RuntimeError):
        call(ema, optimizer)
    assert_all_same(everything, before)
    assert versions(everything) == counts
    assert ema.num_updates == 2
    if applied:
        ema.restore()
    optimizer.step()  # and everything goes on
    assert ema.num_updates == 3


def test_closure_is_not_run_when_a_step_is_refused():
    params = make_params([(3,)])
    ema = EMA(params)
    optimizer = SGD(params, lr=0.1, ema=ema)
    ema.apply_shadow()
    calls = []
    with pytest.raises(RuntimeError):
        optimizer.step(lambda: calls.append(1))
    assert calls == []


def test_update_while_applied_raises_without_an_optimizer(averaged):
    _, ema = averaged
    shadows = copies(ema.shadows)
    with ema.average_parameters():
        with pytest.raises(RuntimeError, match=r"restore|applied"):
            ema.update()
        assert_all_same(ema.shadows, shadows)
    ema.update()
    assert all_differ(ema.shadows, shadows)


def test_copy_to_overwrites_the_weights(averaged):
    model, ema = averaged
    places, shadows = pointers(model.parameters()), copies(ema.shadows)
    ema.copy_to()
    for p, s in zip(model.parameters(), shadows, strict=True):
        assert_same_bits(p.detach(), s.to(p.dtype))
    assert pointers(model.parameters()) == places
    assert_all_same(ema.shadows, shadows)
    ema.update()  # nothing is applied: there is nothing to restore
    with pytest.raises(RuntimeError):
        ema.restore()


def test_copy_to_another_module_or_named_parameters(averaged):
    model, ema = averaged
    raw = copies(model.parameters())
    dtype = raw[0].dtype
    other = make_model(seed=5, dtype=dtype)
    ema.copy_to(other)
    for name, p in other.named_parameters():
        assert_same_bits(p.detach(), ema.shadows[name].to(dtype))
    another = make_model(seed=6, dtype=dtype)
    ema.copy_to(another.named_parameters())
    assert_all_same(another.parameters(), copies(other.parameters()))
    assert_all_same(model.parameters(), raw)


def test_copy_to_another_list():
    ema = EMA(make_params([(3,), (4,)]))
    others = make_params([(3,), (4,)], seed=1)
    ema.copy_to(others)
    assert_all_same(others, copies(ema.shadows))


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Linear(5, 7),
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)),
        lambda: list(make_model().parameters())[:3],
    ],
    ids=["names", "shapes", "length"],
)
def test_copy_to_refuses_what_does_not_fit_and_copies_nothing(averaged, other):
    _, ema = averaged
    target = other()
    params = list(target.parameters()) if isinstance(target, nn.Module) else target
    before = copies(params)
    with pytest.raises(ValueError, match=r"\S"):
        ema.copy_to(target)
    assert_all_same(params, before)


# --- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DEFAULT_SHADOW)
def test_state_dict_round_trip(dtype):
    model = make_model(dtype=dtype)
    ema = EMA(model, decay=0.75)
    for step in range(3):
        perturb(model.parameters(), seed=step)
        ema.update()
    state = ema.state_dict()
    assert state["decay"] == [0.75]
    assert state["num_steps"] == 3
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)

    resumed = EMA(make_model(seed=9, dtype=dtype), decay=0.1)
    places = pointers(resumed.shadows)
    resumed.load_state_dict(loaded)
    assert resumed.decay == 0.75
    assert resumed.num_updates == 3
    assert list(resumed.shadows) == list(ema.shadows)
    assert_all_same(resumed.shadows, copies(ema.shadows))
    assert pointers(resumed.shadows) == places


def test_loading_keeps_the_shadows_dtype():
    params = make_params([(4,)], dtype=BF16)
    ema = EMA(params)
    state = ema.state_dict()
    state["averages"] = [{"0": torch.tensor([1.5, 2.5, -3.5, 0.25], dtype=F64)}]
    place = ema.shadows["0"].data_ptr()
    ema.load_state_dict(state)
    assert_same_bits(ema.shadows["0"], torch.tensor([1.5, 2.5, -3.5, 0.25], dtype=F32))
    assert ema.shadows["0"].data_ptr() == place


def test_loaded_state_is_not_aliased():
    ema, other = EMA(make_params([(4,)])), EMA(make_params([(4,)], seed=1), decay=0.5)
    other.load_state_dict(ema.state_dict())
    frozen = ema.shadows["0"].clone()
    other.shadows["0"].zero_()
    assert_same_bits(ema.shadows["0"], frozen)


def drop(state: dict) -> None:
    del state["averages"][0]["2.bias"]


def add(state: dict) -> None:
    state["averages"][0]["3.weight"] = torch.zeros(2)


def rename(state: dict) -> None:
    state["averages"][0]["head.bias"] = state["averages"][0].pop("2.bias")


def reshape(state: dict) -> None:
    state["averages"][0]["2.bias"] = torch.zeros(4)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop, r"missing \['2.bias'\]"),
        (add, r"unknown \['3.weight'\]"),
        (rename, r"missing \['2.bias'\], unknown \['head.bias'\]"),
        (reshape, r"\(3,\).* for '2.bias', got .*\(4,\)"),
        (lambda state: state["averages"][0].update({"2.bias": 3}), "int as '2.bias'"),
        (lambda state: state.update(decay=[1.5]), "decay"),
        (lambda state: state.update(decay=[0.5, 0.5]), "'decay'.*list of 1"),
        (lambda state: state.update(decay=[{"schedule": "none"}]), "schedule"),
        (lambda state: state.update(averages=[]), "'averages'.*list of 1"),
        (lambda state: state.pop("decay"), "decay"),
        (lambda state: state.pop("num_steps"), "num_steps"),
        (lambda state: state.update(num_steps=-1), "num_steps"),
        (lambda state: state.update(update_every=0), "update_every"),
        (lambda state: state.update(applied=0), "weights"),
        (lambda state: state.update(applied=1, weights={}), "applied"),
        (lambda state: state.update(applied=0, weights={}), "weights.*0.weight"),
        (lambda state: state["buffers"].update(extra=torch.ones(1)), "extra"),
    ],
)
def test_loading_a_state_that_does_not_fit_raises_and_loads_nothing(damage, named):
    model = make_model()
    source = EMA(make_model(seed=4), decay=0.25)
    source.update()
    state = copy.deepcopy(source.state_dict())
    damage(state)
    ema = EMA(model, decay=0.75)
    tensors = [*ema.shadows.values(), *model.parameters()]
    before, counts = copies(tensors), versions(tensors)
    with pytest.raises(ValueError, match=named):
        ema.load_state_dict(state)
    assert_all_same(tensors, before)
    assert versions(tensors) == counts
    assert (ema.decay, ema.num_updates) == (0.75, 0)


@pytest.mark.parametrize("state", [None, 3, [], {}, {"weights": 1}])
def test_a_state_in_no_known_format_is_refused(state):
    with pytest.raises((TypeError, ValueError), match="state_dict"):
        EMA(make_model()).load_state_dict(state)


def test_loading_while_applied_keeps_the_raw_weights(averaged):
    """Either refused, or the weights come back: never lost."""
    model, ema = averaged
    raw, state = copies(model.parameters()), EMA(make_model(dtype=F32)).state_dict()
    ema.apply_shadow()
    with contextlib.suppress(RuntimeError):
        ema.load_state_dict(state)
    ema.restore()
    assert_all_same(model.parameters(), raw)


# --- inside the step -----------------------------------------------------------------------------

STEP_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
    {"momentum": 0.9, "formulation": "sutskever"},
    {"momentum": 0.9, "nesterov": True, "formulation": "sutskever", "weight_decay": 0.1},
    {"momentum": 0.9, "reset_grads": True},
    {"momentum": 0.9, "lr": torch.tensor(0.1)},
]
STEP_DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)]
STEP_SHAPES = [(3, 7), (17,), (), (0,), (1000,), (16384 + 1,)]


@pytest.mark.parametrize(("dtype", "grad_dtype"), STEP_DTYPES)
@pytest.mark.parametrize("options", STEP_OPTIONS, ids=lambda o: ",".join(o) or "plain")
@pytest.mark.parametrize("decay", [0.9, 0.2])
def test_in_step_and_standalone_updates_are_equal_bit_for_bit(options, dtype, grad_dtype, decay):
    fused, plain = (make_params(STEP_SHAPES, dtype=dtype) for _ in range(2))
    fused_ema, plain_ema = EMA(fused, decay=decay), EMA(plain, decay=decay)
    options = {"lr": 0.1, **options}
    one = SGD(fused, **options, ema=fused_ema)
    two = SGD(plain, **options)
    for step in range(5):
        for i, (p, q) in enumerate(zip(fused, plain, strict=True)):
            p.grad_dtype = q.grad_dtype = grad_dtype
            p.grad = random_tensor(p.shape, grad_dtype, seed=100 * step + i)
            q.grad = p.grad.clone()
        one.step()
        two.step()
        plain_ema.update()
        assert_all_same(fused, copies(plain))
        assert_all_same(fused_ema.shadows, copies(plain_ema.shadows))
    assert fused_ema.num_updates == plain_ema.num_updates == 5


def test_every_tracked_tensor_is_updated_in_the_step():
    """With or without a gradient, inside or outside the optimizer, even when nothing has one."""
    model = make_model()
    ema = EMA(model, decay=0.5)
    first, second = model[0], model[2]
    optimizer = SGD(first.parameters(), lr=0.1, momentum=0.9, ema=ema)
    old = copies(ema.shadows)
    perturb(model.parameters(), seed=0)
    first.weight.grad = torch.ones_like(first.weight)  # first.bias gets none
    optimizer.step()
    for s, before, p in zip(ema.shadows.values(), old, model.parameters(), strict=True):
        assert_same_bits(s, halfway(before, p.detach()))
    assert second.weight.grad is None

    old = copies(ema.shadows)
    perturb(model.parameters(), seed=1)
    optimizer.zero_grad()
    optimizer.step()
    for s, before, p in zip(ema.shadows.values(), old, model.parameters(), strict=True):
        assert_same_bits(s, halfway(before, p.detach()))
    assert ema.num_updates == 2


def test_average_may_track_a_part_of_the_optimizers_parameters():
    params = make_params([(3,), (4,), (5,)])
    ema = EMA([("middle", params[1])], decay=0.5)
    old = params[1].detach().clone()
    optimizer = SGD(params, lr=1.0, ema=ema)
    for p in params:
        p.grad = torch.ones_like(p)
    before = copies(params)
    optimizer.step()
    assert_all_same(params, [p - 1.0 for p in before])
    assert_same_bits(ema.shadows["middle"], halfway(old, params[1].detach()))


def test_parameters_of_several_groups_are_averaged():
    params = make_params([(3,), (4,), (5,)])
    ema = EMA(params, decay=0.5)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (1.0, 2.0, 4.0), strict=True)]
    optimizer = SGD(groups, lr=1.0, ema=ema)
    old = copies(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for s, before, p in zip(ema.shadows.values(), old, params, strict=True):
        assert_same_bits(s, halfway(before, p.detach()))


def test_mixed_dtypes_in_one_step():
    params = [make_params([(9,)], dtype=d, seed=i)[0] for i, d in enumerate(DEFAULT_SHADOW)]
    ema = EMA(params, decay=0.5)
    optimizer = SGD(params, lr=0.5, momentum=0.9, ema=ema)
    for step in range(3):
        before = copies(ema.shadows)
        set_gradients(params, seed=step)
        optimizer.step()
        for s, old, p in zip(ema.shadows.values(), before, params, strict=True):
            assert_ema_update(0.5, old, p, s)


def test_step_bumps_the_shadows_versions():
    params = make_params([(3,), (4,)])
    ema = EMA(params)
    optimizer = SGD(params, lr=0.1, ema=ema)
    params[0].grad = torch.ones(3)
    before = versions(ema.shadows)
    optimizer.step()
    assert_bumped(ema.shadows, before)


def test_stale_graph_through_a_shadow_fails_loudly():
    params = make_params([(3,)])
    ema = EMA(params)
    optimizer = SGD(params, lr=0.1, ema=ema)
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * ema.shadows["0"]).sum()  # saves the shadow for the backward pass
    params[0].grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_averaged_too():
    ours, plain = (nn.Embedding(6, 3, sparse=True) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    ema, plain_ema = EMA(ours, decay=0.5), EMA(plain, decay=0.5)
    one = SGD(ours.parameters(), lr=0.1, momentum=0.9, ema=ema)
    two = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for model in (ours, plain):
            model.zero_grad()
            model(torch.tensor([1, 4])).square().sum().backward()
        one.step()
        two.step()
        plain_ema.update()
    torch.testing.assert_close(ours.weight, plain.weight)
    torch.testing.assert_close(ema.shadows["weight"], plain_ema.shadows["weight"])
    assert ema.num_updates == 3


# --- attaching -----------------------------------------------------------------------------------


def test_attaching_and_detaching_after_construction():
    params = make_params([(3,)])
    ema = EMA(params, decay=0.5)
    optimizer = SGD(params, lr=0.1)
    assert optimizer.ema is None
    optimizer.ema = ema
    assert optimizer.ema is ema
    with pytest.raises(RuntimeError, match="optimizer"):
        ema.update()
    optimizer.step()
    assert ema.num_updates == 1
    optimizer.ema = None
    assert optimizer.ema is None
    optimizer.step()
    assert ema.num_updates == 1
    ema.update()
    assert ema.num_updates == 2


def test_one_average_rides_in_one_optimizer():
    params = make_params([(3,)])
    ema = EMA(params)
    first = SGD(params, lr=0.1, ema=ema)
    with pytest.raises((ValueError, RuntimeError), match=r"ema|EMA"):
        SGD(params, lr=0.1, ema=ema)
    second = SGD(params, lr=0.1)
    with pytest.raises((ValueError, RuntimeError), match=r"ema|EMA"):
        second.ema = ema
    assert second.ema is None
    assert first.ema is ema
    first.ema = ema  # the same one again is no second ride
    first.ema = None
    second.ema = ema
    second.step()
    assert ema.num_updates == 1


def test_an_average_outlives_its_optimizer():
    params = make_params([(3,)])
    ema = EMA(params, decay=0.5)
    first = SGD(params, lr=0.1, ema=ema)
    first.step()
    del first
    gc.collect()
    ema.update()
    SGD(params, lr=0.1, ema=ema).step()
    assert ema.num_updates == 3


def test_a_failed_constructor_does_not_keep_the_average():
    params = make_params([(3,)])
    ema = EMA(params)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SGD(params, lr=-1.0, ema=ema)
    SGD(params, lr=0.1, ema=ema).step()
    assert ema.num_updates == 1


def test_only_an_average_can_be_attached():
    with pytest.raises((TypeError, ValueError), match="ema"):
        SGD(make_params([(3,)]), lr=0.1, ema=0.999)


# --- copies --------------------------------------------------------------------------------------


def through_deepcopy(thing):
    return copy.deepcopy(thing)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("through", [through_deepcopy, through_pickle])
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_copies_of_model_and_optimizer_step_like_the_original(through, formulation):
    model = make_model()
    ema = EMA(model, decay=0.5)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, formulation=formulation, ema=ema)
    for step in range(2):
        set_gradients(model.parameters(), seed=step)
        optimizer.step()
    model2, optimizer2 = through((model, optimizer))
    ema2 = optimizer2.ema
    assert ema2 is not None
    assert ema2 is not ema
    assert ema2.num_updates == 2
    assert_all_same(ema2.shadows, copies(ema.shadows))
    assert not set(pointers(ema2.shadows)) & set(pointers(ema.shadows))

    untouched = copies(ema.shadows) + copies(model.parameters())
    set_gradients(model2.parameters(), seed=7)
    optimizer2.step()
    assert_all_same([*ema.shadows.values(), *model.parameters()], untouched)
    set_gradients(model.parameters(), seed=7)
    optimizer.step()
    assert_all_same(model2.parameters(), copies(model.parameters()))
    assert_all_same(ema2.shadows, copies(ema.shadows))

    with pytest.raises(RuntimeError):  # the copy is attached as the original is
        ema2.update()
    with ema2.average_parameters():  # and it tracks the copied model
        assert_all_same(model2.parameters(), copies(ema2.shadows))
    assert ema2.num_updates == ema.num_updates == 3


@pytest.mark.parametrize("through", [through_deepcopy, through_pickle])
def test_copy_of_an_average_alone_is_independent(through):
    model = make_model()
    ema = EMA(model, decay=0.0)
    ema.update()
    twin = through(ema)
    assert (twin.decay, twin.num_updates) == (0.0, 1)
    assert_all_same(twin.shadows, copies(ema.shadows))
    frozen = copies(ema.shadows)
    perturb(model.parameters(), seed=0)
    twin.update()
    assert_all_same(ema.shadows, frozen)
    assert (twin.num_updates, ema.num_updates) == (2, 1)
    ema.update()
    assert_all_same(ema.shadows, copies(model.parameters()))


@pytest.mark.parametrize("through", [through_deepcopy, through_pickle])
def test_copy_of_an_optimizer_alone_tracks_its_own_parameters(through):
    params = make_params([(3,), (4,)])
    ema = EMA(params, decay=0.0)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)
    set_gradients(params, seed=0)
    optimizer.step()
    twin = through(optimizer)
    frozen = copies(ema.shadows)
    twin_params = twin.param_groups[0]["params"]
    set_gradients(twin_params, seed=1)
    twin.step()
    assert_all_same(twin.ema.shadows, copies(twin_params))
    assert_all_same(ema.shadows, frozen)
    assert all_differ(twin.ema.shadows, frozen)


def test_deepcopy_of_model_and_average_tracks_the_copied_model():
    model = make_model()
    ema = EMA(model, decay=0.0)
    model2, ema2 = copy.deepcopy((model, ema))
    perturb(model2.parameters(), seed=0)
    ema2.update()
    assert_all_same(ema2.shadows, copies(model2.parameters()))


def test_deepcopy_of_an_attached_average_alone_is_free():
    """A copy without its optimizer rides in none, so it can be updated."""
    params = make_params([(3,)])
    ema = EMA(params)
    optimizer = SGD(params, lr=0.1, ema=ema)
    twin = copy.deepcopy(ema)
    assert optimizer.ema is ema
    twin.update()
    assert (twin.num_updates, ema.num_updates) == (1, 0)
