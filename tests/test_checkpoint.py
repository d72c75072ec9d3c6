"""Checkpoints go to torch.optim.SGD and back, and between formulations, without loss."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import (
    DTYPES,
    FULL_DTYPES,
    HALF_DTYPES,
    MOMENTUM_KEYS,
    assert_same_bits,
    make_params,
    momentum_of,
    set_gradients,
)
from torch import nn

from fused_opt import EMA, SGD

Params = list[nn.Parameter]
Optimizer = torch.optim.Optimizer

SHAPES = [(3, 5), (17,), (), (2, 3, 4)]

HYPER: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "weight_decay": {"lr": 0.1, "weight_decay": 0.05},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.05},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "maximize": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    "tensor_lr": {"lr": torch.tensor(0.1), "momentum": 0.9},
    "tensor_lr_2d": {"lr": torch.tensor([[0.1]]), "momentum": 0.9},
}
WITH_MOMENTUM = {name: hyper for name, hyper in HYPER.items() if "momentum" in hyper}


def stock(params: Params, **hyper: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, foreach=False, **hyper)


KINDS: dict[str, Callable[..., Optimizer]] = {"ours": SGD, "torch": stock}
DIRECTIONS = [("ours", "torch"), ("torch", "ours"), ("ours", "ours")]


def params_of(optimizer: Optimizer) -> Params:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Optimizer, steps: range) -> None:
    """The same gradients for the same steps, whichever optimizer takes them."""
    for step in steps:
        set_gradients(params_of(optimizer), seed=step)
        optimizer.step()


def clones(params: Params) -> Params:
    return [nn.Parameter(p.detach().clone()) for p in params]


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def assert_same_path(one: Optimizer, two: Optimizer, *, exactly: bool = False) -> None:
    """Both optimizers move the same parameters alike, to the last few bits."""
    for p, q in zip(params_of(one), params_of(two), strict=True):
        if exactly:
            assert_same_bits(p, q)
        else:
            tolerance = 1e-13 if p.dtype == torch.float64 else 2e-6
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def assert_same_momentum(one: Optimizer, two: Optimizer) -> None:
    for p, q in zip(params_of(one), params_of(two), strict=True):
        a, b = one.state[p]["momentum_buffer"], two.state[q]["momentum_buffer"]
        assert_same_bits(a, b)
        assert a.data_ptr() != b.data_ptr()


# --- to torch and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER)
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_training_goes_on_in_the_other_optimizer(writer, reader, hyper, dtype):
    params = make_params(SHAPES, dtype)
    original = KINDS[writer](params, **hyper)
    train(original, range(3))
    # All but the learning rate differs: the checkpoint brings the hyper-parameters.
    resumed = KINDS[reader](clones(params), lr=0.5)
    resumed.load_state_dict(through_file(original.state_dict()))
    for key, value in hyper.items():
        assert resumed.param_groups[0][key] == value
    if hyper.get("momentum"):
        assert_same_momentum(resumed, original)
    else:
        assert not any(resumed.state.get(p) for p in params_of(resumed))
    train(original, range(3, 6))
    train(resumed, range(3, 6))
    assert_same_path(resumed, original, exactly=writer == reader)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_half_precision_momentum_keeps_its_values(writer, reader, dtype):
    params = make_params(SHAPES, dtype)
    original = KINDS[writer](params, lr=0.1, momentum=0.9)
    train(original, range(3))
    resumed = KINDS[reader](clones(params), lr=0.1, momentum=0.9)
    resumed.load_state_dict(through_file(original.state_dict()))
    assert_same_momentum(resumed, original)
    assert all(resumed.state[p]["momentum_buffer"].dtype == dtype for p in params_of(resumed))
    train(original, range(3, 4))
    train(resumed, range(3, 4))
    for p, q in zip(params_of(resumed), params_of(original), strict=True):
        unit = torch.finfo(dtype).eps  # torch rounds after every operation
        torch.testing.assert_close(p, q, rtol=4 * unit, atol=4 * unit)


def test_a_checkpoint_survives_the_round_trip_bit_for_bit():
    params = make_params(SHAPES)
    ours = SGD(params, lr=0.1, momentum=0.9)
    train(ours, range(3))
    theirs = stock(clones(params), lr=0.1)
    theirs.load_state_dict(through_file(ours.state_dict()))
    back = SGD(clones(params), lr=0.1)
    back.load_state_dict(through_file(theirs.state_dict()))
    assert_same_momentum(back, ours)
    one, two = ours.state_dict()["param_groups"], back.state_dict()["param_groups"]
    assert one == two


def test_state_is_laid_out_as_torchs():
    """The same keys in the state, and torch's keys plus ours in the groups."""
    params = make_params(SHAPES)
    ours, theirs = SGD(params, lr=0.1, momentum=0.9), stock(clones(params), lr=0.1, momentum=0.9)
    train(ours, range(2))
    train(theirs, range(2))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert {i: set(s) for i, s in a["state"].items()} == {i: set(s) for i, s in b["state"].items()}
    extra = set(a["param_groups"][0]) - set(b["param_groups"][0])
    assert extra == {
        "formulation",
        "decoupled_weight_decay",
        "reset_grads",
        "state_dtype",
        "master_weights",
        "stochastic_rounding",
        "rounding_seed",
        "rounding_steps",
        "max_grad_norm",
        "capturable",
    }
    assert set(b["param_groups"][0]) <= set(a["param_groups"][0])


