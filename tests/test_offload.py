"""Averages on the CPU of a model on a GPU: the bits of those beside it, whenever they are read.

Without a GPU the model is on the CPU too and passes for one elsewhere: the copies that a side
stream would make, the plan of the update and its native job are the real ones, and the job runs as
late as it may, when somebody waits for it.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from reference import AveragedNet as Net
from reference import assert_same_bits, random_tensor
from torch import Tensor, nn

from fused_opt import EMA, SGD, TargetNetwork, _offload, _shadows, schedules
from fused_opt._plan import Gate

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

#: A number, and schedules that the job evaluates where only the device counts.
RULES = [0.9, schedules.inverse_power(0.99), schedules.equal()]


class LateStreams:
    """Side streams whose jobs are run when they are waited for, or by the next copies."""

    started = 0

    def __init__(self, home: torch.device) -> None:
        self.jobs: list = []

    def copy_out(self, pairs) -> None:
        self.wait()
        for host, source in pairs:
            host.copy_(_offload.laid_out_like(host, source))

    def run(self, job) -> None:
        LateStreams.started += 1
        self.jobs.append(job)

    def wait(self) -> None:
        while self.jobs:
            self.jobs.pop(0).run()


class Moved:
    """Whether the tensors on the CPU pass for tensors elsewhere."""

    away = True


@pytest.fixture
def moved(monkeypatch):
    moved = Moved()
    for module in (_offload, _shadows):
        monkeypatch.setattr(module, "is_away", lambda tensor: moved.away)
    monkeypatch.setattr(_offload, "SideStreams", LateStreams)
    monkeypatch.setattr(LateStreams, "started", 0)
    return moved


def pair(**options) -> tuple[Net, EMA, Net, EMA]:
    """A model with its averages on the host, and its twin with those beside it."""
    model, twin = Net(), Net()
    return model, EMA(model, device="cpu", **options), twin, EMA(twin, **options)


def train(*models: nn.Module, seed: int) -> None:
    """Changes every parameter and buffer, frozen and integer ones too."""
    with torch.no_grad():
        for model in models:
            tensors = [*model.parameters(), *model.buffers()]
            for i, tensor in enumerate(tensors):
                noise = random_tensor(tensor.shape, F32, seed=100 * seed + i).to(tensor.device)
                tensor.copy_(tensor + (noise if tensor.is_floating_point() else 1))


def set_gradients(model: nn.Module, seed: int) -> None:
    for i, param in enumerate(model.parameters()):
        if param.requires_grad:
            grad = random_tensor(param.shape, F32, seed=100 * seed + i)
            param.grad = grad.to(param.device, param.dtype)


def tensors_of(ema: EMA) -> dict[str, Tensor]:
    state = ema.state_dict()
    averages = {
        f"{i}.{name}": tensor
        for i, average in enumerate(state["averages"])
        for name, tensor in average.items()
    }
    return {**averages, **state["buffers"]}


def assert_same(ema: EMA, twin: EMA) -> None:
    actual, expected = tensors_of(ema), tensors_of(twin)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].device.type == "cpu"
        assert_same_bits(actual[name], tensor.cpu(), name)
    assert ema.num_steps == twin.num_steps


# --- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize(("every", "after"), [(1, 0), (1, 2), (3, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [None, BF16])
def test_updates_have_the_bits_of_an_average_beside_the_model(moved, every, after, buffers, dtype):
    model, ema, twin, twin_ema = pair(
        decay=[*RULES, lambda k: 1 / (k + 2)],
        update_every=every,
        update_after_step=after,
        buffers=buffers,
        dtype=dtype,
    )
    for step in range(9):
        train(model, twin, seed=step)
        ema.update()
        twin_ema.update()
        if step % 2:  # later than the weights that it was given
            train(model, twin, seed=-step)
            assert_same(ema, twin_ema)
    assert LateStreams.started == -(-9 // every)


def test_large_tensors_of_every_kind_in_any_order_of_memory(moved):
    def params() -> list[nn.Parameter]:
        shapes = [(0,), (1,), (40_000,), (33, 1001), (8, 3, 5, 7)]
        tensors = [random_tensor(shape, F32, seed=i) for i, shape in enumerate(shapes)]
        tensors += [tensors[3].double(), tensors[3].to(F16), tensors[3].t()]
        tensors += [tensors[4].contiguous(memory_format=torch.channels_last)]
        tensors += [tensors[2][::2], torch.complex(tensors[1], 2 * tensors[1])]
        return [nn.Parameter(tensor) for tensor in tensors]

    one, two = params(), params()
    ema, twin = EMA(one, [0.9, 0.5], device="cpu"), EMA(two, [0.9, 0.5])
    for step in range(3):
        with torch.no_grad():
            for param in (*one, *two):
                param.mul_(1 - 0.1 * step).add_(step)
        ema.update()
        twin.update()
    for average, expected in zip(ema.averages, twin.averages, strict=True):
        for name, shadow in expected.items():
            if shadow.is_complex():
                torch.testing.assert_close(average[name], shadow)
            else:
                assert_same_bits(average[name], shadow, name)


def test_what_is_copied_out_has_the_bytes_of_the_memory_that_it_is_copied_into():
    base = random_tensor((2, 3, 4, 5), F32, seed=1)
    twisted = torch.complex(base, 2 * base).conj()
    last = base.contiguous(memory_format=torch.channels_last)
    for source in (base, last, base[..., ::2], twisted, twisted.imag, base[:0]):
        for order in (torch.contiguous_format, torch.channels_last):
            host = torch.empty_like(source, memory_format=order)
            found = _offload.laid_out_like(host, source)
            assert found.stride() == host.stride()
            assert not found.is_conj()
            assert not found.is_neg()
            assert torch.equal(found, source)
    assert _offload.laid_out_like(torch.empty_like(last), last) is last


def test_tensors_that_hold_a_decay_are_read_as_they_were_at_the_update(moved):
    decay, other = torch.tensor(0.9), torch.tensor([0.5], dtype=F16)
    whole = torch.tensor(1)
    model, ema, twin, twin_ema = pair(decay=[decay, other, whole])
    for step in range(4):
        train(model, twin, seed=step)
        ema.update()
        twin_ema.update()
        decay.fill_(0.1 * step)  # the job has not read it yet
        other.fill_(0.2 * step)
        whole.fill_(step % 2)
    assert_same(ema, twin_ema)


# --- in the step of an optimizer ------------------------------------------------------------------

OPTIONS = [
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.1, "reset_grads": True, "max_grad_norm": 1.0},
    {"momentum": 0.9, "master_weights": "fp32"},
    {"momentum": 0.9, "master_weights": "split"},
    {"master_weights": "kahan"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_steps_have_the_bits_of_an_average_beside_the_model(moved, options):
    model, ema, twin, twin_ema = pair(decay=RULES, update_every=2)
    one = SGD(model.parameters(), lr=0.1, ema=ema, **options)
    two = SGD(twin.parameters(), lr=0.1, ema=twin_ema, **options)
    for step in range(6):
        for net, optimizer in ((model, one), (twin, two)):
            set_gradients(net, step)
            if step == 3:
                net.low.bias.grad = None
            optimizer.step()
        if step % 2:
            assert_same(ema, twin_ema)
        train(model.norm, twin.norm, model.frozen, twin.frozen, seed=step)
    assert LateStreams.started == 3
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(param.detach(), expected.detach())


def test_a_group_that_has_given_up_its_masters_is_averaged_as_it_is(moved):
    model, ema, twin, twin_ema = pair(decay=RULES)
    for net, each in ((model, ema), (twin, twin_ema)):
        groups = [{"params": [net.low.weight]}, {"params": [net.low.bias]}]
        optimizer = SGD(groups, lr=0.1, ema=each, master_weights="fp32")
        for step in range(4):
            set_gradients(net, step)
            if step == 3:  # and has its shadow updated apart from the optimizer's rows
                net.low.weight.grad = None
            optimizer.step()
            optimizer.param_groups[0]["master_weights"] = None
    assert_same(ema, twin_ema)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_steps_that_a_device_skips_change_no_average_buffer_or_count(moved, dtype):
    timing = {"update_every": 2, "update_after_step": 1}
    model, ema, twin, twin_ema = pair(decay=RULES, **timing)
    one = SGD(model.parameters(), lr=0.1, momentum=0.9, capturable=True, ema=ema)
    two = SGD(twin.parameters(), lr=0.1, momentum=0.9, ema=twin_ema)
    found_inf = torch.zeros((), dtype=dtype)
    one.found_inf = found_inf
    for step, skipped in enumerate([0.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0]):
        train(model.norm, twin.norm, seed=step)
        set_gradients(model, step)
        set_gradients(twin, step)
        found_inf.fill_(skipped)
        one.step()
        found_inf.fill_(1.0 - skipped)  # the job has not read it yet
        if not skipped:
            two.step()
        if step % 3 == 2:
            assert_same(ema, twin_ema)
    assert_same(ema, twin_ema)
    del one.found_inf  # and from there on the host knows that steps are taken
    for step in range(8, 12):
        train(model.norm, twin.norm, seed=step)
        for net, optimizer in ((model, one), (twin, two)):
            set_gradients(net, step)
            optimizer.step()
    assert_same(ema, twin_ema)


@pytest.mark.parametrize(("every", "after"), [(1, 0), (2, 1), (3, 4)])
def test_a_count_that_the_gpu_alone_knows_is_read_where_it_has_counted_the_step(
    moved, every, after
):
    timing = {"update_every": every, "update_after_step": after}
    model, ema, twin, twin_ema = pair(decay=RULES, **timing)
    home = torch.device("cpu")
    count = ema._updates.on(home)
    for step, skipped in enumerate([0, 1, 0, 0, 1, 0, 0, 0, 1, 0]):
        train(model, twin, seed=step)
        found_inf = torch.tensor(float(skipped))
        averages = ema._averages_by_gpu(ema._kept.rows, home)
        finish = ema._planned_besides(averages, Gate(found_inf, [count], home), ema._subject)
        count += 1 - skipped  # what the pass over the parameters does
        finish()
        found_inf.fill_(1.0 - skipped)
        if not skipped:
            twin_ema.update()
    expected = tensors_of(twin_ema)
    for name, tensor in tensors_of(ema).items():
        assert_same_bits(tensor, expected[name], name)
    assert LateStreams.started == 10


def test_stochastically_rounded_shadows_are_refused_before_anything_changes(moved):
    model = Net()
    ema = EMA(model, 0.9, device="cpu", dtype=BF16)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema, stochastic_rounding=True)
    set_gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="float32 or float64 shadows on the CPU"):
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)
    assert (ema.num_steps, LateStreams.started, optimizer.state) == (0, 0, {})
    ema.to(F32)
    optimizer.step()
    assert ema.num_steps == 1


# --- whoever looks, waits -------------------------------------------------------------------------


def look_at_shadows(ema: EMA, model: Net) -> dict[str, Tensor]:
    return ema.shadows


def apply(ema: EMA, model: Net) -> dict[str, Tensor]:
    with ema.average_parameters():
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def copy_to(ema: EMA, model: Net) -> dict[str, Tensor]:
    target = Net(seed=5)
    ema.copy_to(target)
    return dict(target.named_parameters())


def deep_copy(ema: EMA, model: Net) -> dict[str, Tensor]:
    return copy.deepcopy(ema).shadows


def pickled(ema: EMA, model: Net) -> dict[str, Tensor]:
    return pickle.loads(pickle.dumps(ema)).shadows


def exported(ema: EMA, model: Net) -> dict[str, Tensor]:
    return ema.export_state_dict("timm")


def converted(ema: EMA, model: Net) -> dict[str, Tensor]:
    return ema.to(F32).shadows


def loaded(ema: EMA, model: Net) -> dict[str, Tensor]:
    other = EMA(model)
    other.load_state_dict(ema.state_dict())
    return other.shadows


LOOKS = [look_at_shadows, apply, copy_to, deep_copy, pickled, exported, converted, loaded]


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_every_way_to_see_an_average_waits_for_it(moved, look):
    model, ema, twin, twin_ema = pair(decay=0.9)
    train(model, twin, seed=1)
    ema.update()
    twin_ema.update()
    assert ema._kept._offload._streams.jobs
    expected, found = look(twin_ema, twin), look(ema, model)
    assert found.keys() == expected.keys()
    for name in found:
        assert_same_bits(found[name].detach(), expected[name].detach(), name)


def test_a_copy_of_an_offloaded_average_goes_on_by_itself(moved):
    model, ema, twin, twin_ema = pair(decay=RULES)
    train(model, twin, seed=1)
    ema.update()
    twin_ema.update()
    other_model, other = copy.deepcopy((model, ema))
    train(model, twin, other_model, seed=2)
    for each in (ema, other, twin_ema):
        each.update()
    assert_same(ema, twin_ema)
    assert_same(other, twin_ema)


@pytest.mark.parametrize("change", ["register", "load_state_dict"])
def test_starting_over_is_not_undone_by_an_update_under_way(moved, change):
    model, ema, twin, twin_ema = pair(decay=RULES)
    saved = copy.deepcopy(ema.state_dict())
    train(model, twin, seed=1)
    for each in (ema, twin_ema):
        each.update()
    train(model, twin, seed=2)
    for each in (ema, twin_ema):
        each.register() if change == "register" else each.load_state_dict(saved)
    assert_same(ema, twin_ema)


def test_memory_outlives_the_average_until_its_last_job_is_done(moved):
    model = Net()
    ema = EMA(model, RULES, device="cpu")
    train(model, seed=1)
    ema.update()
    offload = ema._kept._offload
    used = [*tensors_of(ema).values(), *offload._memory.values()]
    references = [weakref.ref(tensor) for tensor in used]
    alive: list[bool] = []

    class Last:
        def run(self) -> None:
            alive.extend(reference() is not None for reference in references)

    offload._streams.jobs.append(Last())
    del ema, offload, used
    gc.collect()
    assert len(alive) == len(references)
    assert all(alive)


def test_an_average_outlives_its_optimizer(moved):
    model = Net()
    ema = EMA(model, RULES, device="cpu")
    optimizer = SGD(model.parameters(), lr=0.1, ema=ema)
    set_gradients(model, 0)
    optimizer.step()
    del optimizer
    gc.collect()
    ema.update()
    assert ema.num_steps == 2


def test_an_update_tells_the_version_counters_of_its_shadows(moved):
    _, ema, _, _ = pair(decay=RULES)
    kept = [ema.shadows["embed.weight"], ema.state_dict()["buffers"]["norm.running_mean"]]
    before = [tensor._version for tensor in kept]
    ema.update()
    assert [tensor._version for tensor in kept] == [version + 1 for version in before]


def test_numbers_that_are_on_the_host_are_read_at_once(moved, monkeypatch):
    decay, found_inf = torch.tensor(0.9, dtype=F16), torch.zeros(())
    here = (decay.data_ptr(), found_inf.data_ptr())
    monkeypatch.setattr(_offload, "is_away", lambda tensor: tensor.data_ptr() not in here)
    model, ema, twin, twin_ema = pair(decay=decay)
    optimizer = SGD(model.parameters(), lr=0.1, capturable=True, ema=ema)
    twin_optimizer = SGD(twin.parameters(), lr=0.1, ema=twin_ema)
    optimizer.found_inf = found_inf
    for step, skipped in enumerate([0.0, 1.0, 0.0]):
        found_inf.fill_(skipped)
        decay.fill_(0.5 + 0.1 * step)
        for net in (model, twin):
            set_gradients(net, step)
        optimizer.step()
        if not skipped:
            twin_optimizer.step()
        found_inf.fill_(1.0 - skipped)
        decay.fill_(0.0)
    assert_same(ema, twin_ema)


def test_a_master_is_copied_out_alone(moved, monkeypatch):
    sizes: list[int] = []
    copy_out = LateStreams.copy_out

    def counting(self, pairs) -> None:
        sizes.append(sum(source.nbytes for _, source in pairs))
        copy_out(self, pairs)

    monkeypatch.setattr(LateStreams, "copy_out", counting)
    weight = nn.Parameter(torch.ones(1000, dtype=BF16))
    ema = EMA([weight], device="cpu")
    optimizer = SGD([weight], lr=0.1, ema=ema, master_weights="fp32")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert sizes == [4 * 1000]


def test_a_capture_is_refused_before_anything_changes(moved, monkeypatch):
    model, ema, twin, twin_ema = pair(decay=RULES)
    train(model, twin, seed=1)
    monkeypatch.setattr(_offload, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        ema.update()
    assert_same(ema, twin_ema)


def test_looks_leave_the_memory_that_steps_copy_into(moved):
    model, ema, twin, twin_ema = pair(decay=RULES)
    ema.update()
    twin_ema.update()
    offload = ema._kept._offload
    before = dict(offload._memory)
    for _ in range(2):
        ema.swap()
        ema.state_dict()
    model.norm.running_mean = twin.norm.running_mean = torch.full((4,), 3.0)
    ema.update()
    twin_ema.update()
    assert_same(ema, twin_ema)
    assert ema._kept._offload is offload
    now = offload._memory
    changed = [key for key in {**before, **now} if before.get(key) is not now.get(key)]
    assert len(changed) == 2  # what there was of the buffer, and what there is
    assert len(now) == len(before)


def test_swaps_keep_the_weights_on_the_host(moved):
    model, ema, twin, twin_ema = pair(decay=0.9)
    before = copy.deepcopy(model.state_dict())
    train(model, twin, seed=1)
    weights = copy.deepcopy(model.state_dict())
    for each in (ema, twin_ema):
        each.update()
        each.swap()
    for name, tensor in twin.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor, name)
    assert not torch.equal(model.embed.weight, before["embed.weight"])
    ema.swap()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, weights[name], name)


# --- changes of the model -------------------------------------------------------------------------


def test_replaced_tensors_and_buffers_that_grow_are_followed(moved):
    model, ema, twin, twin_ema = pair(decay=RULES)
    for step in range(4):
        for net, each in ((model, ema), (twin, twin_ema)):
            if step == 1:
                net.frozen.weight = nn.Parameter(torch.full((4, 4), 3.0))
            if step == 2:
                net.cache = torch.arange(5.0)
            if step == 3:
                net.low.weight.data = net.low.weight.data.float()
            train(net, seed=step)
            each.update()
    assert_same(ema, twin_ema)
    model.frozen.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"frozen\.weight"):
        ema.update()
    assert ema.num_steps == 4


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (5, 4)])
def test_a_weight_that_has_another_shape_is_refused_before_anything_changes(moved, shape):
    model = Net()
    ema = EMA(model, RULES, device="cpu")
    optimizer = SGD(model.parameters(), lr=0.1, ema=ema)
    set_gradients(model, 0)
    optimizer.step()
    model.frozen.weight.data = torch.zeros(shape)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"shadows of .* expected shape"):
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)
    assert (ema.num_steps, LateStreams.started) == (1, 1)


@pytest.mark.parametrize("shape", [(1,), (), (1000,)])
def test_a_buffer_that_has_another_shape_is_refused_before_anything_changes(moved, shape):
    model = Net()
    ema = EMA(model, RULES, device="cpu")
    model.cache.data = torch.ones(shape)
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(2,\)"):
        ema.update()
    assert (ema.num_steps, LateStreams.started) == (0, 0)
    ema.register()
    ema.update()


def test_a_buffer_whose_numbers_have_another_dtype_is_converted(moved):
    model, ema, twin, twin_ema = pair(decay=RULES)
    for net, each in ((model, ema), (twin, twin_ema)):
        net.cache.data = torch.tensor([1.5, 1e300], dtype=torch.float64)
        each.update()
        assert each._kept.copied["cache"].tolist() == [1.5, float("inf")]


@pytest.mark.parametrize("which", ["low.weight", "norm.running_mean"])
def test_a_tensor_that_has_left_the_gpu_is_refused_before_anything_changes(
    moved, monkeypatch, which
):
    model = Net()
    ema = EMA(model, RULES, device="cpu")
    optimizer = SGD(model.parameters(), lr=0.1, ema=ema)
    set_gradients(model, 0)
    here = model.state_dict()[which].data_ptr()
    monkeypatch.setattr(_offload, "is_away", lambda tensor: tensor.data_ptr() != here)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected all tensors on CUDA .* is on cpu"):
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)
    assert (ema.num_steps, LateStreams.started) == (0, 0)


def test_a_shadow_whose_memory_was_replaced_is_updated_or_refused(moved):
    one, two = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(4, 5))
    ema, twin = EMA([one], 0.5, device="cpu"), EMA([two], 0.5)
    for param, each in ((one, ema), (two, twin)):
        each.shadows["0"].data = torch.zeros(5, 4).t()
        with torch.no_grad():
            param.fill_(1.0)
        each.update()
    assert_same_bits(ema.shadows["0"], twin.shadows["0"])
    ema.shadows["0"].data = torch.zeros(4, 10)[:, ::2]
    with pytest.raises(ValueError, match="without gaps"):
        ema.update()
    assert ema.num_steps == 1


def test_a_step_of_a_model_that_has_lost_its_first_weight_says_so(moved):
    model = nn.Linear(2, 2)
    ema = EMA(model, device="cpu")
    optimizer = SGD(model.parameters(), lr=0.1, ema=ema)
    del model.weight
    with pytest.raises(RuntimeError, match=r"lost \['weight'\]"):
        optimizer.step()


def test_a_model_may_move_to_the_gpu_after_its_average_was_made(moved):
    moved.away = False
    model, ema, twin, twin_ema = pair(decay=RULES)
    for step in range(3):
        train(model, twin, seed=step)
        ema.update()
        twin_ema.update()
        moved.away = step == 0  # there, and back again
        assert (ema._kept._offload is not None) == (step == 1)
    assert LateStreams.started == 1
    assert_same(ema, twin_ema)


def test_what_cannot_be_copied_out_is_refused(moved):
    elsewhere = torch.zeros(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"device: .*'0', cpu, or the CPU .* got meta"):
        EMA([torch.zeros(2), elsewhere], device="meta")
    with pytest.raises(ValueError, match=r"device: expected all .*\['1'\] are there already"):
        EMA([elsewhere, torch.zeros(2)], device="cpu")
    with pytest.raises(ValueError, match=r"device: .*'0', meta, .* only torch can copy"):
        EMA([torch.zeros(2, 2, device="meta", layout=torch.sparse_coo)], device="cpu")
    with pytest.raises(RuntimeError, match="convert the module"):
        TargetNetwork(nn.Linear(2, 2)).ema.to("cpu")


# --- on a GPU -------------------------------------------------------------------------------------


def cuda_pair(**options) -> tuple[Net, EMA, Net, EMA]:
    model, twin = Net().cuda(), Net()
    return model, EMA(model, device="cpu", **options), twin, EMA(twin, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize(("every", "after"), [(1, 0), (2, 3)])
def test_on_a_gpu_updates_have_the_bits_of_the_cpu(every, after, buffers):
    options = {"decay": RULES, "update_every": every, "update_after_step": after}
    model, ema, twin, twin_ema = cuda_pair(**options, buffers=buffers)
    for step in range(9):
        train(model, twin, seed=step)
        ema.update()
        twin_ema.update()
        if step % 2:
            assert_same(ema, twin_ema)


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_on_a_gpu_steps_have_the_bits_of_the_cpu(options):
    model, ema, twin, twin_ema = cuda_pair(decay=RULES, update_every=2)
    one = SGD(model.parameters(), lr=0.1, ema=ema, **options)
    two = SGD(twin.parameters(), lr=0.1, ema=twin_ema, **options)
    for step in range(6):
        for net, optimizer in ((model, one), (twin, two)):
            set_gradients(net, step)
            optimizer.step()
        train(model.norm, twin.norm, model.frozen, twin.frozen, seed=step)
    assert_same(ema, twin_ema)


@pytest.mark.cuda
def test_on_a_gpu_skipped_steps_change_nothing_without_waiting():
    model, ema, twin, twin_ema = cuda_pair(decay=RULES, update_every=2, update_after_step=1)
    one = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
    two = SGD(twin.parameters(), lr=0.1, momentum=0.9, ema=twin_ema)
    set_gradients(model, 0)
    set_gradients(twin, 0)
    one.step()
    two.step()
    flags = [torch.tensor(float(skipped), device="cuda") for skipped in (0, 1, 0, 1, 1, 0, 0)]
    for step, flag in enumerate(flags):
        set_gradients(model, step)
        set_gradients(twin, step)
        one.found_inf = flag
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            one.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not flag:
            two.step()
    assert_same(ema, twin_ema)


@pytest.mark.cuda
def test_on_a_gpu_weights_that_change_at_once_do_not_reach_the_update():
    weight = nn.Parameter(torch.zeros(1 << 24, device="cuda"))
    ema = EMA([weight], 0.5, device="cpu")
    other = torch.cuda.Stream()
    with torch.no_grad():
        for _ in range(5):
            torch.cuda._sleep(10_000_000)
            weight.fill_(2.0)
            ema.update()
            weight.fill_(float("nan"))  # as soon as the copy is out
            with torch.cuda.stream(other):
                other.wait_stream(torch.cuda.default_stream())
    assert set(ema.shadows["0"].unique().tolist()) == {2.0 - 2.0 * 0.5**5}


@pytest.mark.cuda
def test_on_a_gpu_weights_in_another_order_or_conjugated_are_copied_out_without_waiting():
    base = random_tensor((8, 3, 64, 64), F32, seed=1)
    twisted = torch.complex(base, 2 * base)
    last = base.contiguous(memory_format=torch.channels_last)
    weights = [nn.Parameter(last.cuda()), nn.Parameter(twisted.cuda().conj())]
    ema = EMA(weights, 0.0, device="cpu")
    weights[0].data = weights[0].data.contiguous()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            with torch.no_grad():
                weights[0].mul_(2.0)
                weights[1].mul_(2.0)
            ema.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ema.shadows["0"], 8.0 * base)
    assert torch.equal(ema.shadows["1"], 8.0 * twisted.conj())


@pytest.mark.cuda
def test_on_a_gpu_an_update_takes_no_memory_and_is_refused_in_a_capture():
    model = Net().cuda()
    ema = EMA(model, RULES, device="cpu")
    ema.update()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert all(memory.is_pinned() for memory in ema._kept._offload._memory.values())
    with (
        pytest.raises(RuntimeError, match="CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ema.update()
    assert ema.num_steps == 2
