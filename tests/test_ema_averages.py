"""What an EMA averages, when, and with which decay; its buffers, names, memory and states."""

import copy
import io
import pickle

import pytest
import torch
from reference import AveragedNet as Net
from reference import assert_same_bits, random_tensor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from fused_opt import EMA, SGD, schedules
from fused_opt._counter import Counter
from fused_opt._plan import Gate

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def train(model: nn.Module, seed: int) -> None:
    """Changes everything that a step of training could, and the frozen layer too."""
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.add_(random_tensor(param.shape, param.dtype, seed=100 * seed + i), alpha=0.1)
        for i, buffer in enumerate(model.buffers()):
            if buffer.is_floating_point():
                buffer.add_(random_tensor(buffer.shape, buffer.dtype, seed=100 * seed - i - 1))
            else:
                buffer.copy_(buffer + 1)


def tensors_of(ema: EMA) -> list[Tensor]:
    state = ema.state_dict()
    averages = [tensor for average in state["averages"] for tensor in average.values()]
    return [*averages, *state["buffers"].values()]


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name].detach(), tensor.detach(), name)


def scalar(value: float, dtype: torch.dtype = F32) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=dtype))


# --- which steps average, with which decay --------------------------------------------------------


def averaged(history: list[float], start: float, every: int, after: int, decay) -> list[float]:
    """The shadow after each step, in fp64, straight from the definition."""
    shadow, k, shadows = start, 0, []
    for t, value in enumerate(history):
        if t % every == 0 and t < after:
            shadow = value
        elif t % every == 0:
            shadow, k = shadow + (1 - decay(k)) * (value - shadow), k + 1
        shadows.append(shadow)
    return shadows


HISTORY = [float(value) for value in random_tensor((25,), F64, seed=3)]


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("after", [0, 1, 2, 5, 10])
def test_due_steps_copy_until_update_after_step_and_then_average(every, after):
    asked: list[int] = []

    def decay(k: int) -> float:
        asked.append(k)
        return 0.3 + 0.6 * k / (k + 1)

    param = scalar(2.0, F64)
    ema = EMA([param], decay, update_every=every, update_after_step=after)
    expected = averaged(HISTORY, 2.0, every, after, lambda k: 0.3 + 0.6 * k / (k + 1))
    due = [t for t in range(len(HISTORY)) if t % every == 0 and t >= after]
    for t, value in enumerate(HISTORY):
        assert ema.num_steps == t
        assert ema.num_updates == sum(u < t for u in due)
        param.data.fill_(value)
        before = ema.shadows["0"]._version
        ema.update()
        assert ema.shadows["0"].item() == pytest.approx(expected[t], abs=1e-14)
        assert (ema.shadows["0"]._version == before) == (t % every != 0)
    assert asked == list(range(len(due)))


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.9),
        schedules.tf_warmup(0.9),
        schedules.inverse_power(0.9),
        schedules.exponential_ramp(0.9, tau=5),
        schedules.half_life(4),
        schedules.equal(),
        schedules.power_function(0.1),
        schedules.zero_debias(0.9),
        schedules.cosine(0.5, steps=20),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_every_schedule_gets_the_number_of_averages_before(schedule):
    param = scalar(2.0, F64)
    ema = EMA([param], schedule, update_every=2, update_after_step=3)
    expected = averaged(HISTORY, 2.0, 2, 3, schedule)
    for value, shadow in zip(HISTORY, expected, strict=True):
        param.data.fill_(value)
        ema.update()
        assert ema.shadows["0"].item() == pytest.approx(shadow, abs=1e-14)


def test_equal_weights_give_the_mean():
    param = scalar(5.0, F64)
    ema = EMA([param], schedules.equal())
    for value in HISTORY:
        param.data.fill_(value)
        ema.update()
    assert ema.shadows["0"].item() == pytest.approx(sum(HISTORY) / len(HISTORY), abs=1e-14)


def test_num_updates_can_be_set_and_counts_what_averages():
    ema = EMA([scalar(1.0)], update_every=3, update_after_step=4)
    ema.num_updates = 5
    assert ema.num_updates == 5
    assert ema.num_steps == 3 * (2 + 5)  # those at 0 and 3 copy
    ema.num_steps = 4
    assert ema.num_updates == 0


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), None, "0.9", True])
def test_a_function_that_returns_no_decay_is_refused_before_anything_changes(wrong):
    param = scalar(1.0)
    ema = EMA([param], [0.5, lambda k: wrong])
    param.data.fill_(3.0)
    with pytest.raises(ValueError, match="decay"):
        ema.update()
    assert [average["0"].item() for average in ema.averages] == [1.0, 1.0]
    assert ema.num_steps == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decay": []}, "decay"),
        ({"decay": [0.9, 1.1]}, "decay"),
        ({"update_every": 0}, "update_every"),
        ({"update_every": 2.0}, "update_every"),
        ({"update_after_step": -1}, "update_after_step"),
        ({"buffers": "both"}, "buffers"),
        ({"filter": lambda name, param: False}, "at least one parameter"),
        ({"dtype": F64}, "'weight'.*float64"),
        ({"dtype": torch.int32}, "'weight'.*int32"),
        ({"device": "meta"}, "device.*'weight'.*meta"),
    ],
)
def test_options_that_make_no_average_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        EMA(nn.Linear(2, 2), **options)


# --- several averages -----------------------------------------------------------------------------

DECAYS = [0.9, 0.5, schedules.inverse_power(0.99), lambda k: 0.1 * k / (k + 1)]


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_several_averages_are_those_that_each_decay_gives_alone(buffers):
    model = Net()
    options = {"buffers": buffers, "update_every": 2, "update_after_step": 3}
    together = EMA(model, DECAYS, **options)
    alone = [EMA(model, decay, **options) for decay in DECAYS]
    for step in range(9):
        train(model, step)
        together.update()
        for average, ema in zip(together.averages, alone, strict=True):
            ema.update()
            assert_same(average, ema.shadows)
            assert_same(together.state_dict()["buffers"], ema.state_dict()["buffers"])
    assert_same(together.shadows, together.averages[0])
    pointers = [shadow.data_ptr() for average in together.averages for shadow in average.values()]
    assert len(set(pointers)) == len(pointers)