def test_different_learning_rates_per_group_travel():
    params = make_params(SHAPES)
    groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)]
    ours = SGD(groups, momentum=0.9)
    train(ours, range(2))
    theirs = stock([{"params": [p]} for p in clones(params)], lr=1.0)
    theirs.load_state_dict(through_file(ours.state_dict()))
    back = SGD([{"params": [p]} for p in clones(params)], lr=1.0)
    back.load_state_dict(through_file(theirs.state_dict()))
    assert [g["lr"] for g in back.param_groups] == [g["lr"] for g in ours.param_groups]
    for optimizer in (ours, theirs, back):
        train(optimizer, range(2, 4))
    assert_same_path(back, ours, exactly=True)
    assert_same_path(back, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_of_other_strides_than_the_parameters_goes_on(kind, dtype):
    """A checkpoint of contiguous parameters, loaded into channels_last ones."""
    source = KINDS[kind](make_params([(4, 3, 5, 5)], dtype), lr=0.1, momentum=0.9)
    train(source, range(2))
    twin, reader = (
        SGD([nn.Parameter(p.detach().clone(memory_format=memory_format))], lr=0.1)
        for p in params_of(source)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    for optimizer in (twin, reader):
        optimizer.load_state_dict(through_file(source.state_dict()))
        train(optimizer, range(2, 5))
    assert_same_path(reader, twin, exactly=True)
    assert_same_momentum(reader, twin)


def test_momentum_of_another_dtype_is_cast_to_the_parameters_as_in_torch():
    params = make_params(SHAPES, torch.float32)
    source = stock(params, lr=0.1, momentum=0.9)
    train(source, range(2))
    reader = SGD(make_params(SHAPES, torch.bfloat16), lr=0.1, momentum=0.9)
    reader.load_state_dict(source.state_dict())
    for p, q in zip(params_of(reader), params, strict=True):
        expected = source.state[q]["momentum_buffer"].bfloat16()
        assert_same_bits(reader.state[p]["momentum_buffer"], expected)
    train(reader, range(2, 3))


def test_loading_into_fewer_groups_raises_and_changes_nothing():
    params = make_params(SHAPES)
    ours = SGD(params, lr=0.1, momentum=0.9)
    train(ours, range(2))
    before = [ours.state[p]["momentum_buffer"].clone() for p in params]
    other = SGD([{"params": [p]} for p in clones(params)], lr=0.3)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict(other.state_dict())
    for p, expected in zip(params, before, strict=True):
        assert_same_bits(ours.state[p]["momentum_buffer"], expected)
    assert ours.param_groups[0]["lr"] == 0.1


# --- options that torch does not know ------------------------------------------------------------


@pytest.mark.parametrize("formulation", MOMENTUM_KEYS)
@pytest.mark.parametrize("reset_grads", [False, True])
def test_a_checkpoint_of_torch_keeps_the_constructors_options(formulation, reset_grads):
    params = make_params(SHAPES)
    theirs = stock(clones(params), lr=0.1, momentum=0.9)
    train(theirs, range(2))
    ours = SGD(params, lr=0.5, formulation=formulation, reset_grads=reset_grads)
    ours.load_state_dict(through_file(theirs.state_dict()))
    (group,) = ours.param_groups
    assert (group["formulation"], group["reset_grads"]) == (formulation, reset_grads)
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    train(ours, range(2, 3))
    assert all(bool(p.grad.any()) != reset_grads for p in params)


def test_a_checkpoint_of_torch_keeps_the_options_of_each_group():
    params = make_params([(3,), (4,)])
    theirs = stock([{"params": [p]} for p in clones(params)], lr=0.1, momentum=0.9)
    train(theirs, range(2))
    ours = SGD(
        [
            {"params": params[:1], "formulation": "sutskever"},
            {"params": params[1:], "reset_grads": True},
        ],
        lr=0.1,
    )
    ours.load_state_dict(theirs.state_dict())
    options = [(g["formulation"], g["reset_grads"]) for g in ours.param_groups]
    assert options == [("sutskever", False), ("torch", True)]


def test_our_own_checkpoint_brings_reset_grads():
    params = make_params(SHAPES)
    source = SGD(params, lr=0.1, reset_grads=True)
    reader = SGD(clones(params), lr=0.1)
    reader.load_state_dict(through_file(source.state_dict()))
    assert reader.param_groups[0]["reset_grads"] is True
    train(reader, range(1))
    assert not any(p.grad.any() for p in params_of(reader))


def test_a_pickled_state_without_our_options_gets_the_defaults():
    """What an optimizer of torch's own class, or of an older version, left behind."""
    params = make_params(SHAPES)
    theirs = stock(params, lr=0.1, momentum=0.9)
    train(theirs, range(2))
    ours = SGD.__new__(SGD)
    ours.__setstate__(theirs.__getstate__())
    (group,) = ours.param_groups
    assert (group["formulation"], group["reset_grads"]) == ("torch", False)
    assert ours.ema is None
    twin = stock(clones(params), lr=0.1)
    twin.load_state_dict(through_file(theirs.state_dict()))
    train(ours, range(2, 4))
    train(twin, range(2, 4))
    assert_same_path(ours, twin)


# --- formulations --------------------------------------------------------------------------------


def choose(optimizer: SGD, formulation: str) -> None:
    """Whatever formulation a checkpoint has brought, go on in this one."""
    for group in optimizer.param_groups:
        group["formulation"] = formulation


def other(formulation: str) -> str:
    return {"torch": "sutskever", "sutskever": "torch"}[formulation]


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("hyper", WITH_MOMENTUM.values(), ids=WITH_MOMENTUM)
@pytest.mark.parametrize("written_in", MOMENTUM_KEYS)
def test_training_goes_on_in_the_other_formulation(written_in, hyper, dtype):
    source = SGD(make_params(SHAPES, dtype), **hyper, formulation=written_in)
    train(source, range(3))
    reader = SGD(clones(params_of(source)), **hyper, formulation=other(written_in))
    reader.load_state_dict(through_file(source.state_dict()))
    choose(reader, other(written_in))
    train(source, range(3, 6))
    train(reader, range(3, 6))
    assert_same_path(reader, source)
    for p in params_of(reader):
        assert set(reader.state[p]) == {MOMENTUM_KEYS[other(written_in)]}


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("hyper", WITH_MOMENTUM.values(), ids=WITH_MOMENTUM)
def test_a_checkpoint_of_torch_goes_on_in_the_sutskever_formulation(hyper, dtype):
    source = stock(make_params(SHAPES, dtype), **hyper)
    train(source, range(3))
    reader = SGD(clones(params_of(source)), **hyper, formulation="sutskever")
    reader.load_state_dict(through_file(source.state_dict()))
    train(source, range(3, 6))
    train(reader, range(3, 6))
    assert_same_path(reader, source)
    for p in params_of(reader):
        assert set(reader.state[p]) == {"velocity"}


def test_a_formulation_changed_in_mid_training_keeps_the_path():
    ours, theirs = (kind(make_params(SHAPES), lr=0.1, momentum=0.9) for kind in KINDS.values())
    for i, formulation in enumerate(("torch", "sutskever", "sutskever", "torch")):
        choose(ours, formulation)
        train(ours, range(2 * i, 2 * i + 2))
        train(theirs, range(2 * i, 2 * i + 2))
    assert_same_path(ours, theirs)


def test_each_group_converts_with_its_own_learning_rate():
    """With powers of two for rates nothing is lost by the scaling."""
    params = make_params([(3,), (4,), (5,)])
    rates, formulations = [0.5, 0.25, 0.125], ["sutskever", "torch", "sutskever"]
    source = stock(
        [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)], momentum=0.5
    )
    train(source, range(2))
    groups = [
        {"params": [p], "formulation": f} for p, f in zip(clones(params), formulations, strict=True)
    ]
    reader = SGD(groups, lr=1.0)
    reader.load_state_dict(through_file(source.state_dict()))
    assert [g["formulation"] for g in reader.param_groups] == formulations
    train(source, range(2, 4))
    train(reader, range(2, 4))
    assert_same_path(reader, source, exactly=True)
    for p, q, lr, f in zip(params_of(reader), params, rates, formulations, strict=True):
        scale = 1.0 if f == "torch" else -lr
        assert_same_bits(momentum_of(reader, p), scale * source.state[q]["momentum_buffer"])


def test_conversion_leaves_the_checkpoint_alone():
    params = make_params(SHAPES)
    source = SGD(params, lr=0.1, momentum=0.9)
    train(source, range(2))
    state = source.state_dict()
    before = copy.deepcopy(state)
    reader = SGD(clones(params), lr=0.1, formulation="sutskever")
    reader.load_state_dict(state)
    choose(reader, "sutskever")
    train(reader, range(2, 3))
    assert state["param_groups"] == before["param_groups"]
    assert state["state"].keys() == before["state"].keys()
    for i, entry in state["state"].items():
        assert set(entry) == {"momentum_buffer"}
        assert_same_bits(entry["momentum_buffer"], before["state"][i]["momentum_buffer"])


def test_conversion_without_state_and_of_none_is_a_first_step():
    params = make_params(SHAPES)
    source = stock(params, lr=0.1, momentum=0.9)
    state = source.state_dict()
    state["state"] = {1: {"momentum_buffer": None}}
    reader = SGD(clones(params), lr=0.1, formulation="sutskever")
    reader.load_state_dict(state)
    train(source, range(3))
    train(reader, range(3))
    assert_same_path(reader, source)


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_velocity_is_never_divided_by_a_zero_learning_rate(zero):
    """Refused when it is loaded, or when it would be used."""
    source = SGD(make_params(SHAPES), lr=0.1, momentum=0.9, formulation="sutskever")
    train(source, range(2))
    source.param_groups[0]["lr"] = zero
    reader = SGD(clones(params_of(source)), lr=0.3, momentum=0.8)
    before = clones(params_of(reader))

    def load_and_step() -> None:
        reader.load_state_dict(source.state_dict())
        choose(reader, "torch")
        train(reader, range(2, 3))

    with pytest.raises(ValueError, match=r"lr|learning rate"):
        load_and_step()
    for p, expected in zip(params_of(reader), before, strict=True):
        assert_same_bits(p, expected)
        assert reader.state[p].get("momentum_buffer") is None


def test_torch_never_misreads_a_velocity():
    """torch.optim.SGD finds no momentum_buffer in it, and starts afresh."""
    params = make_params(SHAPES)
    source = SGD(params, lr=0.1, momentum=0.9, formulation="sutskever")
    train(source, range(2))
    theirs, fresh = (stock(clones(params), lr=0.1, momentum=0.9) for _ in range(2))
    theirs.load_state_dict(through_file(source.state_dict()))
    train(theirs, range(2, 4))
    train(fresh, range(2, 4))
    assert_same_path(theirs, fresh, exactly=True)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_momentum_is_rounded_once_when_it_is_converted(dtype):
    """A zero gradient shows the converted momentum: one rounding by it, one by the step."""
    source = SGD(make_params(SHAPES, dtype), lr=0.1, momentum=0.5)
    train(source, range(2))
    reader = SGD(clones(params_of(source)), lr=0.1)
    reader.load_state_dict(source.state_dict())
    choose(reader, "sutskever")
    for p in params_of(reader):
        p.grad = torch.zeros_like(p)
    reader.step()
    unit = torch.finfo(dtype).eps / 2
    for p, q in zip(params_of(reader), params_of(source), strict=True):
        exact = 0.5 * -0.1 * source.state[q]["momentum_buffer"].double()
        found = reader.state[p]["velocity"].double()
        torch.testing.assert_close(found, exact, rtol=2.1 * unit, atol=2.0**-24)


# --- momentum that comes and goes ----------------------------------------------------------------


@pytest.mark.parametrize("formulation", MOMENTUM_KEYS)
def test_momentum_turned_on_after_loading_starts_with_the_gradient(formulation):
    params = make_params(SHAPES)
    source = SGD(params, lr=0.1, formulation=formulation)
    train(source, range(2))
    assert source.state_dict()["state"] == {}
    ours = SGD(clones(params), lr=0.1, formulation=formulation)
    theirs = stock(clones(params), lr=0.1)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(source.state_dict())
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
        train(optimizer, range(2, 5))
    assert_same_path(ours, theirs)


def test_momentum_turned_off_and_on_continues_as_in_torch():
    ours = SGD(make_params(SHAPES), lr=0.1, momentum=0.9)
    theirs = stock(make_params(SHAPES), lr=0.1, momentum=0.9)
    for optimizer in (ours, theirs):
        for i, momentum in enumerate((0.9, 0.0, 0.9, 0.5)):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, range(2 * i, 2 * i + 2))
    assert_same_path(ours, theirs)


