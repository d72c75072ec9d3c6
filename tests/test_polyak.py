"""polyak_update_: the soft update of a target network, of modules and of lists."""

import copy

import pytest
import torch
from reference import assert_ema_update, assert_same_bits, random_tensor
from torch import Tensor, nn

from fused_opt import polyak_update_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F64, F64), (F32, F64), (F32, BF16), (BF16, F32), (F32, F16), (F16, BF16)]
SPECIAL = [0.0, -0.0, 1.5, -2.5, float("inf"), float("-inf"), float("nan"), 65504.0]
SIZES = (0, 1, 7, 17, 1000)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert_same_bits(tensor, before[name], name)


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("target_dtype", "source_dtype"), PAIRS)
def test_lists_match_fp64(target_dtype, source_dtype, tau):
    targets = [random_tensor((n,), target_dtype, seed=n) for n in SIZES]
    sources = [random_tensor((n,), source_dtype, seed=50 + n) for n in SIZES]
    before = [t.clone() for t in targets]
    polyak_update_(targets, sources, tau)
    for old, source, new in zip(before, sources, targets, strict=True):
        assert_ema_update(1 - tau, old, source, new)


@pytest.mark.parametrize(("tau", "copies"), [(1.0, True), (0.0, False)])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("target_dtype", "source_dtype"), PAIRS)
def test_tau_one_copies_and_tau_zero_keeps_exactly(
    target_dtype, source_dtype, as_tensor, tau, copies
):
    source, target = torch.meshgrid(torch.tensor(SPECIAL), torch.tensor(SPECIAL), indexing="ij")
    source, target = source.flatten().to(source_dtype), target.flatten().to(target_dtype)
    expected = source.to(target_dtype) if copies else target.clone()
    polyak_update_([target], [source], torch.tensor(tau) if as_tensor else tau)
    assert_same_bits(target, expected)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_tensor_of_a_small_tau_loses_no_digits(dtype):
    """In float32, 1 - (1 - 1e-5) is 1.1 % larger than 1e-5."""
    tau, target = torch.tensor(1e-5, dtype=F32), torch.zeros(3, dtype=dtype)
    polyak_update_([target], [torch.ones(3, dtype=dtype)], tau)
    torch.testing.assert_close(target, tau.to(dtype).expand(3), rtol=1e-7, atol=0)


def test_a_tensor_of_tau_may_change_in_place():
    tau, target, source = torch.tensor(0.0), torch.zeros(3), torch.ones(3)
    polyak_update_([target], [source], tau)
    assert target.tolist() == [0.0] * 3
    tau.fill_(0.25)
    polyak_update_([target], [source], tau)
    assert target.tolist() == [0.25] * 3


