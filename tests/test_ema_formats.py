"""States and behavior of other packages' averages: loaded, gone on with, and written back."""

import copy
import io

import pytest
import torch
from reference import AveragedNet as Net
from reference import assert_same_bits, random_tensor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fused_opt import EMA, schedules

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


BF16_NAMES = ("low.weight", "low.bias")


@torch.no_grad()
def train(model: nn.Module, seed: int) -> None:
    """Changes what a step of training does: neither the frozen layer nor the cache."""
    for i, param in enumerate(param for param in model.parameters() if param.requires_grad):
        param.add_(random_tensor(param.shape, param.dtype, seed=100 * seed + i), alpha=0.1)
    model.norm(model.embed(random_tensor((8, 6), F32, seed=seed)))


def through_a_file(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def assert_same_state(actual, expected, where: str = "state") -> None:
    """The same keys in the same order, types, dtypes and bits."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key, value in expected.items():
            assert_same_state(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_same_state(actual[i], value, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        assert not actual.requires_grad
        assert_same_bits(actual, expected, where)
    else:
        assert actual == expected, where


def as_dict(state) -> dict:
    """What a module's ``state_dict()`` says, in a plain dict."""
    return dict(state)


# --- the packages: each with the EMA of ours that does the same -----------------------------------
# They are imported where they are used: machines that run the CUDA tests alone lack them.


class TorchEma:
    """torch_ema, whose decay warms up where it counts updates."""

    def __init__(self, model: nn.Module, counts: bool = True, stores: bool = False) -> None:
        from torch_ema import ExponentialMovingAverage

        self.ema = ExponentialMovingAverage(model.parameters(), 0.9, use_num_updates=counts)
        self.counts, self.stores = counts, stores

    def ours(self, model: nn.Module) -> EMA:
        return EMA(model, schedules.tf_warmup(0.9, offset=1) if self.counts else 0.9)

    def update(self, model: nn.Module) -> None:
        self.ema.update()

    def state(self) -> dict:
        if self.stores:
            self.ema.store()
        return self.ema.state_dict()

    def load(self, state: dict) -> None:
        self.ema.load_state_dict(state)

    def average(self, model: nn.Module) -> dict[str, Tensor]:
        names = [name for name, _ in model.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))


class OfModule:
    """A package whose average is a copy of the module."""

    prefix: str

    def state(self) -> dict:
        return as_dict(self.ema.state_dict())

    def load(self, state: dict) -> None:
        self.ema.load_state_dict(state)

    def average(self, model: nn.Module) -> dict[str, Tensor]:
        state = {name: t for name, t in self.state().items() if name.startswith(self.prefix)}
        return {name.removeprefix(self.prefix): tensor for name, tensor in state.items()}


class Averaged(OfModule):
    """torch's AveragedModel, whose first update copies, also where it averages buffers."""

    prefix = "module."

    def __init__(self, model: nn.Module, equal: bool = False, use_buffers: bool = False) -> None:
        fn = get_swa_multi_avg_fn() if equal else get_ema_multi_avg_fn(0.9)
        self.ema = AveragedModel(model, multi_avg_fn=fn, use_buffers=use_buffers)
        self.equal, self.buffers = equal, "average" if use_buffers else "copy"

    def ours(self, model: nn.Module) -> EMA:
        if self.equal:
            return EMA(model, schedules.equal(), buffers=self.buffers)
        return EMA(model, 0.9, update_after_step=1, buffers=self.buffers)

    def update(self, model: nn.Module) -> None:
        self.ema.update_parameters(model)


class Lucid(OfModule):
    """ema_pytorch, which averages buffers but leaves those of integers as they were at first."""

    prefix = "ema_model."

    def __init__(
        self, model: nn.Module, every: int = 1, after: int = 0, online: bool = True
    ) -> None:
        from ema_pytorch import EMA as EmaPytorch

        self.options = {"update_every": every, "update_after_step": after}
        self.ema = EmaPytorch(model, beta=0.9, **self.options, include_online_model=online)

    def ours(self, model: nn.Module) -> EMA:
        gamma = 1.0 / self.options["update_every"]
        rule = schedules.inverse_power(0.9, gamma=gamma)
        return EMA(model, rule, buffers="average", **self.options)

    def update(self, model: nn.Module) -> None:
        self.ema.update()