def test_each_average_can_be_applied_copied_and_swapped():
    model = Net()
    ema = EMA(model, [0.9, 0.5])
    train(model, 1)
    ema.update()
    raw, averages = copied(dict(model.named_parameters())), [copied(a) for a in ema.averages]
    other = Net(seed=5)
    for i, average in enumerate(averages):
        expected = {name: shadow.to(raw[name].dtype) for name, shadow in average.items()}
        ema.apply_shadow(i)
        assert_same(dict(model.named_parameters()), expected)
        ema.restore()
        with ema.average_parameters(i):
            assert_same(dict(model.named_parameters()), expected)
        ema.swap(i)
        assert_same(dict(model.named_parameters()), expected)
        ema.swap()
        assert_same(dict(model.named_parameters()), raw)
        ema.copy_to(other, average=i)
        assert_same(dict(other.named_parameters()), expected)


@pytest.mark.parametrize("average", [2, -1])
def test_an_average_that_there_is_not_is_refused(average):
    ema = EMA([scalar(1.0)], [0.9, 0.5])
    calls = [ema.apply_shadow, ema.swap, lambda i: ema.copy_to(average=i)]
    for call in [*calls, lambda i: ema.export_state_dict("timm", i)]:
        with pytest.raises(IndexError, match=f"from 0 to 1, got {average}"):
            call(average)
    ema.update()  # nothing is applied


def test_decays_can_be_changed_but_not_their_number():
    ema = EMA([scalar(1.0)], [0.9, 0.5])
    assert ema.decay == [0.9, 0.5]
    ema.decay = [schedules.equal(), 0.25]
    assert ema.decay == [schedules.equal(), 0.25]
    for wrong in (0.9, [0.9], [0.9, 0.5, 0.1], [0.9, 2.0]):
        with pytest.raises(ValueError, match="decay"):
            ema.decay = wrong
    assert ema.decay == [schedules.equal(), 0.25]


# --- buffers --------------------------------------------------------------------------------------


def test_copied_buffers_are_exact_for_every_dtype():
    model = Net()
    model.register_buffer("halves", torch.randn(3).to(BF16))
    model.register_buffer("flags", torch.tensor([True, False]))
    ema = EMA(model, [0.9, 0.5])
    model.norm.num_batches_tracked.fill_(2**53 + 1)  # which no float holds
    train(model, 1)
    ema.update()
    assert_same(ema.state_dict()["buffers"], dict(model.named_buffers()))
    assert not set(ema.shadows) & set(dict(model.named_buffers()))
    pointers = {buffer.data_ptr() for buffer in model.buffers()}
    assert not pointers & {buffer.data_ptr() for buffer in ema.state_dict()["buffers"].values()}


def test_batch_norms_counter_is_the_models_after_5000_steps():
    model = nn.BatchNorm1d(2)
    emas = [EMA(model, 0.999, buffers=buffers) for buffers in ("copy", "average")]
    for _ in range(5000):
        model.num_batches_tracked.add_(1)
        for ema in emas:
            ema.update()
    for ema in emas:
        assert ema.state_dict()["buffers"]["num_batches_tracked"].item() == 5000


def test_averaged_buffers_are_tracked_like_parameters_and_integers_copied():
    model = Net()
    ema = EMA(model, [0.5, 0.9], buffers="average")
    start = copied(everything(model))
    train(model, 1)
    ema.update()
    for name in ("norm.running_mean", "norm.running_var"):
        now = dict(model.named_buffers())[name]
        for average, decay in zip(ema.averages, (0.5, 0.9), strict=True):
            expected = start[name].double() + (1 - decay) * (now.double() - start[name].double())
            torch.testing.assert_close(average[name].double(), expected, rtol=1e-6, atol=1e-6)
    counter = ema.state_dict()["buffers"]
    assert_same(counter, {"norm.num_batches_tracked": model.norm.num_batches_tracked})


def test_ignored_buffers_are_left_to_the_model():
    model = Net()
    ema = EMA(model, 0.5, buffers="ignore")
    train(model, 1)
    ema.update()
    raw = copied(dict(model.named_buffers()))
    assert ema.state_dict()["buffers"] == {}
    with ema.average_parameters():
        assert_same(dict(model.named_buffers()), raw)


def test_a_step_that_is_not_due_changes_no_buffer():
    model = Net()
    for buffers in ("copy", "average"):
        ema = EMA(model, 0.5, buffers=buffers, update_every=2)
        ema.update()
        before = [tensor.clone() for tensor in tensors_of(ema)]
        train(model, 1)
        ema.update()
        for now, then in zip(tensors_of(ema), before, strict=True):
            assert_same_bits(now, then)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_are_swapped_with_the_weights(buffers):
    model = Net()
    ema = EMA(model, 0.5, buffers=buffers)
    train(model, 1)
    ema.update()
    expected = copied({**ema.shadows, **ema.state_dict()["buffers"]})
    train(model, 2)
    raw = copied(everything(model))
    with ema.average_parameters():
        now = everything(model)
        assert_same(now, {name: expected[name].to(now[name].dtype) for name in now})
        train(model, 3)  # as a forward pass in training mode would
    assert_same(everything(model), raw)
    other = Net(seed=4)
    ema.copy_to(other)
    now = everything(other)
    assert_same(now, {name: expected[name].to(now[name].dtype) for name in now})


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_buffer_that_was_replaced_is_followed(buffers):
    """As assignment to ``module.running_mean`` does, and ``Module.to``."""
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.5, buffers=buffers)
    ema.update()
    model.running_mean = torch.tensor([4.0, 6.0])
    model.num_batches_tracked = torch.tensor(7)
    ema.update()
    kept = {**ema.shadows, **ema.state_dict()["buffers"]}
    assert kept["running_mean"].tolist() == ([4.0, 6.0] if buffers == "copy" else [2.0, 3.0])
    assert kept["num_batches_tracked"].item() == 7
    with ema.average_parameters():
        assert_same_bits(model.running_mean, kept["running_mean"])
    assert model.running_mean.tolist() == [4.0, 6.0]