def test_modules_match_what_reinforcement_learning_libraries_do():
    critic, target = make_model(0), make_model(1)
    expected = copy.deepcopy(target).double()
    for step in range(20):
        critic(random_tensor((4, 5), F32, seed=step))
        with torch.no_grad():
            for p in critic.parameters():
                p.add_(0.1)
            for p, t in zip(critic.double().parameters(), expected.parameters(), strict=True):
                t.mul_(1 - 0.005).add_(p, alpha=0.005)
        polyak_update_(target, critic.float(), 0.005)
    for t, e in zip(target.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(t.double(), e, rtol=1e-6, atol=1e-6)


def test_buffers_of_modules_are_copied_exactly():
    online, target = make_model(0), make_model(1)
    for step in range(3):
        online(random_tensor((4, 5), F32, seed=step))
    polyak_update_(target, online, 0.01)
    assert int(target[1].num_batches_tracked) == 3
    for name, buffer in online.named_buffers():
        assert_same_bits(dict(target.named_buffers())[name], buffer, name)


def test_modules_are_matched_by_name_whatever_their_order():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    source = nn.ModuleDict({"a": first, "b": second})
    target = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    assert list(source.state_dict()) != list(target.state_dict())
    polyak_update_(target, source, 1.0)
    assert_same_bits(target["a"].weight.detach(), first.weight.detach())
    assert_same_bits(target["b"].weight.detach(), second.weight.detach())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_modules_in_wrappers_have_the_names_of_those_without(wrap):
    source, target = make_model(0), make_model(1)
    polyak_update_(target, wrap(source), 1.0)
    assert_same_bits(target[0].weight.detach(), source[0].weight.detach())
    polyak_update_(wrap(target), source, 0.5)


def test_lists_are_matched_by_order_and_may_be_generators():
    source, target = make_model(0), make_model(1)
    counter = target[1].num_batches_tracked.clone()
    source(torch.randn(4, 5))
    polyak_update_(target.parameters(), source.parameters(), 1.0)
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        assert_same_bits(t.detach(), s.detach())
    assert_same_bits(target[1].num_batches_tracked, counter)


def test_frozen_parameters_are_averaged_too():
    source, target = make_model(0), make_model(1).requires_grad_(False)
    source[0].weight.requires_grad_(False)
    old = target[0].weight.clone()
    polyak_update_(target, source, 0.25)
    assert_ema_update(0.75, old, source[0].weight, target[0].weight)


def test_tied_weights_are_averaged_once():
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    source, target = tied(), tied()
    old = target[0].weight.detach().clone()
    polyak_update_(target, source, 0.5)
    assert_ema_update(0.5, old, source[0].weight, target[0].weight)


def test_a_float32_target_of_a_bfloat16_network_does_not_stall():
    source = nn.Linear(1, 1, bias=False).to(BF16)
    target = nn.Linear(1, 1, bias=False)
    nn.init.ones_(source.weight)
    nn.init.zeros_(target.weight)
    for _ in range(2000):
        polyak_update_(target, source, 0.005)
    torch.testing.assert_close(target.weight.item(), 1 - 0.995**2000, rtol=1e-5, atol=0)


def test_no_graph_is_recorded_and_stale_graphs_are_refused():
    source, target = make_model(0), make_model(1)
    source.register_buffer("scale", source[0].weight.sum())
    target.register_buffer("scale", torch.zeros(()))
    loss = (target(torch.randn(4, 5)) ** 2).sum()
    polyak_update_(target, source, 0.5)
    assert target.scale.grad_fn is None
    assert all(t.grad_fn is None for t in target.parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- what is refused -----------------------------------------------------------------------------


def test_every_name_and_shape_at_fault_is_listed_and_nothing_changes():
    source, target = make_model(0), make_model(1)
    source.add_module("head", nn.Linear(3, 2))
    target.add_module("extra", nn.BatchNorm1d(3))
    target[2] = nn.Linear(7, 4)
    before = tensors(target)
    with pytest.raises(ValueError, match="names and shapes of the source") as error:
        polyak_update_(target, source, 0.5)
    assert "missing ['head.weight', 'head.bias']" in str(error.value)
    assert "unknown ['extra.weight', 'extra.bias', 'extra.running_mean'" in str(error.value)
    assert "'2.weight: (4, 7) for (3, 7)', '2.bias: (4,) for (3,)'" in str(error.value)
    assert_unchanged(target, before)


def test_a_buffer_of_another_shape_changes_nothing():
    source, target = make_model(0), make_model(1)
    target[1].running_mean = torch.zeros(1)
    before = tensors(target)
    with pytest.raises(ValueError, match=r"1\.running_mean: \(1,\) for \(7,\)"):
        polyak_update_(target, source, 0.5)
    assert_unchanged(target, before)


def test_lists_of_different_length_are_refused():
    targets = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"unknown \['1'\]"):
        polyak_update_(targets, [torch.ones(2)], 0.5)
    with pytest.raises(ValueError, match=r"missing \['2'\]"):
        polyak_update_(targets, [torch.ones(2)] * 3, 0.5)
    assert torch.equal(torch.cat(targets), torch.zeros(4))


def test_a_tensor_without_a_kernel_changes_nothing():
    targets = [torch.zeros(2), torch.zeros(2, dtype=torch.int64)]
    with pytest.raises(ValueError, match="int64"):
        polyak_update_(targets, [torch.ones(2), torch.ones(2)], 0.5)
    assert torch.equal(targets[0], torch.zeros(2))


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan"), "0.5", None])
def test_tau_outside_the_unit_interval_is_refused(tau):
    target = torch.zeros(2)
    with pytest.raises(ValueError, match="Invalid tau"):
        polyak_update_([target], [torch.ones(2)], tau)
    assert torch.equal(target, torch.zeros(2))


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (nn.Linear(2, 1), [torch.ones(1, 2), torch.ones(1)], "one of each"),
        ([torch.ones(2)], torch.ones(2), "source: expected a module or an iterable"),
        ([1.0], [torch.ones(1)], r"target\[0\]: expected a tensor, got float"),
    ],
)
def test_what_is_neither_modules_nor_tensors_is_refused(target, source, message):
    with pytest.raises(TypeError, match=message):
        polyak_update_(target, source, 0.5)