PACKAGES = {
    "torch_ema": TorchEma,
    "torch_ema, constant": lambda model: TorchEma(model, counts=False),
    "torch_ema, stored": lambda model: TorchEma(model, stores=True),
    "averaged_model": Averaged,
    "averaged_model, equal": lambda model: Averaged(model, equal=True),
    "averaged_model, buffers": lambda model: Averaged(model, use_buffers=True),
    "ema_pytorch": Lucid,
    "ema_pytorch, alone": lambda model: Lucid(model, online=False),
    "ema_pytorch, seldom": lambda model: Lucid(model, every=3, after=6),
}


@pytest.fixture(params=PACKAGES)
def package(request) -> str:
    return request.param


def format_of(package: str) -> str:
    return package.split(",")[0]


def assert_averages_agree(ours: EMA, theirs, model: nn.Module) -> None:
    """To fp32 rounding, where theirs are right."""
    state = ours.state_dict()
    found = {**state["averages"][0], **state["buffers"]}
    for name, tensor in theirs.average(model).items():
        name = "embed.weight" if name == "head.weight" else name
        if name in BF16_NAMES or not tensor.is_floating_point():
            continue  # judged by what they should be, in tests of their own
        torch.testing.assert_close(found[name], tensor.detach(), rtol=2e-6, atol=2e-6)


def test_averages_agree_for_50_updates(package):
    model = Net()
    theirs = PACKAGES[package](model)
    ours = theirs.ours(model)
    exact = {name: param.detach().double() for name, param in model.named_parameters()}
    decays = []
    ours.decay = recorded(ours.decay, decays)
    for step in range(50):
        train(model, step)
        theirs.update(model)
        updates = len(decays)
        ours.update()
        decay = decays[-1] if len(decays) > updates else 0.0
        if step % ours._update_every == 0:
            for name, param in model.named_parameters():
                exact[name] += (1 - decay) * (param.detach().double() - exact[name])
        assert_averages_agree(ours, theirs, model)
    # Their averages of bfloat16 are bfloat16, and lose what is below its spacing; ours do not.
    average = theirs.average(model)
    for name in BF16_NAMES:
        torch.testing.assert_close(ours.shadows[name].double(), exact[name], rtol=2e-6, atol=2e-6)
        assert average[name].dtype == BF16
        assert (average[name].double() - exact[name]).abs().max() > 1e-3


def recorded(decay, decays: list[float]):
    """A decay that is written down whenever it is asked for."""

    def ask(k: int) -> float:
        decays.append(decay(k) if callable(decay) else decay)
        return decays[-1]

    return ask


def test_batch_norms_counter_is_right_where_theirs_is_not():
    """AveragedModel truncates an average of integers, and ema_pytorch never copies them."""
    model = Net()
    packages = [Averaged(model, use_buffers=True), Lucid(model)]
    ours = EMA(model, 0.9, buffers="average")
    for step in range(50):
        train(model, step)
        for theirs in packages:
            theirs.update(model)
        ours.update()
    counter = "norm.num_batches_tracked"
    assert ours.state_dict()["buffers"][counter].item() == 50
    assert [theirs.average(model)[counter].item() for theirs in packages] == [40, 0]


@pytest.mark.parametrize("package", ["torch_ema", "averaged_model", "ema_pytorch"])
def test_a_frozen_layer_that_changes_is_followed_where_theirs_lag(package):
    model = Net()
    theirs = PACKAGES[package](model)
    ours = theirs.ours(model)
    for _ in range(5):
        with torch.no_grad():
            model.frozen.weight.add_(1.0)
        theirs.update(model)
        ours.update()
    assert_same_bits(ours.shadows["frozen.weight"], model.frozen.weight.detach())
    assert not torch.equal(theirs.average(model)["frozen.weight"], model.frozen.weight)


# --- loading, going on, and writing back ----------------------------------------------------------


def trained(package: str, steps: int = 7):
    """A model and a package's average of it, after some updates."""
    model = Net()
    theirs = PACKAGES[package](model)
    for step in range(steps):
        train(model, step)
        theirs.update(model)
    return model, theirs


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_state_that_is_loaded_is_exported_as_it_was(package, steps):
    model, theirs = trained(package, steps)
    state = through_a_file(theirs.state())
    ema = theirs.ours(model)
    ema.load_state_dict(state)
    assert_same_state(ema.export_state_dict(format_of(package)), state)
    # Also with constructor's options that the state overrides, and after our own format.
    if format_of(package) == "torch_ema":
        other = EMA(model, 0.123, update_after_step=3)
        other.load_state_dict(state)
        assert_same_state(other.export_state_dict("torch_ema"), state)


