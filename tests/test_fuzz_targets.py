"""The targets of `make fuzz` on a few inputs, without atheris, and what they have found."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from fuzz.targets import TARGETS
from torch import nn

from fused_opt import _C, EMA, SGD

INPUTS = 25


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_keeps_its_promises_on_random_inputs(name):
    source = random.Random(name)
    for _ in range(INPUTS):
        TARGETS[name](source.randbytes(source.choice((16, 64, 256))))


# --- what crashed, or changed something --------------------------------------------------------


def group():
    return _C.Group()


class Mute(torch.Tensor):
    def is_neg(self):
        raise ZeroDivisionError


def test_what_a_subclass_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        _C.Plan().add([torch.ones(1).as_subclass(Mute)], *[None] * 5, group(), False)


class Interrupted:
    """Ctrl-C while torch's code asks what it is."""

    @property
    def __class__(self):
        raise KeyboardInterrupt


def test_ctrl_c_where_a_tensor_is_asked_for_is_ctrl_c():
    with pytest.raises(KeyboardInterrupt):
        _C.Plan().add_grads([Interrupted()], False)


@pytest.mark.parametrize("grads", [(1, 2), 3, "ab"], ids=repr)
def test_a_stream_that_is_no_list_is_refused(grads):
    with pytest.raises(TypeError, match="expected a list or None"):
        _C.Plan().add([torch.ones(1)] * 2, grads, None, None, None, None, group(), False)


def test_a_stream_that_is_too_short_is_refused():
    params = [torch.ones(1) for _ in range(3)]
    with pytest.raises(ValueError, match="lists of one length"):
        _C.Plan().add(params, params[:1], None, None, None, None, group(), False)


@pytest.mark.parametrize("streams", [[(torch.ones(1),)], [5]], ids=["tuple", "number"])
def test_a_pass_refuses_a_stream_that_is_no_list(streams):
    with pytest.raises(TypeError, match="expected a list or None"):
        _C.fit_pass(streams, [(0.1, 0.0, 0.0, 0.0, True)])


@pytest.mark.parametrize("hypers", [[5], [[0.1, 0, 0, 0, True]]], ids=["number", "list"])
def test_a_pass_refuses_numbers_that_are_no_tuple(hypers):
    with pytest.raises(TypeError, match="expected a tuple"):
        _C.fit_pass([[torch.ones(1)]], hypers)


@pytest.mark.parametrize("which", [-1, 6, 2**30])
def test_a_scalar_that_is_none_of_a_group_is_refused(which):
    plan = _C.Plan()
    plan.add([torch.ones(1)], [torch.ones(1)], None, None, None, None, group(), False)
    with pytest.raises(ValueError, match="number of a scalar"):
        plan.set_scalar(-1, which, 0, False)


@pytest.mark.parametrize("kind", [-1, 4, 300])
def test_an_unknown_pass_is_refused(kind):
    numbers = [(0.1, 0.0, 0.0, 0.0, True)]
    with pytest.raises(ValueError, match="kind of pass"):
        _C.run_pass(kind, [[torch.ones(1)]], None, numbers, False, False, 0, 1, 0)


def test_gradients_without_parameters_are_not_stepped():
    plan = _C.Plan()
    plan.add_grads([torch.ones(3)], False)
    with pytest.raises(RuntimeError, match="without their parameters"):
        plan.run(-1, 1, 0)


def test_averages_are_not_changed_under_rows():
    plan, ones = _C.Plan(), [torch.ones(3) for _ in range(3)]
    plan.set_averages([0.5], 0, 1, 0, frozenset())
    plan.add(ones[:1], ones[1:2], None, ones[2:], None, None, group(), False)
    with pytest.raises(RuntimeError, match="before rows"):
        plan.set_averages([0.5, 0.5], 0, 1, 0, frozenset())


@pytest.mark.parametrize("broken", ["options", "momentum"])
def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(broken):
    """Also where only what comes after torch's own loading finds out."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = [optimizer.state[p]["momentum_buffer"] for p in params]
    state["param_groups"][0]["lr"] = 5.0
    if broken == "options":
        state["state"][1]["momentum_buffer"] = torch.ones(2, dtype=torch.int64).to_sparse()
        state["param_groups"][0]["state_dtype"] = "float"
    else:
        state["param_groups"][0]["nesterov"] = object()
        state["state"] = {0: {"momentum_buffer": torch.ones(2)}, 1: 7}
    with pytest.raises((ValueError, AttributeError, TypeError)):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    for param, momentum in zip(params, before, strict=True):
        assert optimizer.state[param]["momentum_buffer"] is momentum


@pytest.mark.parametrize(
    "bad", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"]
)
def test_a_state_with_a_tensor_that_cannot_be_copied_changes_nothing(bad):
    """Also where the other tensors can be."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    state = copy.deepcopy(ema.state_dict())
    shadows = state["averages"][0]
    shadows["weight"].zero_()
    shadows["bias"] = bad(shadows["bias"])
    with pytest.raises(ValueError, match="'bias', got shape"):
        ema.load_state_dict(state)
    assert torch.equal(ema.shadows["weight"], model.weight)
