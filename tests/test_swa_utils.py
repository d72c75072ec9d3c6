"""get_ema_multi_avg_fn: torch's AveragedModel on our kernel."""

import copy
import pickle

import pytest
import torch
from reference import assert_ema_update, assert_same_bits, random_tensor
from torch import nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

import fused_opt
from fused_opt import get_ema_multi_avg_fn

F32, BF16 = torch.float32, torch.bfloat16


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def train(model: nn.Module, seed: int) -> None:
    """Moves every parameter, and BatchNorm's buffers with them."""
    model(random_tensor((4, 5), F32, seed=seed))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(random_tensor(p.shape, p.dtype, seed=100 * seed + i), alpha=0.1)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_matches_torchs_own_function(decay, use_buffers):
    model = make_model()
    ours, theirs = (
        AveragedModel(model, multi_avg_fn=make(decay), use_buffers=use_buffers)
        for make in (get_ema_multi_avg_fn, swa_utils.get_ema_multi_avg_fn)
    )
    for step in range(10):
        train(model, seed=step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    expected = theirs.state_dict()
    assert int(ours.n_averaged) == 10
    for name, tensor in ours.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_the_default_decay_is_torchs():
    average, tensor = torch.zeros(1), torch.ones(1)
    get_ema_multi_avg_fn()([average], [tensor], 1)
    torch.testing.assert_close(average, torch.tensor([0.001]))


def test_runs_the_kernel(monkeypatch):
    """In one call, and so in one pass over memory."""
    calls = []
    kernel = fused_opt.functional.ema_update_
    monkeypatch.setattr(
        "fused_opt.swa_utils.ema_update_",
        lambda shadows, params, *, decay: (
            calls.append(len(shadows)),
            kernel(shadows, params, decay=decay),
        ),
    )
    model = make_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        average.update_parameters(model)
    assert calls == [6]


def test_integer_buffers_are_copied_exactly():
    """torch's own function averages BatchNorm's counter too, and truncates what it gets."""
    model = make_model()
    ours, theirs = (
        AveragedModel(model, multi_avg_fn=make(0.9), use_buffers=True)
        for make in (get_ema_multi_avg_fn, swa_utils.get_ema_multi_avg_fn)
    )
    for step in range(30):
        train(model, seed=step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert int(ours.module[1].num_batches_tracked) == 30
    assert int(theirs.module[1].num_batches_tracked) < 30


def test_integers_beyond_the_precision_of_floats_stay_exact():
    averages = [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)]
    tensors = [torch.tensor([2**53 + 1, -(2**62) - 1]), torch.tensor([True, False])]
    get_ema_multi_avg_fn(0.9)(averages, tensors, 1)
    assert averages[0].tolist() == tensors[0].tolist()
    assert averages[1].tolist() == tensors[1].tolist()


def test_float32_averages_of_a_bfloat16_model():
    model = make_model().to(BF16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.module.float()
    average.update_parameters(model)
    before = {name: p.detach().clone() for name, p in average.module.named_parameters()}
    train(model.float(), seed=1)
    model.to(BF16)
    average.update_parameters(model)
    for (name, shadow), p in zip(
        average.module.named_parameters(), model.parameters(), strict=True
    ):
        assert shadow.dtype == F32
        assert_ema_update(0.9, before[name], p, shadow)


def test_one_call_takes_any_mixture_of_dtypes():
    dtypes = [(F32, BF16), (BF16, F32), (torch.int64, torch.int64), (torch.float64, torch.float64)]
    averages = [random_tensor((9,), F32, seed=i).mul(8).to(s) for i, (s, _) in enumerate(dtypes)]
    tensors = [random_tensor((9,), F32, seed=9 + i).mul(8).to(p) for i, (_, p) in enumerate(dtypes)]
    before = [s.clone() for s in averages]
    get_ema_multi_avg_fn(0.75)(averages, tensors, torch.tensor(3))
    for old, tensor, new in zip(before, tensors, averages, strict=True):
        if new.is_floating_point():
            assert_ema_update(0.75, old, tensor, new)
        else:
            assert_same_bits(new, tensor)


def test_complex_averages_match_torchs():
    tensor = torch.complex(random_tensor((9,), F32, seed=0), random_tensor((9,), F32, seed=1))
    ours, theirs = torch.ones_like(tensor), torch.ones_like(tensor)
    get_ema_multi_avg_fn(0.9)([ours], [tensor], 1)
    swa_utils.get_ema_multi_avg_fn(0.9)([theirs], [tensor], 1)
    torch.testing.assert_close(ours, theirs)


def test_a_tensor_of_the_decay_may_change_between_updates():
    decay, average = torch.tensor(1.0), torch.zeros(3)
    update = get_ema_multi_avg_fn(decay)
    update([average], [torch.ones(3)], 1)
    assert average.tolist() == [0.0] * 3
    decay.fill_(0.5)
    update([average], [torch.ones(3)], 2)
    assert average.tolist() == [0.5] * 3


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_averaged_model_can_be_copied_and_pickled(through):
    model = make_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    twin = through(average)
    train(model, seed=1)
    average.update_parameters(model)
    twin.update_parameters(model)
    for a, b in zip(average.parameters(), twin.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), None])
def test_decay_outside_the_unit_interval_is_refused(decay):
    with pytest.raises(ValueError, match="Invalid decay"):
        get_ema_multi_avg_fn(decay)


def test_lists_of_different_length_change_nothing():
    averages = [torch.zeros(2, dtype=torch.int64), torch.zeros(2)]
    with pytest.raises(ValueError, match="shorter"):
        get_ema_multi_avg_fn(0.5)(averages, [torch.ones(2)], 1)
    assert not any(average.any() for average in averages)