def test_an_average_goes_on_from_a_state_as_the_package_does(package):
    model, theirs = trained(package)
    ours = theirs.ours(model)
    ours.register()  # from weights that are not those of the averages
    if format_of(package) == "torch_ema":
        ours.decay = 0.123  # the state brings it too
    ours.load_state_dict(through_a_file(theirs.state()))
    assert_averages_agree(ours, theirs, model)
    for step in range(7, 20):
        train(model, step)
        theirs.update(model)
        ours.update()
        assert_averages_agree(ours, theirs, model)


def test_a_package_goes_on_from_an_export_as_we_do(package):
    model = Net()
    ours = PACKAGES[package](model).ours(model)
    for step in range(7):
        train(model, step)
        ours.update()
    theirs = PACKAGES[package](model)
    state = ours.export_state_dict(format_of(package))
    if "alone" in package:
        state = {name: t for name, t in state.items() if not name.startswith("online_model.")}
    theirs.load(copy.deepcopy(state))
    for step in range(7, 20):
        train(model, step)
        theirs.update(model)
        ours.update()
        assert_averages_agree(ours, theirs, model)


@pytest.mark.parametrize(
    "layout", ["torch_ema", "diffusers", "averaged_model", "timm", "ema_pytorch"]
)
def test_exports_have_the_parameters_dtypes_unless_a_state_had_others(layout):
    model = Net()
    ema = EMA(model, 0.9)
    ema.update()
    state = ema.export_state_dict(layout)
    dtypes = [tensor.dtype for tensor in tensors_in(state)]
    assert BF16 in dtypes
    wide = copy.deepcopy(state)
    for tensor in tensors_in(wide):
        if tensor.dtype == BF16:
            tensor.data = tensor.data.float()
    ema.load_state_dict(wide)
    assert_same_state(ema.export_state_dict(layout), wide)


def tensors_in(state) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = [v for k, v in state.items() if not str(k).startswith("online_model.")]
    return [t for v in state for t in tensors_in(v)] if isinstance(state, list) else []


def test_exports_while_applied_have_the_weights_and_not_the_average_as_weights():
    model = Net()
    ema = EMA(model, 0.5)
    train(model, 1)
    ema.update()
    raw = {name: param.detach().clone() for name, param in model.named_parameters()}
    with ema.average_parameters():
        lucid = copy.deepcopy(ema.export_state_dict("ema_pytorch"))
        collected = copy.deepcopy(ema.export_state_dict("torch_ema")["collected_params"])
    for (name, weight), other in zip(raw.items(), collected, strict=True):
        assert_same_bits(lucid[f"online_model.{name}"], weight)
        assert_same_bits(other, weight)
    assert ema.export_state_dict("torch_ema")["collected_params"] is None


@pytest.mark.parametrize("package", ["torch_ema", "averaged_model", "ema_pytorch"])
def test_several_averages_are_exported_one_by_one_and_loaded_from_our_own_format_alone(package):
    model = Net()
    rule = PACKAGES[package](model).ours(model).decay
    ema = EMA(model, [0.5, rule])
    train(model, 1)
    ema.update()
    state = ema.export_state_dict(format_of(package), average=1)
    other = EMA(model, rule)
    other.load_state_dict(state)
    for name, shadow in other.shadows.items():
        assert_same_bits(shadow, ema.averages[1][name].to(model.get_parameter(name).dtype).float())
    with pytest.raises(ValueError, match="2 averages"):
        ema.load_state_dict(state)


@pytest.mark.parametrize("updates", [0, 1, 5, 100])
def test_torch_emas_count_has_the_update_in_it(updates):
    """min(decay, (1 + n) / (10 + n)), where the n of the first update is 1."""
    param = nn.Parameter(torch.zeros(1, dtype=F64))
    ema = EMA([param], 0.1)
    state = {"decay": 0.99, "num_updates": updates, "collected_params": None}
    ema.load_state_dict({**state, "shadow_params": [torch.zeros(1, dtype=F64)]})
    param.data.fill_(1.0)
    ema.update()
    n = updates + 1
    assert ema.shadows["0"].item() == pytest.approx(1 - min(0.99, (1 + n) / (10 + n)), abs=1e-15)
    assert ema.export_state_dict("torch_ema")["num_updates"] == n


# --- timm, by hand --------------------------------------------------------------------------------