@pytest.mark.parametrize("formulation", MOMENTUM_KEYS)
def test_an_empty_momentum_buffer_is_a_first_step(formulation):
    params = make_params(SHAPES)
    optimizer = SGD(params, lr=0.1, momentum=0.9, dampening=0.5, formulation=formulation)
    theirs = stock(clones(params), lr=0.1, momentum=0.9, dampening=0.5)
    state = optimizer.state_dict()
    state["state"] = {i: {MOMENTUM_KEYS[formulation]: None} for i in range(len(params))}
    optimizer.load_state_dict(state)
    train(optimizer, range(3))
    train(theirs, range(3))
    assert_same_path(optimizer, theirs)


# --- copies --------------------------------------------------------------------------------------


def through_deepcopy(thing):
    return copy.deepcopy(thing)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formulation", MOMENTUM_KEYS)
@pytest.mark.parametrize("through", [through_deepcopy, through_pickle])
def test_a_copy_of_the_optimizer_steps_like_the_original(through, formulation, dtype):
    optimizer = SGD(
        make_params(SHAPES, dtype),
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        formulation=formulation,
        reset_grads=True,
    )
    train(optimizer, range(2))
    twin = through(optimizer)
    assert type(twin) is SGD
    assert twin.ema is None
    assert twin._step_supports_amp_scaling == optimizer._step_supports_amp_scaling
    assert not {p.data_ptr() for p in params_of(twin)} & {
        p.data_ptr() for p in params_of(optimizer)
    }
    train(optimizer, range(2, 5))
    train(twin, range(2, 5))
    assert_same_path(twin, optimizer, exactly=True)
    for p, q in zip(params_of(twin), params_of(optimizer), strict=True):
        assert_same_bits(momentum_of(twin, p), momentum_of(optimizer, q))
    assert not any(p.grad.any() for p in params_of(twin))