def test_an_averaged_buffer_of_another_shape_is_refused_before_anything_changes():
    model = nn.BatchNorm1d(1)  # whose tensors would broadcast
    ema = EMA(model, 0.5, buffers="average")
    with torch.no_grad():
        model.weight.fill_(9.0)
    model.running_mean = torch.zeros(3)
    for call in (ema.update, ema.apply_shadow):
        with pytest.raises(ValueError, match=r"\(1,\).*'running_mean'.*\(3,\)"):
            call()
    assert ema.shadows["weight"].item() == 1.0
    assert ema.num_steps == 0


def test_a_copied_buffer_may_grow():
    model = nn.BatchNorm1d(1)
    model.register_buffer("cache", torch.zeros(2))
    ema = EMA(model, 0.5)
    model.cache = torch.arange(5.0)
    ema.update()
    model.cache.zero_()
    with ema.average_parameters():
        assert model.cache.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert model.cache.tolist() == [0.0] * 5


@pytest.mark.parametrize("shape", [(300,), (70, 500)])
def test_a_copied_buffer_that_has_grown_since_the_update_is_read_as_it_is(shape):
    model = nn.BatchNorm1d(1)
    model.register_buffer("cache", torch.zeros(2))
    ema = EMA(model, 0.5)
    for fill in (3.0, 5.0):
        model.cache = torch.full(shape, fill)
        assert torch.equal(ema.state_dict()["buffers"]["cache"], torch.full(shape, 3.0))
    with ema.average_parameters():
        assert torch.equal(model.cache, torch.full(shape, 3.0))
    assert torch.equal(model.cache, torch.full(shape, 5.0))


def test_a_copied_buffer_stays_exact_in_another_dtype():
    model = nn.BatchNorm1d(1)
    ema = EMA(model, 0.5)
    optimizer = SGD(model.parameters(), lr=0.1, ema=ema, capturable=True)
    third = torch.tensor([1 / 3], dtype=F64)
    model.running_mean = third.clone()
    optimizer.found_inf = torch.zeros(1)  # decided where the step runs
    optimizer.step()
    model.running_mean.zero_()
    ema.apply_shadow()
    assert torch.equal(model.running_mean, third)


@pytest.mark.parametrize("change", ["deleted", "None"])
def test_a_buffer_that_is_gone_is_listed_until_it_is_registered(change):
    model = nn.BatchNorm1d(1)
    ema = EMA(model, 0.5)
    if change == "deleted":
        del model.running_mean
    else:
        model.running_mean = None
    for call in (ema.update, ema.apply_shadow, ema.state_dict):
        with pytest.raises(RuntimeError, match=r"lost \['running_mean'\]"):
            call()
    assert ema.num_steps == 0
    ema.register()
    ema.update()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, F32), (F32, torch.bfloat16)])