def timm_states(model: nn.Module) -> dict[str, dict]:
    names = as_dict(copy.deepcopy(model).state_dict())
    return {
        "ModelEmaV2 and V3": {f"module.{name}": tensor for name, tensor in names.items()},
        "a file": {"epoch": 3, "arch": "net", "state_dict": {}, "state_dict_ema": names},
        "a file of DDP": {"state_dict_ema": {f"module.{n}": t for n, t in names.items()}},
        "alone": names,
    }


@pytest.mark.parametrize("layout", list(timm_states(Net())))
def test_timms_states_are_loaded_and_written_back(layout):
    averaged = Net(seed=5)
    train(averaged, 1)
    state = through_a_file(timm_states(averaged)[layout])
    ema = EMA(Net(), 0.75)
    ema.update()
    ema.load_state_dict(state)
    assert (ema.decay, ema.num_steps) == (0.75, 1)
    assert_same_state(ema.export_state_dict("timm"), timm_states(averaged)["ModelEmaV2 and V3"])


def test_what_timm_averaged_is_not_overwritten_by_steps_that_copy():
    model = Net()
    ema = EMA(model, 0.5, update_every=2, update_after_step=5)
    ema.load_state_dict(timm_states(Net(seed=5))["alone"])
    assert (ema.num_steps, ema.num_updates) == (6, 0)
    before = ema.shadows["embed.weight"].clone()
    ema.update()
    expected = before + 0.5 * (model.embed.weight.detach() - before)
    torch.testing.assert_close(ema.shadows["embed.weight"], expected)


# --- diffusers, by hand ---------------------------------------------------------------------------

DIFFUSERS = {
    "decay": 0.9,
    "min_decay": 0.2,
    "optimization_step": 4,
    "update_after_step": 2,
    "use_ema_warmup": True,
    "inv_gamma": 2.0,
    "power": 0.75,
}


def diffusers_decay(state: dict, optimization_step: int) -> float:
    """``EMAModel.get_decay``, with the step counted with the update that is being done."""
    step = max(0, optimization_step - state["update_after_step"] - 1)
    if step <= 0:
        return 0.0
    warm = 1 - (1 + step / state["inv_gamma"]) ** -state["power"]
    decay = warm if state["use_ema_warmup"] else (1 + step) / (10 + step)
    return max(min(decay, state["decay"]), state["min_decay"])


@pytest.mark.parametrize("step", [0, 1, 3, 10])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_ema_warmup": False},
        {"use_ema_warmup": False, "update_after_step": 0, "min_decay": 0.0},
        {"update_after_step": 0, "inv_gamma": 1, "power": 2 / 3},
        {"min_decay": 0.95},  # above decay, and wins
        {"min_decay": 0.95, "use_ema_warmup": False},
    ],
)
def test_diffusers_states_bring_their_decay_and_counter_and_are_written_back(changes, step):
    state = {**DIFFUSERS, **changes, "optimization_step": step}
    state["shadow_params"] = [p.detach() for p in Net(seed=5).parameters()]
    model = Net()
    ema = EMA(model, 0.5, update_after_step=7)
    ema.load_state_dict(through_a_file(state))
    assert_same_state(ema.export_state_dict("diffusers"), state)
    exact = state["shadow_params"][0].double()
    for now in range(step + 1, step + 15):
        train(model, now)
        ema.update()
        weight = model.embed.weight.detach().double()
        exact = exact + (1 - diffusers_decay(state, now)) * (weight - exact)
        torch.testing.assert_close(
            ema.shadows["embed.weight"].double(), exact, rtol=1e-6, atol=1e-6
        )
    assert ema.export_state_dict("diffusers")["optimization_step"] == step + 14


@pytest.mark.parametrize("key", [*DIFFUSERS, "shadow_params"])
def test_each_key_of_diffusers_may_stand_alone(key):
    model = Net()
    whole = {**DIFFUSERS, "shadow_params": [p.detach() for p in Net(seed=5).parameters()]}
    ema = EMA(model, 0.5)
    ema.load_state_dict(copy.deepcopy(whole))
    value = {"shadow_params": [p.detach() for p in Net(seed=6).parameters()]}.get(key)
    value = {"use_ema_warmup": False, "optimization_step": 9}.get(key, value)
    value = 0.5 if value is None and key != "update_after_step" else 5 if value is None else value
    ema.load_state_dict({key: value})
    assert_same_state(ema.export_state_dict("diffusers"), {**whole, key: value})