# --- with an average -----------------------------------------------------------------------------


@pytest.mark.parametrize("writer", KINDS)
def test_loading_keeps_the_average_attached(writer):
    params = make_params(SHAPES)
    source = KINDS[writer](clones(params), lr=0.1, momentum=0.9)
    train(source, range(2))
    ema = EMA(params, decay=0.0)
    optimizer = SGD(params, lr=0.1, ema=ema)
    optimizer.load_state_dict(through_file(source.state_dict()))
    assert optimizer.ema is ema
    with pytest.raises(RuntimeError):
        ema.update()
    train(optimizer, range(2, 3))
    assert ema.num_updates == 1
    for shadow, p in zip(ema.shadows.values(), params, strict=True):
        assert_same_bits(shadow, p.detach())


def test_model_optimizer_and_average_resume_bit_for_bit():
    params = make_params(SHAPES)
    ema = EMA(params, decay=0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)
    train(optimizer, range(3))
    state = {"optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
    state = through_file(state)
    resumed_params = clones(params)
    resumed_ema = EMA(resumed_params)
    resumed = SGD(resumed_params, lr=1.0, ema=resumed_ema)
    resumed.load_state_dict(state["optimizer"])
    resumed_ema.load_state_dict(state["ema"])
    train(optimizer, range(3, 6))
    train(resumed, range(3, 6))
    assert_same_path(resumed, optimizer, exactly=True)
    assert resumed_ema.num_updates == ema.num_updates == 6
    for a, b in zip(resumed_ema.shadows.values(), ema.shadows.values(), strict=True):
        assert_same_bits(a, b)


def test_the_average_is_not_in_the_optimizers_checkpoint():
    """So that torch.optim.SGD can load it; the average has a state_dict of its own."""
    params = make_params(SHAPES)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=EMA(params))
    train(optimizer, range(1))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert "ema" not in state["param_groups"][0]
    assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())