def test_weights_of_several_dtypes_are_never_copied_in_one_call(dtypes, monkeypatch):
    """Some releases of torch take the first one's dtype for all on CUDA."""
    calls = []
    original = torch._foreach_copy_

    def recorded(into, out_of):
        calls.append(({t.dtype for t in into}, {t.dtype for t in out_of}))
        original(into, out_of)

    monkeypatch.setattr(torch, "_foreach_copy_", recorded)
    params = [nn.Parameter(torch.full((3,), i + 0.5, dtype=dtypes[i // 2])) for i in range(4)]
    ema = EMA(params, 0.5)
    with ema.average_parameters():
        assert [p.tolist() for p in params] == [[i + 0.5] * 3 for i in range(4)]
    assert calls
    assert all(len(into) == len(out_of) == 1 for into, out_of in calls)


def test_an_iterable_of_tensors_has_no_buffers():
    model = Net()
    assert EMA(model.named_parameters()).state_dict()["buffers"] == {}


# --- frozen, integer and tied parameters ----------------------------------------------------------


def test_frozen_parameters_are_copied_at_due_steps_and_averaged_once_they_train():
    model = nn.Linear(1, 1)
    model.weight.requires_grad_(False)
    ema = EMA(model, [0.5, 0.9], update_every=2)
    model.weight.fill_(8.0)
    ema.update()
    assert [average["weight"].item() for average in ema.averages] == [8.0, 8.0]
    model.weight.fill_(4.0)
    ema.update()
    assert [average["weight"].item() for average in ema.averages] == [8.0, 8.0]
    model.weight.requires_grad_(True)
    ema.update()
    assert [average["weight"].item() for average in ema.averages] == pytest.approx([6.0, 7.6])


@pytest.mark.parametrize("inside", [False, True])
def test_what_trains_in_turns_is_averaged_throughout(inside):
    """As in a GAN, whose networks are frozen while the other one trains."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = EMA(model, 0.5)
    optimizer = SGD(model.parameters(), lr=1.0, ema=ema if inside else None)
    for trains, expected in ((False, 4.0), (True, 6.0), (False, 7.0)):
        model.weight.data.fill_(8.0)
        model.requires_grad_(trains)
        optimizer.step()
        if not inside:
            ema.update()
        assert ema.shadows["weight"].item() == expected
    model.weight.data.fill_(4.0)
    optimizer.ema = None
    ema.register()
    model.weight.data.fill_(2.0)
    ema.update()
    assert ema.shadows["weight"].item() == 2.0  # frozen at the registration


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_copies_of_an_average_know_what_was_frozen(copied_by):
    model = nn.Linear(1, 1)
    model.weight.requires_grad_(False)
    ema = EMA(model, 0.5)
    model.bias.requires_grad_(False).fill_(0.0)
    twin = copied_by(ema)
    params = twin._kept.names.tensors
    with torch.no_grad():
        for param in params.values():
            param.fill_(8.0)
    old = twin.shadows["bias"].item()
    twin.update()
    assert twin.shadows["weight"].item() == 8.0
    assert twin.shadows["bias"].item() == pytest.approx((old + 8.0) / 2)


def test_tensors_that_are_no_parameters_are_averaged():
    tensor = torch.tensor([1.0])
    ema = EMA([tensor], 0.5)
    tensor.fill_(3.0)
    ema.update()
    assert ema.shadows["0"].item() == 2.0


def test_parameters_of_integers_are_copied():
    model = nn.Linear(2, 1)
    model.codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    ema = EMA(model, [0.9, 0.5])
    model.codes += 2**60
    ema.update()
    for average in ema.averages:
        assert average["codes"].tolist() == [1 + 2**60, 2 + 2**60]
    fresh = EMA(copy.deepcopy(model), [0.9, 0.5])
    fresh.load_state_dict(ema.state_dict())
    assert_same(fresh.averages[1], ema.averages[1])


def test_an_average_of_distributed_tensors_is_updated_and_swapped(process_group):
    """FSDP2 shards parameters into DTensors, which have no strategy for lists of copies."""
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fully_shard(model, mesh=mesh)
    ema = EMA(model, 0.5)
    before = {name: param.full_tensor().clone() for name, param in model.named_parameters()}
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    ema.update()
    for name, shadow in ema.shadows.items():
        assert isinstance(shadow, DTensor)
        torch.testing.assert_close(shadow.full_tensor(), before[name] + 0.5)
    with ema.average_parameters():
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.full_tensor(), before[name] + 0.5)
    for name, param in model.named_parameters():
        assert_same_bits(param.full_tensor(), before[name] + 1.0)
    ema.load_state_dict(ema.state_dict())
    ema.load_state_dict(ema.export_state_dict("averaged_model"))


def test_complex_parameters_are_averaged():
    param = nn.Parameter(torch.tensor([1 + 1j]))
    ema = EMA([param], [0.5], dtype=BF16)
    param.data.fill_(3 - 1j)
    ema.update()
    assert ema.shadows["0"].item() == 2 + 0j


def test_tied_weights_are_copied_to_where_they_are_not_tied_and_back():
    tied, untied = Net(), Net(seed=1)
    untied.head.weight = nn.Parameter(torch.zeros(4, 6))
    ema = EMA(tied, 0.5)
    ema.copy_to(untied)
    assert_same_bits(untied.head.weight.detach(), tied.embed.weight.detach())
    with pytest.raises(ValueError, match=r"missing \['head.weight'\]"):
        EMA(untied).copy_to(dict(tied.named_parameters()).items())
    state = ema.state_dict()
    state["averages"][0]["head.weight"] = state["averages"][0].pop("embed.weight")
    ema.load_state_dict(state)  # under its other name
    state["averages"][0]["embed.weight"] = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"ties the weights of 'embed.weight'"):
        ema.load_state_dict(state)


# --- names ----------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_inside(model: nn.Module) -> nn.Module:
    model.low = torch.compile(model.low)
    return model


WRAPPERS = {
    "torch.compile": torch.compile,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "DDP of compiled": lambda model: DistributedDataParallel(torch.compile(model)),
    "compiled part": compiled_inside,
    "DDP of a compiled part": lambda model: DistributedDataParallel(compiled_inside(model)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_torchs_wrappers_leave_no_trace_in_names(wrapper):
    plain, wrapped = EMA(Net(), 0.5), EMA(WRAPPERS[wrapper](Net(seed=1)), 0.5)
    assert list(wrapped.shadows) == list(plain.shadows)
    assert list(wrapped.state_dict()["buffers"]) == list(plain.state_dict()["buffers"])
    for one, other in ((plain, wrapped), (wrapped, plain)):
        one.update()
        other.load_state_dict(one.state_dict())
        assert_same(other.shadows, one.shadows)
    plain.copy_to(WRAPPERS[wrapper](Net(seed=2)))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_that_were_saved_from_inside_a_wrapper_are_recognised(wrapper):
    wrapped = WRAPPERS[wrapper](Net(seed=1))
    ema = EMA(Net(), 0.5)
    ema.load_state_dict(wrapped.state_dict())  # as timm saves it
    expected = [p for name, p in wrapped.named_parameters() if name.endswith("weight")]
    found = [shadow for name, shadow in ema.shadows.items() if name.endswith("weight")]
    for shadow, param in zip(found, expected, strict=True):
        assert_same_bits(shadow, param.detach().to(shadow.dtype))


def test_a_module_of_the_users_that_is_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.inner = nn.Module()
    model.inner.module = nn.Linear(2, 2)
    ema = EMA(model)
    assert list(ema.shadows) == [name for name, _ in model.named_parameters()]
    ema.load_state_dict(ema.state_dict())


def test_a_name_that_could_be_two_parameters_is_refused():
    model = nn.Module()
    model.module = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 2))
    ema = EMA(model)
    message = r"missing \['module.weight', 'weight'\], unknown \['module.module.weight'\]"
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict({"module.module.weight": torch.zeros(2, 2)})


def test_pairs_from_inside_a_compiled_module_lose_its_name():
    model = Net()
    assert list(EMA(torch.compile(model).named_parameters()).shadows) == list(EMA(model).shadows)


def test_filter_chooses_parameters_by_name_and_value():
    model = Net()
    seen = {}

    def trained(name: str, param: Tensor) -> bool:
        seen[name] = param
        return param.requires_grad and "norm" not in name

    ema = EMA(torch.compile(model), 0.5, filter=trained)
    assert list(ema.shadows) == ["embed.weight", "low.weight", "low.bias"]
    assert all(seen[name] is param for name, param in model.named_parameters())
    train(model, 1)
    raw = copied(everything(model))
    with ema.average_parameters():
        assert_same_bits(model.norm.weight.detach(), raw["norm.weight"])
        assert not torch.equal(model.embed.weight, raw["embed.weight"])
    ema.copy_to(Net(seed=1))
    whole = EMA(model)
    with pytest.raises(ValueError, match=r"unknown.*frozen.weight"):
        ema.load_state_dict(whole.state_dict())


def gain(model: nn.Module) -> None:
    model.extra = nn.Linear(1, 1)


def lose(model: nn.Module) -> None:
    del model.low


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gain, r"gained \['extra.weight', 'extra.bias'\], lost \[\]"),
        (lose, r"gained \[\], lost \['low.weight', 'low.bias'\]"),
    ],
)
def test_parameters_that_the_model_gained_or_lost_are_listed_until_it_is_registered(
    change, message
):
    model = Net()
    ema = EMA(model, 0.5)
    state = ema.state_dict()
    change(model)
    raw = copied(everything(model))
    calls = [ema.apply_shadow, ema.copy_to, ema.state_dict, lambda: ema.load_state_dict(state)]
    for call in [*calls, lambda: ema.export_state_dict("timm")]:
        with pytest.raises(RuntimeError, match=message):
            call()
    assert_same(everything(model), raw)
    ema.register()
    assert list(ema.shadows) == [name for name, _ in model.named_parameters()]
    ema.update()
    ema.apply_shadow()


def assign(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replace_parameter(model: nn.Module) -> None:
    model.low.weight = nn.Parameter(torch.zeros_like(model.low.weight))


def replace_module(model: nn.Module) -> None:
    model.low = copy.deepcopy(model.low)


@pytest.mark.parametrize("change", [assign, replace_parameter, replace_module])
@pytest.mark.parametrize("attached", [False, True])
def test_what_the_model_has_replaced_is_followed_under_its_name(change, attached):
    model = Net()
    ema = EMA(model, 0.5)
    before = copied(ema.shadows)
    pointers = {name: shadow.data_ptr() for name, shadow in ema.shadows.items()}
    change(model)
    train(model, 1)
    if attached:
        params = list({p.data_ptr(): p for p in reversed(list(model.parameters()))}.values())
        for p in params:
            p.grad = torch.zeros_like(p)
        SGD(params, lr=0.1, ema=ema).step()
    else:
        ema.update()
    for name, p in model.named_parameters():
        if name in before and p.requires_grad and p.dtype == F32:
            expected = (before[name].double() + p.detach().double()) / 2
            torch.testing.assert_close(ema.shadows[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert pointers == {name: shadow.data_ptr() for name, shadow in ema.shadows.items()}
    with ema.average_parameters():
        low = model.low.weight
        assert torch.equal(low, ema.shadows["low.weight"].to(low.dtype))


def test_a_replaced_parameter_of_another_shape_is_refused():
    model = Net()
    ema = EMA(model, 0.5)
    model.low.weight = nn.Parameter(torch.zeros(1))
    for call in (ema.update, ema.apply_shadow, ema.state_dict):
        with pytest.raises(ValueError, match=r"'low.weight', got shape \(1,\)"):
            call()
    assert ema.num_steps == 0


def test_a_learning_rate_is_no_decay():
    with pytest.raises(ValueError, match="expected a decay, got the learning rate"):
        EMA(Net(), schedules.CosineWarmup(10, base_lr=0.1))


def test_a_filter_is_asked_once_for_each_parameter():
    model = Net()
    ema = EMA(model, 0.5, filter=lambda _, p: p.requires_grad)
    tracked = list(ema.shadows)
    model.requires_grad_(False)
    ema.update()
    assert list(ema.state_dict()["averages"][0]) == tracked


# --- inside the optimizer's step ------------------------------------------------------------------

RULES = [
    0.9,
    schedules.tf_warmup(0.99),
    schedules.inverse_power(0.999),
    lambda k: 0.5 + 0.1 / (k + 1),
]


def set_gradients(model: nn.Module, seed: int) -> None:
    for i, param in enumerate(model.parameters()):
        if param.requires_grad:
            param.grad = random_tensor(param.shape, param.dtype, seed=100 * seed + i)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize(("every", "after"), [(1, 0), (2, 3), (3, 2)])
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_a_step_updates_all_averages_and_buffers_as_update_does(options, every, after, buffers):
    timing = {"update_every": every, "update_after_step": after, "buffers": buffers}
    model, twin = Net(), Net()
    inside, alone = EMA(model, RULES, **timing), EMA(twin, RULES, **timing)
    one = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=inside, **options)
    two = SGD(twin.parameters(), lr=0.1, momentum=0.9, **options)
    for step in range(8):
        for net in (model, twin):
            set_gradients(net, step)
            net.norm(torch.full((3, 4), float(step)))
            with torch.no_grad():
                net.frozen.weight.add_(1.0)
        one.step()
        two.step()
        alone.update()
        for actual, expected in zip(tensors_of(inside), tensors_of(alone), strict=True):
            assert_same_bits(actual, expected)
        assert inside.num_steps == alone.num_steps == step + 1
        assert inside.num_updates == alone.num_updates


def test_a_differentiable_step_updates_averages_that_are_due():
    param = torch.ones(2, requires_grad=True).clone()
    param.grad = torch.ones(2)
    ema = EMA([param], [0.5, 0.75], update_every=2)
    optimizer = SGD([param], lr=1.0, ema=ema, differentiable=True)
    expected = [[0.5, 0.75], [0.5, 0.75], [-0.75, 0.0625]]
    for step in expected:
        optimizer.step()
        assert [average["0"][0].item() for average in ema.averages] == step
    assert ema.num_steps == 3


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_that_is_skipped_changes_no_average_buffer_or_count(capturable):
    model = Net()
    ema = EMA(model, RULES, update_every=2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema, capturable=capturable)
    for step, skipped in enumerate([False, True, False, True, True, False, False]):
        set_gradients(model, step)
        model.norm(torch.full((3, 4), float(step)))
        before, steps = [tensor.clone() for tensor in tensors_of(ema)], ema.num_steps
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        changes = not skipped and steps % 2 == 0
        pairs = list(zip(tensors_of(ema), before, strict=True))
        assert any(not torch.equal(now, then) for now, then in pairs) == changes
        assert ema.num_steps == steps + (not skipped)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_an_optimizer_take_its_averages_along(through):
    model = Net()
    ema = EMA(model, RULES[:3], buffers="average", update_every=2, update_after_step=2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
    for step in range(5):
        set_gradients(model, step)
        optimizer.step()
    twin_model, twin = through((model, optimizer))
    for step in range(5, 8):
        for net, stepped in ((model, optimizer), (twin_model, twin)):
            set_gradients(net, step)
            stepped.step()
    assert twin.ema is not ema
    for one, other in zip(tensors_of(ema), tensors_of(twin.ema), strict=True):
        assert_same_bits(one, other)
    with pytest.raises(RuntimeError, match="attached"):
        twin.ema.update()


# --- steps that a GPU counts ----------------------------------------------------------------------


@pytest.fixture
def counting(monkeypatch):
    """An EMA that believes that a GPU counts its steps, which is this tensor on the CPU."""

    def pretend(ema: EMA, count: int) -> Tensor:
        on_gpu = torch.tensor(count)
        monkeypatch.setattr(ema, "_home", lambda: torch.device("cuda"))
        monkeypatch.setattr(Counter, "on", lambda self, device: on_gpu)
        monkeypatch.setattr(Counter, "on_gpu", on_gpu)
        return on_gpu

    return pretend


def test_schedules_and_counts_are_left_to_the_gpu_that_counts(counting):
    rules = [0.9, schedules.equal(), torch.tensor(0.5)]
    ema = EMA([scalar(1.0)], rules, update_every=2, update_after_step=3)
    for _ in range(5):
        ema.update()
    on_gpu = counting(ema, 4)
    found = ema._averages(left_to_device=True)
    assert found.decays == tuple(rules)
    assert (found.steps, found.on_device, found.every, found.after) == (5, on_gpu, 2, 3)
    # Once it has counted the host no longer knows.
    assert ema._averages(left_to_device=False) == found
    plain = EMA([scalar(1.0)], 0.9)
    counting(plain, 4)
    assert plain._averages(left_to_device=True)[1:] == ((0.9,), 0, None, 1, 0, frozenset())


def test_a_function_is_refused_by_name_where_a_gpu_counts_and_nothing_changes(counting):
    def my_decay(k: int) -> float:
        return 0.5

    ema = EMA([scalar(1.0)], [0.9, my_decay])
    counting(ema, 0)
    with pytest.raises(RuntimeError, match="my_decay"):
        ema._averages(left_to_device=True)
    averages = ema._averages(left_to_device=False)  # the host still knows
    assert averages.decays == (0.9, 0.5)


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("steps", range(4))
def test_buffers_are_copied_where_the_gpu_says_so(counting, found_inf, steps):
    """It is asked before the kernels count the step, and the copies are made after them."""
    model = nn.BatchNorm1d(2)
    ema = EMA(model, schedules.equal(), update_every=3)
    ema.update()
    on_gpu = counting(ema, steps)
    averages = ema._averages(left_to_device=True)
    model.num_batches_tracked.fill_(7)
    taken = found_inf != 1.0
    flag = None if found_inf is None else torch.tensor(found_inf)
    gate = Gate(flag, [on_gpu], torch.device("cpu"))
    copy_buffers = ema._planned_besides(averages, gate, ema._subject)
    on_gpu += taken
    copy_buffers()
    copied = ema.state_dict()["buffers"]["num_batches_tracked"].item() == 7
    assert copied == (taken and (1 + steps) % 3 == 0)  # one step was the host's
    if found_inf is None:  # a step that the host counts, after the GPU has counted others
        model.num_batches_tracked.fill_(9)
        ema._planned_besides(averages, None, ema._subject)()
        copied = ema.state_dict()["buffers"]["num_batches_tracked"].item() == 9
        assert copied == ((1 + steps + 1) % 3 == 0)


CUDA_RULES = [0.9, schedules.tf_warmup(0.99), schedules.inverse_power(0.999)]


def cuda_pair(**timing) -> tuple[nn.Module, EMA, nn.Module, EMA]:
    model, twin = Net().cuda(), Net()
    return model, EMA(model, CUDA_RULES, **timing), twin, EMA(twin, CUDA_RULES, **timing)


def assert_all_same(one: EMA, other: EMA) -> None:
    for actual, expected in zip(tensors_of(one), tensors_of(other), strict=True):
        assert_same_bits(actual.cpu(), expected)
    assert one.num_steps == other.num_steps


@pytest.mark.cuda
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_on_a_gpu_updates_are_the_cpus_to_the_last_bit(buffers):
    timing = {"update_every": 2, "update_after_step": 3, "buffers": buffers}
    model, ema, twin, twin_ema = cuda_pair(**timing)
    for step in range(8):
        train(twin, step)
        model.load_state_dict(twin.state_dict())
        ema.update()
        twin_ema.update()
    assert_all_same(ema, twin_ema)
    ema.swap(1)
    twin_ema.swap(1)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(param.detach().cpu(), other.detach())


@pytest.mark.cuda
def test_replayed_updates_follow_schedule_timing_and_buffers():
    model, ema, twin, twin_ema = cuda_pair(update_every=2, update_after_step=3)
    ema.update()
    twin_ema.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    for step in range(8):
        train(twin, step)
        model.load_state_dict(twin.state_dict())
        graph.replay()
        twin_ema.update()
        assert_all_same(ema, twin_ema)
    train(twin, 8)  # and eager steps go on from there
    model.load_state_dict(twin.state_dict())
    for _ in range(3):
        ema.update()
        twin_ema.update()
    assert_all_same(ema, twin_ema)


@pytest.mark.cuda
def test_steps_that_a_gpu_skips_change_no_average_buffer_or_count():
    timing = {"update_every": 2, "update_after_step": 1}
    model, ema, twin, twin_ema = cuda_pair(**timing)
    one = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
    two = SGD(twin.parameters(), lr=0.1, momentum=0.9, ema=twin_ema)
    for step, skipped in enumerate([False, True, False, True, True, False, False, False]):
        set_gradients(twin, step)
        twin.norm(torch.full((3, 4), float(step)))
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            param.grad = None if other.grad is None else other.grad.cuda()
        for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
            buffer.copy_(other)
        one.found_inf = torch.tensor(float(skipped), device="cuda")
        one.step()
        if not skipped:
            two.step()
        assert_all_same(ema, twin_ema)


@pytest.mark.cuda
def test_a_function_is_refused_under_a_scaler_and_in_a_capture():
    model = nn.Linear(2, 2).cuda()
    ema = EMA(model, lambda k: 0.5)
    ema.update()
    with pytest.raises(RuntimeError, match="lambda"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ema.update()
    optimizer = SGD(model.parameters(), lr=0.1, ema=ema)
    optimizer.found_inf = torch.zeros((), device="cuda")
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="lambda"):
        optimizer.step()
    assert_same_bits(model.weight.detach(), before)


@pytest.mark.cuda
def test_updates_and_swaps_never_wait_for_the_gpu_and_take_no_memory():
    model = Net().cuda()
    ema = EMA(model, [*CUDA_RULES, lambda k: 0.5], update_every=2)
    for call in (ema.update, ema.update, ema.swap, ema.swap):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in (ema.update, ema.update, ema.swap, ema.swap):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# --- dtype and device -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_dtype_chooses_that_of_the_shadows_and_no_copys(dtype):
    model = Net()
    ema = EMA(model, [0.5, 0.9], dtype=dtype)
    assert {shadow.dtype for average in ema.averages for shadow in average.values()} == {dtype}
    assert ema.state_dict()["buffers"]["norm.running_mean"].dtype == F32
    train(model, 1)
    ema.update()
    ema.register()
    assert ema.shadows["low.weight"].dtype == dtype


def test_to_converts_shadows_and_goes_on():
    model = nn.Linear(3, 2).double()
    ema, exact = EMA(model, [0.5, 0.9]), EMA(model, [0.5, 0.9])
    train(model, 1)
    ema.update()
    exact.update()
    assert ema.to(F32) is ema
    assert ema.to(device="cpu", dtype=F32) is ema
    assert ema.num_steps == 1
    train(model, 2)
    ema.update()
    exact.update()
    for actual, expected in zip(ema.averages, exact.averages, strict=True):
        for name, shadow in actual.items():
            assert shadow.dtype == F32
            torch.testing.assert_close(shadow.double(), expected[name], rtol=1e-6, atol=1e-6)
    for wrong in ("meta", BF16):
        before = ema.averages
        with pytest.raises(ValueError, match="expected"):
            ema.to(wrong)
        assert all(ema.averages[i][n] is s for i, a in enumerate(before) for n, s in a.items())
    ema.register()  # the choice that was refused is not remembered
    assert ema.shadows["weight"].dtype == F32


# --- memory ---------------------------------------------------------------------------------------


def allocated_bytes(call) -> int:
    """What torch takes from the CPU's memory in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in record.events())


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_updates_and_swaps_take_no_memory(buffers):
    model = Net()
    ema = EMA(model, [0.9, schedules.inverse_power(0.99)], buffers=buffers, update_every=2)
    ema.update()
    ema.apply_shadow()  # makes the memory that the weights are kept in
    ema.restore()
    kept = [*ema._backup.values(), *tensors_of(ema)]
    pointers = [tensor.data_ptr() for tensor in kept]
    calls = [ema.update, ema.update, ema.apply_shadow, ema.restore, ema.swap, ema.swap]
    assert [allocated_bytes(call) for call in calls] == [0] * len(calls)
    assert [tensor.data_ptr() for tensor in [*ema._backup.values(), *tensors_of(ema)]] == pointers
    assert allocated_bytes(lambda: torch.empty(10)) == 40  # the meter sees what there is


# --- swaps and half precision ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_swaps_never_round_a_shadow_to_the_weights_dtype(dtype):
    model = nn.Linear(33, 5).to(dtype)
    ema = EMA(model, 0.9)
    for step in range(3):
        train(model, step)
        ema.update()
    raw, shadows = copied(everything(model)), copied(ema.shadows)
    for _ in range(4):
        ema.swap()
    assert_same(everything(model), raw)
    assert_same(ema.shadows, shadows)
    ema.swap()
    with pytest.raises(RuntimeError, match="applied"):
        ema.apply_shadow()
    ema.swap()
    with pytest.raises(RuntimeError, match="not applied"):
        ema.restore()


def test_swap_before_the_first_update_changes_nothing():
    model = Net()
    raw = copied(everything(model))
    ema = EMA(model)
    with ema.average_parameters():
        assert_same(everything(model), raw)
    assert_same(everything(model), raw)


def test_copy_to_the_model_is_refused_while_applied():
    ema = EMA([scalar(1.0)])
    with ema.average_parameters(), pytest.raises(RuntimeError, match=r"copy_to.*restore"):
        ema.copy_to()


def test_an_average_of_half_precision_weights_does_not_stall():
    """Decay 0.9999 and 10,000 updates: bfloat16 shadows would stop at 0.898 of the way."""
    model = nn.Linear(4, 2).to(BF16)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    ema = EMA(model, 0.9999)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    for _ in range(10_000):
        ema.update()
    exact = 1 - 0.9999**10_000
    for shadow in ema.shadows.values():
        torch.testing.assert_close(
            shadow.double(), torch.full_like(shadow, exact, dtype=F64), rtol=1e-4, atol=0
        )


# --- states ---------------------------------------------------------------------------------------


def saved(state: dict) -> dict:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_a_resumed_average_goes_on_to_the_last_bit(buffers):
    rules = [0.9, schedules.tf_warmup(0.99), schedules.inverse_power(0.999)]
    model = Net()
    ema = EMA(model, rules, buffers=buffers, update_every=2, update_after_step=3)
    for step in range(5):
        train(model, step)
        ema.update()
    twin = Net(seed=8)
    resumed = EMA(twin, [0.1, 0.2, 0.3], buffers=buffers)
    twin.load_state_dict(model.state_dict())
    twin.cache.copy_(model.cache)
    resumed.load_state_dict(saved(ema.state_dict()))
    assert resumed.decay == rules
    assert (resumed.num_steps, resumed.num_updates) == (5, ema.num_updates)
    for step in range(5, 12):
        for net, average in ((model, ema), (twin, resumed)):
            train(net, step)
            average.update()
    for one, other in zip(tensors_of(ema), tensors_of(resumed), strict=True):
        assert_same_bits(one, other)


def test_a_function_is_not_saved_and_the_constructors_stays():
    ema = EMA([scalar(1.0)], [lambda k: 0.5, 0.9])
    ema.update()
    state = saved(ema.state_dict())
    assert state["decay"] == [None, 0.9]
    resumed = EMA([scalar(1.0)], [own := lambda k: 0.25, 0.1])
    resumed.load_state_dict(state)
    assert resumed.decay == [own, 0.9]


def test_a_decay_that_is_a_tensor_stays_that_tensor():
    decay = torch.tensor(0.5)
    ema = EMA([scalar(1.0)], decay)
    ema.load_state_dict(EMA([scalar(1.0)], 0.75).state_dict())
    assert ema.decay is decay
    assert decay.item() == 0.75


@pytest.mark.parametrize("average", [0, 1])
def test_saving_while_applied_saves_both_sets_and_loading_comes_back_applied(average):
    model = Net()
    ema = EMA(model, [0.9, 0.5], buffers="average")
    train(model, 1)
    ema.update()
    train(model, 2)
    raw = copied(everything(model))
    ema.apply_shadow(average)
    applied = copied(everything(model))
    state = saved({"ema": ema.state_dict(), "model": model.state_dict()})
    twin = Net(seed=9)
    resumed = EMA(twin, [0.1, 0.2], buffers="average")
    twin.load_state_dict(state["model"])
    resumed.load_state_dict(state["ema"])
    assert_same(everything(twin), applied)
    with pytest.raises(RuntimeError, match="applied"):
        resumed.update()
    resumed.restore()
    assert_same(everything(twin), raw)
    assert_same(resumed.averages[average], ema.averages[average])
    # Also where the model was not loaded.
    other = Net(seed=9)
    EMA(other, [0.1, 0.2], buffers="average").load_state_dict(state["ema"])
    assert_same(everything(other), applied)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("applied", [None, 1])
def test_copies_of_a_model_and_its_averages_go_on_alone(through, applied):
    model = Net()
    rules = [0.9, schedules.equal()]
    ema = EMA(model, rules, buffers="average", update_every=2, update_after_step=2)
    for step in range(5):
        train(model, step)
        ema.update()
    raw = copied(everything(model))
    if applied is not None:
        ema.apply_shadow(applied)
    twin_model, twin = through((model, ema))
    assert twin.decay == rules
    if applied is not None:
        with pytest.raises(RuntimeError, match="applied"):
            twin.update()
        ema.restore()
        twin.restore()
    assert_same(everything(twin_model), raw)
    frozen = [tensor.clone() for tensor in tensors_of(ema)]
    for step in range(5, 8):
        train(twin_model, step)
        twin.update()
    for now, then in zip(tensors_of(ema), frozen, strict=True):
        assert_same_bits(now, then)
    for step in range(5, 8):
        train(model, step)
        ema.update()
    for one, other in zip(tensors_of(ema), tensors_of(twin), strict=True):
        assert_same_bits(one, other)
    assert ema.num_steps == twin.num_steps == 8


def test_snapshots_are_copies_of_the_power_functions():
    model = Net()
    ema = EMA(model, [schedules.power_function(0.05), 0.9, schedules.power_function(0.1)])
    for step in range(4):
        train(model, step)
        ema.update()
    snapshots = ema.snapshot()
    assert [(s.num_updates, s.sigma_rel) for s in snapshots] == [(4, 0.05), (4, 0.1)]
    before = copied(ema.averages[2])
    train(model, 4)
    ema.update()
    assert_same(snapshots[1].shadows, before)
    with pytest.raises(ValueError, match="power_function"):
        EMA(model).snapshot()


def test_averages_may_be_kept_in_a_module():
    model, target = Net(), Net(seed=1)
    ema = EMA(model, 0.5)
    ema._keep_in(target)
    before = copied(everything(target))
    train(model, 1)
    model.norm.num_batches_tracked.fill_(3)
    ema.update()
    assert target.norm.num_batches_tracked.item() == 3
    expected = (before["embed.weight"] + model.embed.weight.detach()) / 2
    torch.testing.assert_close(target.embed.weight.detach(), expected)
    assert ema.shadows["embed.weight"] is target.embed.weight


def test_converting_the_shadows_is_no_new_registration():
    """What was frozen when they were made is copied, and nothing that was frozen later."""
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    ema = EMA(model, 0.5)
    model.weight.requires_grad_(False)
    start = model.weight.detach().clone()
    ema.to(F32)
    with torch.no_grad():
        model.weight.add_(1.0)
        model.bias.fill_(7.0)
    ema.update()
    torch.testing.assert_close(ema.shadows["weight"], start + 0.5)
    assert ema.shadows["bias"].item() == 7.0