@pytest.mark.parametrize("rule", [0.75, schedules.constant(0.75), schedules.half_life(2)])
def test_a_constant_decay_is_one_that_diffusers_never_leaves(rule):
    ema = EMA(Net(), rule)
    state = ema.export_state_dict("diffusers")
    decays = [diffusers_decay(state, step) for step in range(1, 5)]
    assert (
        decays
        == [
            pytest.approx(
                schedules.constant(0.75)(0) if rule != schedules.half_life(2) else 2**-0.5
            )
        ]
        * 4
    )


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ("torch_ema", schedules.inverse_power(0.9)),
        ("torch_ema", schedules.tf_warmup(0.9)),
        ("torch_ema", lambda k: 0.5),
        ("diffusers", schedules.equal()),
        ("diffusers", schedules.tf_warmup(0.9)),
        ("diffusers", lambda k: 0.5),
    ],
)
def test_a_decay_that_a_format_cannot_keep_is_refused(layout, rule):
    with pytest.raises(ValueError, match=f"{layout} cannot keep the decay"):
        EMA(Net(), rule).export_state_dict(layout)


def test_torch_ema_cannot_keep_steps_that_only_copy():
    ema = EMA(Net(), 0.9, update_after_step=2)
    for _ in range(2):
        with pytest.raises(ValueError, match="update_after_step"):
            ema.export_state_dict("torch_ema")
        ema.update()
    ema.export_state_dict("torch_ema")


def test_a_format_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"expected one of torch_ema, diffusers.*got 'apex'"):
        EMA(Net()).export_state_dict("apex")


# --- states that do not fit -----------------------------------------------------------------------


def good(layout: str) -> dict:
    """A state of another model's average, to be damaged."""
    return copy.deepcopy(EMA(Net(seed=5), 0.9).export_state_dict(layout))


def set_counter(state: dict, value) -> None:
    keys = ("num_updates", "optimization_step", "n_averaged", "step")
    state[next(key for key in keys if key in state)] = value


def drop_last(state: dict) -> None:
    state["shadow_params"].pop()


def reshape(state: dict) -> None:
    if "shadow_params" in state:
        state["shadow_params"][3] = torch.zeros(5, 4)
    else:
        name = next(
            name for name in state if name.endswith("frozen.weight") and "online" not in name
        )
        state[name] = torch.zeros(5, 4)


def drop_name(state: dict) -> None:
    for name in [name for name in state if name.endswith(("low.bias", "norm.running_var"))]:
        del state[name]


def add_name(state: dict) -> None:
    prefix = "ema_model." if "step" in state else "module."
    state[prefix + "head.bias"] = torch.zeros(1)


def make_real(state: dict) -> None:
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        state[name] = torch.tensor(0.5)


LISTS = ("torch_ema", "diffusers")
MODULES = ("averaged_model", "timm", "ema_pytorch")
DAMAGES = [
    *[(f, drop_last, r"expected 7 tensors.*'low.bias'.*got 6") for f in LISTS],
    *[(f, reshape, r"\(4, 4\).*'frozen.weight', got .*\(5, 4\)") for f in LISTS + MODULES],
    *[(f, drop_name, r"missing \['low.bias', 'norm.running_var'\]") for f in MODULES],
    *[(f, add_name, r"missing \[\], unknown \['.*head.bias'\]") for f in MODULES],
    *[(f, make_real, "int64.*'norm.num_batches_tracked'.*real") for f in MODULES],
    *[
        (f, lambda state: set_counter(state, -1), "integer of at least 0")
        for f in (*LISTS, "averaged_model", "ema_pytorch")
    ],
    ("averaged_model", lambda s: set_counter(s, torch.tensor(1.5)), "n_averaged.*integer"),
    ("torch_ema", lambda state: state.update(decay=1.5), "decay"),
    ("torch_ema", lambda state: state.pop("collected_params"), "collected_params"),
    ("torch_ema", lambda state: state.update(collected_params=[torch.ones(1)]), "collected_params"),
    ("diffusers", lambda state: state.update(decay=1.5), "decay"),
    ("diffusers", lambda state: state.update(min_decay=-1.0), "decay"),
    (
        "diffusers",
        lambda state: state.update(use_ema_warmup=True, update_after_step=0, power=-1.0),
        "power",
    ),
    (
        "diffusers",
        lambda state: state.update(use_ema_warmup=True, update_after_step=-1),
        "update_after_step.*at least 0",
    ),
    ("diffusers", lambda state: state.update(gamma=1.0), "keys of fused_opt, torch_ema"),
    ("averaged_model", lambda state: state.update(other=torch.zeros(1)), "'module.'.*'other'"),
]