# --- hooks ---------------------------------------------------------------------------------------


def test_what_a_hook_changes_is_what_is_loaded():
    """Hooks are how torch has users move state to other parameters."""

    def fresh_momentum(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            index: {key: torch.full_like(value, 7.0) for key, value in of_param.items()}
            for index, of_param in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def double(optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            state["momentum_buffer"].mul_(2)

    for kind in KINDS.values():
        source, loaded = (kind(make_params(SHAPES), lr=0.1, momentum=0.9) for _ in range(2))
        train(source, range(2))
        loaded.register_load_state_dict_pre_hook(fresh_momentum)
        loaded.register_load_state_dict_post_hook(double)
        loaded.load_state_dict(source.state_dict())
        for p in params_of(loaded):
            assert_same_bits(loaded.state[p]["momentum_buffer"], torch.full_like(p, 14.0))
        assert list(loaded._optimizer_load_state_dict_pre_hooks.values()) == [fresh_momentum]
        assert list(loaded._optimizer_load_state_dict_post_hooks.values()) == [double]


def test_a_hook_may_leave_our_options_out_of_a_checkpoint():
    def as_torch(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        kept = set(torch.optim.SGD([torch.zeros(1)]).param_groups[0])
        groups = [{k: g[k] for k in g if k in kept} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    ours = SGD(make_params(SHAPES), lr=0.1, momentum=0.9)
    train(ours, range(2))
    ours.register_state_dict_post_hook(as_torch)
    theirs = stock(make_params(SHAPES))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


# --- refinements that no longer fit --------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fp32", "split", "kahan"])
@pytest.mark.parametrize("between", ["torch", "float32 and back"])
def test_a_refinement_that_was_rounded_is_not_taken_for_another(mode, between):
    """torch.optim.SGD keeps state in the parameter's dtype, whatever it means."""
    param = nn.Parameter(torch.full((4,), 3.0, dtype=torch.bfloat16))
    optimizer = SGD([param], lr=0.1, master_weights=mode)
    param.grad = torch.full_like(param, 0.01)
    optimizer.step()
    if between == "torch":
        theirs = stock([param], lr=0.1)
        theirs.load_state_dict(optimizer.state_dict())
        param.grad = torch.full_like(param, 10.0)
        theirs.step()
        optimizer.load_state_dict(theirs.state_dict())
    else:
        param.grad = None
        param.data = param.data.float()
        optimizer.sync_masters()
        param.data = param.data.bfloat16()
    expected = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(param, expected)
