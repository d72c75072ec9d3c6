"""TargetNetwork: an averaged copy that runs like the online network and is never trained."""

import copy
import io
import pickle

import pytest
import torch
from reference import assert_ema_update, assert_same_bits, make_params, random_tensor
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss

from fused_opt import EMA, SGD, TargetNetwork, polyak_update_, schedules

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def inputs(seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return random_tensor((4, 5), dtype, seed=seed)


def perturb(model: nn.Module, seed: int) -> None:
    """Moves every parameter, and BatchNorm's buffers with them."""
    model(inputs(seed, next(model.parameters()).dtype))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(random_tensor(p.shape, p.dtype, seed=100 * seed + i), alpha=0.1)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_follows(target: TargetNetwork, online: nn.Module, seed: int = 7) -> None:
    """The next update averages the online network into the target's own parameters."""
    before = copies(target.module)
    perturb(online, seed)
    target.update()
    for name, p in online.named_parameters():
        shadow = target.module.get_parameter(name)
        decay = target.ema.decay
        assert_ema_update(decay, before[name].to(shadow.dtype), p, shadow.detach())


# --- a module of its own -------------------------------------------------------------------------


def test_it_starts_as_an_equal_copy_that_never_requires_gradients():
    online = make_model()
    target = TargetNetwork(online, decay=0.9)
    assert [name for name, _ in target.named_parameters()] == [
        f"module.{name}" for name, _ in online.named_parameters()
    ]
    for p, t in zip(online.parameters(), target.parameters(), strict=True):
        assert_same_bits(t.detach(), p.detach())
        assert t.data_ptr() != p.data_ptr()
        assert isinstance(t, nn.Parameter)
        assert not t.requires_grad
        assert p.requires_grad
    assert not target(inputs()).requires_grad


def test_its_parameters_are_the_shadows():
    online = make_model()
    target = TargetNetwork(online, decay=0.9)
    assert isinstance(target.ema, EMA)
    for name, shadow in target.ema.shadows.items():
        assert shadow is target.module.get_parameter(name)


def test_the_online_network_is_no_part_of_it():
    online = make_model()
    target = TargetNetwork(online)
    assert len(list(target.parameters())) == len(list(online.parameters()))
    assert not {id(p) for p in online.parameters()} & {id(p) for p in target.parameters()}
    assert online not in list(target.modules())
    assert set(target.state_dict()) == {
        "_extra_state",
        *(f"module.{name}" for name in online.state_dict()),
    }


def test_it_runs_the_averaged_copy_whatever_the_arguments_of_forward():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
            return self.factor * x + shift

    online = Scaled()
    target = TargetNetwork(online, decay=0.5)
    with torch.no_grad():
        online.factor.fill_(4.0)
    assert target(torch.ones(1), shift=1.0).item() == 3.0
    target.update()
    assert target(torch.ones(1), shift=1.0).item() == 4.0


@pytest.mark.parametrize("training", [True, False])
def test_it_starts_in_the_mode_of_the_online_network_and_keeps_its_own(training):
    online = make_model().train(training)
    target = TargetNetwork(online)
    assert all(module.training is training for module in target.modules())
    online.train(not training)
    target.update()
    assert all(module.training is training for module in target.modules())


def test_gradients_of_the_online_network_are_not_copied():
    online = make_model()
    online(inputs()).sum().backward()
    assert all(t.grad is None for t in TargetNetwork(online).parameters())


# --- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_updates_match_fp64(dtype, decay):
    online = nn.Linear(5, 7).to(dtype)
    target = TargetNetwork(online, decay=decay)
    for step in range(5):
        before = copies(target.module)
        with torch.no_grad():
            online.weight.add_(random_tensor((7, 5), dtype, seed=step), alpha=0.1)
        target.update()
        for name, p in online.named_parameters():
            shadow = target.module.get_parameter(name).detach()
            assert_ema_update(decay, before[name], p, shadow)
    assert target.ema.num_updates == 5


def test_an_optimizer_updates_it_inside_the_step():
    online, twin = make_model(), make_model()
    target, by_hand = TargetNetwork(online, decay=0.9), TargetNetwork(twin, decay=0.9)
    optimizer = SGD(online.parameters(), lr=0.1, momentum=0.9, ema=target)
    other = SGD(twin.parameters(), lr=0.1, momentum=0.9)
    assert optimizer.ema is target.ema
    for step in range(4):
        for model, opt in ((online, optimizer), (twin, other)):
            opt.zero_grad()
            model(inputs(step)).square().sum().backward()
            opt.step()
        by_hand.update()
    assert target.ema.num_updates == 4
    for a, b in zip(target.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_it_cannot_be_updated_by_hand_while_an_optimizer_does():
    online = make_model()
    target = TargetNetwork(online)
    optimizer = SGD(online.parameters(), lr=0.1, ema=target)
    with pytest.raises(RuntimeError, match="attached to an optimizer"):
        target.update()
    optimizer.ema = None
    target.update()


def test_an_optimizer_that_holds_its_parameters_too_does_not_train_them():
    pair = nn.ModuleDict({"online": make_model()})
    pair["target"] = TargetNetwork(pair["online"], decay=1.0)
    optimizer = SGD(pair.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, ema=pair["target"])
    before = copies(pair["target"])
    mse_loss(pair["online"](inputs()), pair["target"](inputs(1))).backward()
    optimizer.step()
    for name, t in pair["target"].named_parameters():
        assert_same_bits(t.detach(), before[name])


@pytest.mark.parametrize("rides", [True, False])
def test_it_moves_once_per_step_however_many_batches_are_accumulated(rides):
    online = make_model()
    target = TargetNetwork(online, decay=0.9)
    optimizer = SGD(online.parameters(), lr=0.1, ema=target if rides else None)
    for batch in range(12):
        before = copies(target)
        mse_loss(online(inputs(batch)), target(inputs(batch + 50))).backward()
        if batch % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            if not rides:
                target.update()
        else:
            for name, t in target.named_parameters():
                assert_same_bits(t.detach(), before[name])
    assert target.ema.num_updates == 3


def test_tied_weights_stay_tied_and_move_once():
    online = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    online[1].weight = nn.Parameter(online[0].weight.detach())  # by storage, not by object
    assert online[0].weight is not online[1].weight
    target = TargetNetwork(online, decay=0.5)
    assert target.module[0].weight is target.module[1].weight
    old = target.module[0].weight.clone()
    with torch.no_grad():
        online[0].weight.add_(1.0)
    target.update()
    assert_ema_update(0.5, old, online[0].weight, target.module[1].weight)


def test_dqn_copies_every_so_many_steps():
    online = make_model()
    target = TargetNetwork(online, decay=0.0, update_every=3)
    seen = []
    for step in range(7):
        perturb(online, seed=step)
        target.update()
        pairs = zip(online.parameters(), target.parameters(), strict=True)
        seen.append(all(torch.equal(p, t) for p, t in pairs))
    assert seen == [True, False, False, True, False, False, True]


def test_steps_before_update_after_step_only_copy():
    online = make_model()
    target = TargetNetwork(online, decay=1.0, update_after_step=2)
    for step in range(4):
        perturb(online, seed=step)
        target.update()
        pairs = zip(online.parameters(), target.parameters(), strict=True)
        assert all(torch.equal(p, t) for p, t in pairs) is (step < 2)


# --- buffers -------------------------------------------------------------------------------------


def test_buffers_are_copied_exactly_by_default():
    online = make_model()
    target = TargetNetwork(online, decay=0.9)
    for step in range(3):
        perturb(online, seed=step)
        target(inputs(step + 50))  # in training mode it gathers statistics of its own
        target.update()
    for name, buffer in online.named_buffers():
        assert_same_bits(dict(target.module.named_buffers())[name], buffer, name)


def test_buffers_can_be_averaged():
    online = make_model()
    target = TargetNetwork(online, decay=0.9, buffers="average")
    old = target.module[1].running_mean.clone()
    perturb(online, seed=0)
    target.update()
    assert_ema_update(0.9, old, online[1].running_mean, target.module[1].running_mean)
    assert int(target.module[1].num_batches_tracked) == 1


def test_ignored_buffers_are_the_targets_own():
    online = make_model()
    target = TargetNetwork(online, decay=0.9, buffers="ignore")
    perturb(online, seed=0)
    target.update()
    assert int(target.module[1].num_batches_tracked) == 0
    x = inputs(1)
    target(x)
    expected = 0.1 * target.module[0](x).mean(dim=0)
    torch.testing.assert_close(target.module[1].running_mean, expected)


# --- dtypes, devices, loading: it stays linked to its average ------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_half_precision_network_has_a_float32_target_that_does_not_stall(dtype):
    online = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.zeros_(online.weight)
    target = TargetNetwork(online, decay=0.999)
    assert target.module.weight.dtype == F32
    nn.init.ones_(online.weight)
    for _ in range(10_000):
        target.update()
    torch.testing.assert_close(target.module.weight.item(), 1 - 0.999**10_000, rtol=1e-5, atol=0)


def test_the_buffers_of_a_half_precision_target_are_float32_too():
    online = make_model().to(BF16)
    target = TargetNetwork(online, decay=0.9)
    for step in range(3):
        perturb(online, seed=step)
        target.update()
    assert_same_bits(target.module[1].running_mean, online[1].running_mean.float())
    assert target.eval()(inputs()).dtype == F32
    assert int(target.module[1].num_batches_tracked) == 3


def test_dtype_chooses_the_targets():
    target = TargetNetwork(make_model(), dtype=BF16)
    assert {t.dtype for t in (*target.parameters(), *target.buffers())} == {BF16, torch.int64}
    with pytest.raises(ValueError, match="dtype"):
        TargetNetwork(make_model(), dtype=torch.int32)


def test_it_is_never_rounded_to_half_precision():
    """As Trainer(precision="bf16-true") does to all modules; averages would stall."""
    pair = nn.ModuleDict({"online": make_model()})
    pair["target"] = target = TargetNetwork(pair["online"], decay=0.9)
    before = copies(target)
    for convert in (nn.Module.bfloat16, nn.Module.half, lambda m: m.to(BF16)):
        convert(pair)
    assert {p.dtype for p in pair["online"].parameters()} == {BF16}
    for name, t in target.named_parameters():
        assert_same_bits(t.detach(), before[name])
    assert_follows(target, pair["online"])


def test_a_half_precision_target_that_was_asked_for_stays_so_until_converted():
    target = TargetNetwork(make_model(), dtype=BF16).to("cpu")
    assert next(target.parameters()).dtype == BF16
    assert next(target.half().parameters()).dtype == F16


def test_it_follows_after_both_networks_are_converted():
    pair = nn.ModuleDict({"online": make_model()})
    pair["target"] = TargetNetwork(pair["online"], decay=0.9)
    pair.double()
    assert next(pair["target"].parameters()).dtype == F64
    assert_follows(pair["target"], pair["online"])
    assert pair["target"].module[1].running_mean.dtype == F64
    assert_same_bits(pair["target"].module[1].running_mean, pair["online"][1].running_mean)


def test_what_no_kernel_takes_after_a_conversion_is_refused_and_changes_nothing():
    online = make_model()
    target = TargetNetwork(online, decay=0.0).double()
    before = copies(target)
    perturb(online, seed=0)
    with pytest.raises(ValueError, match=r"shadows\['0.weight'\].*float64"):
        target.update()
    for name, t in target.named_parameters():
        assert_same_bits(t.detach(), before[name])


def test_a_target_on_another_device_is_refused():
    online = make_model()
    target = TargetNetwork(online).to("meta")
    with pytest.raises(ValueError, match="device"):
        target.update()


def test_it_follows_after_conversions_that_replace_parameters():
    online = make_model()
    target = TargetNetwork(online, decay=0.9)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        target.to(F64).to(F32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert_follows(target, online)


@pytest.mark.parametrize("assign", [False, True])
def test_its_state_brings_the_weights_and_the_counters(assign):
    online = make_model()
    schedule = schedules.cosine(0.9, 10)
    target = TargetNetwork(online, decay=schedule)
    for step in range(3):
        perturb(online, seed=step)
        target.update()
    file = io.BytesIO()
    torch.save(target.state_dict(), file)
    file.seek(0)
    fresh = TargetNetwork(online, decay=0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert (fresh.ema.decay, fresh.ema.num_updates) == (schedule, 3)
    assert not any(t.requires_grad for t in fresh.parameters())
    for step in range(3, 6):
        perturb(online, seed=step)
        target.update()
        fresh.update()
    for a, b in zip(target.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_state_of_a_module_that_holds_both_networks_loads():
    def make_pair(seed: int) -> nn.ModuleDict:
        pair = nn.ModuleDict({"online": make_model(seed)})
        pair["target"] = TargetNetwork(pair["online"], decay=0.9)
        return pair

    pair, fresh = make_pair(0), make_pair(1)
    perturb(pair["online"], seed=0)
    pair["target"].update()
    fresh.load_state_dict(pair.state_dict(), assign=False)
    assert fresh["target"].ema.num_updates == 1
    assert_follows(fresh["target"], fresh["online"])


def test_a_plain_state_dict_loads_into_its_module():
    online, other = make_model(), make_model(1)
    target = TargetNetwork(online, decay=0.9)
    target.module.load_state_dict(other.state_dict())
    assert_same_bits(target.module[0].weight, other[0].weight.detach())
    assert_follows(target, online)


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_both_networks_belongs_together(through):
    online = make_model()
    target = TargetNetwork(online, decay=0.5)
    perturb(online, seed=0)
    target.update()
    online2, target2 = through((online, target))
    before = copies(target)
    assert target2.ema.num_updates == 1
    assert_follows(target2, online2)
    for name, t in target.named_parameters():
        assert_same_bits(t.detach(), before[name])
    target2.double()
    online2.double()
    assert_follows(target2, online2)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_target_alone_takes_its_network_along(through):
    online = make_model()
    target = TargetNetwork(online, decay=0.0)
    twin = through(target)
    perturb(online, seed=0)
    start = copies(twin)
    twin.update()
    for name, t in twin.named_parameters():
        assert_same_bits(t.detach(), start[name])
    target.update()
    assert_same_bits(target.module[0].weight, online[0].weight.detach())


def test_a_pickled_optimizer_goes_on_with_its_target():
    online = make_model()
    target = TargetNetwork(online, decay=0.5)
    optimizer = SGD(online.parameters(), lr=0.1, ema=target)
    online2, target2, optimizer2 = pickle.loads(pickle.dumps((online, target, optimizer)))
    online2(inputs()).sum().backward()
    before = copies(target2.module)
    optimizer2.step()
    for name, p in online2.named_parameters():
        assert_ema_update(0.5, before[name], p, target2.module.get_parameter(name))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_networks_are_taken_out_of_their_wrappers(wrap):
    online = make_model()
    target = TargetNetwork(wrap(online), decay=0.9)
    assert type(target.module) is nn.Sequential
    assert_follows(target, online)


# --- what is refused -----------------------------------------------------------------------------


def test_several_decays_are_refused():
    with pytest.raises(ValueError, match="expected one for a target network"):
        TargetNetwork(make_model(), decay=[0.9, 0.99])


def test_an_optimizer_wants_an_average():
    with pytest.raises(TypeError, match="EMA or TargetNetwork, got Sequential"):
        SGD(make_params([(3,)]), lr=0.1, ema=make_model())


# --- as the methods use it -----------------------------------------------------------------------


def by_hand(online: nn.Module, shadows: dict[str, Tensor], decay: float) -> None:
    for name, p in online.named_parameters():
        shadows[name] += (1 - decay) * (p.detach().double() - shadows[name])


def assert_near(target: TargetNetwork, shadows: dict[str, Tensor]) -> None:
    for name, t in target.module.named_parameters():
        torch.testing.assert_close(t.detach().double(), shadows[name], rtol=1e-5, atol=1e-6)


def test_byol_with_its_cosine_schedule():
    """The decay rises from the base to 1, as the paper's equation says."""
    online, predictor = make_model(), nn.Linear(3, 3)
    target = TargetNetwork(online, decay=schedules.cosine(0.9, 20), buffers="ignore")
    params = [*online.parameters(), *predictor.parameters()]
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=target)
    shadows = {name: p.double() for name, p in copies(online).items()}
    for k in range(20):
        optimizer.zero_grad()
        one, other = inputs(k), inputs(100 + k)
        loss = -cosine_similarity(predictor(online(one)), target(other)).mean()
        loss.backward()
        optimizer.step()
        cosine = torch.cos(torch.tensor(torch.pi * k / 20, dtype=F64))
        by_hand(online, shadows, 1 - (1 - 0.9) * (cosine + 1).item() / 2)
    assert_near(target, shadows)


def test_moco_with_a_constant_decay():
    """Keys come from the target, queries from the online network, in training mode both."""
    online = make_model()
    target = TargetNetwork(online, decay=0.99, buffers="ignore")
    optimizer = SGD(online.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, ema=target)
    shadows = {name: p.double() for name, p in copies(online).items()}
    for k in range(10):
        optimizer.zero_grad()
        keys = target(inputs(k))
        assert not keys.requires_grad
        cross_entropy(online(inputs(50 + k)) @ keys.T, torch.arange(4)).backward()
        optimizer.step()
        by_hand(online, shadows, 0.99)
    assert_near(target, shadows)
    assert int(target.module[1].num_batches_tracked) == 10


def test_soft_q_targets_agree_with_polyak_update():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    target, plain = TargetNetwork(critic, decay=1 - 0.005).eval(), copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for k in range(10):
        reward, following = random_tensor((4,), F32, seed=k), inputs(k)
        goal = reward + 0.99 * target(following).amax(dim=1)
        optimizer.zero_grad()
        mse_loss(critic(inputs(50 + k)).amax(dim=1), goal).backward()
        optimizer.step()
        target.update()
        polyak_update_(plain, critic, 0.005)
    for t, p in zip(target.parameters(), plain.parameters(), strict=True):
        assert_same_bits(t.detach(), p.detach())


# --- what is replaced ----------------------------------------------------------------------------


def assign(module: nn.Module) -> None:
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)


def replace(module: nn.Sequential) -> None:
    module[0] = copy.deepcopy(module[0])


@pytest.mark.parametrize("change", [assign, replace])
@pytest.mark.parametrize("side", ["online", "target"])
@pytest.mark.parametrize("attached", [False, True])
def test_the_target_moves_on_after_tensors_were_replaced(change, side, attached):
    online = make_model()
    target = TargetNetwork(online, decay=0.5)
    change(online if side == "online" else target.module)
    before, counter = copies(target.module), online[1].num_batches_tracked
    perturb(online, 3)
    if attached:
        SGD(online.parameters(), lr=0.1, ema=target).step()  # without gradients
    else:
        target.update()
    for name, p in online.named_parameters():
        assert_ema_update(0.5, before[name], p, target.module.get_parameter(name).detach())
    assert target.module[1].num_batches_tracked == counter == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_networks_may_be_loaded_by_assignment(order):
    online = make_model()
    pair = (online, TargetNetwork(online, decay=0.5))
    both = nn.ModuleList([pair[i] for i in order])
    pair[1].update()
    state = copy.deepcopy(both.state_dict())
    pair[1].update()
    both.load_state_dict(state, assign=True)
    assert pair[1].ema.num_updates == 1
    assert_follows(pair[1], online)


def test_other_dtypes_of_the_online_network_are_followed():
    online = make_model()
    target = TargetNetwork(online, decay=0.5)
    online.double()
    target.ema.register()
    assert_same_bits(target.module[0].weight.detach(), online[0].weight.detach().float())
    before = copies(target.module)
    with torch.no_grad():
        online[0].weight.add_(1.0)
    target.update()
    torch.testing.assert_close(target.module[0].weight.detach(), before["0.weight"] + 0.5)


def test_its_averages_are_converted_with_the_module_alone():
    online = make_model().to(BF16)
    target = TargetNetwork(online, decay=0.5, dtype=BF16)
    with pytest.raises(RuntimeError, match="convert the module"):
        target.ema.to(F32)
    target.module.float()
    assert_follows(target, online)
    assert target.ema.shadows["0.weight"] is target.module[0].weight
    assert target.module[1].running_mean.dtype == F32


def test_a_part_that_the_target_has_lost_is_an_error():
    target = TargetNetwork(make_model())
    target.module[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"averages' module.*missing.*'0.weight'"):
        target.update()