@pytest.mark.parametrize(("layout", "damage", "message"), DAMAGES)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(layout, damage, message):
    model = Net()
    ema = EMA(model, 0.75, update_after_step=1)
    kept = ema.state_dict()
    tensors = [*tensors_in(kept["averages"]), *tensors_in(kept["buffers"]), *model.parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    state = good(layout)
    damage(state)
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    for tensor, then in zip(tensors, before, strict=True):
        assert_same_bits(tensor.detach(), then)
    assert (ema.decay, ema.num_steps, ema._progress) == (0.75, 0, (0, 1, 1))


def test_untracked_parameters_and_buffers_of_a_module_are_passed_over_and_exported_as_they_are():
    model, averaged = Net(), Net(seed=5)
    train(averaged, 1)
    ema = EMA(model, 0.5, buffers="ignore", filter=lambda name, param: "low" not in name)
    ema.load_state_dict(timm_states(averaged)["alone"])
    state = ema.export_state_dict("timm")
    for name, tensor in model.state_dict().items():
        is_untracked = "low" in name or "running" in name or "num_batches" in name
        expected = tensor if is_untracked else averaged.state_dict()[name]
        assert_same_bits(state[f"module.{name}"], expected)
    names = ["embed.weight", "norm.weight", "norm.bias", "frozen.weight", "frozen.bias"]
    listed = ema.export_state_dict("diffusers")["shadow_params"]
    for name, tensor in zip(names, listed, strict=True):
        assert_same_bits(tensor, averaged.state_dict()[name])


@pytest.mark.parametrize("layout", ["torch_ema", "timm"])
def test_buffers_that_a_state_lacks_are_the_models(layout):
    model = Net()
    ema = EMA(model, 0.5)
    state = ema.export_state_dict(layout)
    train(model, 1)
    model.cache.fill_(4.0)
    ema.load_state_dict(state)
    buffers = ema.state_dict()["buffers"]
    assert_same_bits(buffers["cache"], model.cache)
    counter = 1 if layout == "torch_ema" else 0
    assert buffers["norm.num_batches_tracked"].item() == counter


def test_what_a_module_saves_beside_tensors_is_passed_over():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return torch.tensor([1.0, 2.0])

        def set_extra_state(self, state):
            pass

    model = Extra(2, 2)
    theirs = AveragedModel(model)
    ema = EMA(model)
    ema.load_state_dict(theirs.state_dict())
    assert "module._extra_state" not in ema.export_state_dict("averaged_model")


def test_storage_ties_that_parameters_tells_apart_take_a_place_each_in_lists():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    theirs = TorchEma(model)
    theirs.update(model)
    ema = EMA(model)
    state = theirs.state()
    ema.load_state_dict(state)
    assert_same_state(ema.export_state_dict("torch_ema"), state)
    assert len(state["shadow_params"]) == 2
    state["shadow_params"][1] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"ties the weights of '0.weight'"):
        ema.load_state_dict(state)


def test_a_list_of_parameters_has_the_order_of_the_list():
    model = nn.ParameterList([torch.randn(2), torch.randn(3)])
    state = TorchEma(model).state()
    ema = EMA(list(model.parameters()))
    ema.load_state_dict(state)
    assert_same_state(ema.export_state_dict("torch_ema"), state)


# --- what the constructor says beside a state -----------------------------------------------------


@pytest.mark.parametrize("updates", [0, 1, 5])
@pytest.mark.parametrize("equal", [False, True])
def test_averaged_models_first_update_copies_and_no_later_one(updates, equal):
    rule = schedules.equal() if equal else 0.9
    average = get_swa_multi_avg_fn() if equal else get_ema_multi_avg_fn(0.9)
    model = nn.Linear(1, 1, bias=False).double()
    theirs = AveragedModel(model, multi_avg_fn=average)
    for step in range(updates):
        model.weight.data.fill_(1.0 + step)
        theirs.update_parameters(model)
    ours = EMA(model, rule, update_after_step=100)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for step in range(3):
        model.weight.data.fill_(50.0 + step)
        theirs.update_parameters(model)
        ours.update()
        torch.testing.assert_close(ours.shadows["weight"], theirs.module.weight.data)


def test_a_partial_state_of_diffusers_keeps_the_constructors_start():
    ema = EMA([torch.zeros(1)], schedules.power_function(0.1), update_after_step=50)
    ema.load_state_dict({"optimization_step": 10, "decay": 0.99})
    assert ema.state_dict()["update_after_step"] == 50
