"""The callbacks, with the real Trainer: when they update, what they swap, and what they save."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import assert_same_bits, random_tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fused_opt
from fused_opt import SGD, TargetNetwork, schedules

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    WeightAveraging,
)

from fused_opt.lightning import EMACallback, TargetNetworkCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::DeprecationWarning")

BATCHES = 6  # of an epoch
DECAY = 0.9
Optimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "fused_opt": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "torch": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def carrying_another(params: Any) -> SGD:
    """An optimizer in which the callback's average cannot ride."""
    params = list(params)
    return SGD(params, lr=0.1, momentum=0.9, ema=fused_opt.EMA(params))


class Module(lightning.LightningModule):
    """A small network with BatchNorm, tied weights, and a record of what it was run with."""

    def __init__(self, optimizer: Optimizer = OPTIMIZERS["fused_opt"], fails_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        )
        self.net[3].weight = self.net[2].weight
        self.optimizer = optimizer
        self.fails_at = fails_at
        self.weights: list[dict[str, Tensor]] = []  # after each batch
        self.evaluated: list[dict[str, Tensor]] = []  # in each validation and test

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(weights_of(self))

    def validation_step(self, batch: Tensor) -> None:
        if len(self.weights) == self.fails_at:
            raise KeyError("validation fails")
        self.evaluated.append(weights_of(self))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.net.parameters())

    def train_dataloader(self) -> DataLoader[Tensor]:
        batches = [random_tensor((8, 4), torch.float32, seed=i) for i in range(BATCHES)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([torch.ones(2, 4)], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: t.detach().clone() for name, t in state.items() if isinstance(t, Tensor)}


def make_trainer(tmp_path: Path, *callbacks: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": False}
    return lightning.Trainer(
        **{**defaults, **options},
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(tmp_path: Path, module: Module, *callbacks: Any, ckpt: Any = None, **options: Any) -> Any:
    trainer = make_trainer(tmp_path, *callbacks, **options)
    trainer.fit(module, ckpt_path=ckpt, weights_only=False)
    return trainer


def expected_average(start: dict[str, Tensor], steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The parameters averaged in fp64 and the buffers as they are at last."""
    average = {name: t.double() for name, t in start.items()}
    for weights in steps:
        for name in average:
            if "running" in name or "num_batches" in name:
                average[name] = weights[name].double()
            else:
                average[name] += (1 - DECAY) * (weights[name].double() - average[name])
    return average


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        if isinstance(tensor, Tensor):
            assert_same_bits(tensor, expected[name], name)
        else:
            assert tensor == expected[name]


# --- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_averages_once_after_each_step_of_the_optimizer(tmp_path, optimizer, accumulated):
    module, callback = Module(OPTIMIZERS[optimizer]), EMACallback(decay=DECAY)
    start = weights_of(module)
    fit(tmp_path, module, callback, accumulate_grad_batches=accumulated)
    after_steps = module.weights[accumulated - 1 :: accumulated]
    assert callback.ema.num_steps == len(after_steps) == BATCHES // accumulated
    assert_near(weights_of(module), expected_average(start, after_steps))


def test_it_rides_in_the_optimizer_during_training_only(tmp_path):
    class Watcher(lightning.Callback):
        riding: Any = None

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.riding = trainer.optimizers[0].ema

    callback, watcher = EMACallback(decay=DECAY), Watcher()
    fit(tmp_path, Module(), callback, watcher)
    assert watcher.riding is callback.ema
    assert callback.ema.optimizer is None


def test_riding_or_not_gives_the_same_bits(tmp_path):
    found = []
    for optimizer in (OPTIMIZERS["fused_opt"], carrying_another):
        module = Module(optimizer)
        fit(tmp_path, module, EMACallback(decay=DECAY), max_epochs=2)
        found.append(weights_of(module))
    assert_same(*found)


class TwoOptimizers(Module):
    """Optimizes by hand, one half of the network every time and the other every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [OPTIMIZERS["fused_opt"](layer.parameters()) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.net(batch).square().mean().backward()
        for optimizer, every in zip(self.optimizers(), (2, 4), strict=True):
            if batch_idx % every == 0:
                optimizer.step()
                optimizer.zero_grad()


def test_several_optimizers_count_once_per_batch_in_which_any_steps(tmp_path):
    module, callback = TwoOptimizers(), EMACallback(decay=DECAY)
    start = weights_of(module)
    fit(tmp_path, module, callback)
    assert callback.ema.num_steps == 3
    assert_near(
        {n: t for n, t in weights_of(module).items() if "net.1" not in n},
        {n: t for n, t in expected_average(start, module.weights[::2]).items() if "net.1" not in n},
    )


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS.values(), carrying_another])
def test_steps_that_a_grad_scaler_skips_do_not_count(tmp_path, optimizer):
    class Overflowing(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
            loss = super().training_step(batch)
            return loss * float("inf") if batch_idx % 2 else loss

    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    module, callback = Overflowing(optimizer), EMACallback(decay=DECAY)
    start = weights_of(module)
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler
    trainer = fit(tmp_path, module, callback, plugins=[plugin])
    assert trainer.global_step == BATCHES
    assert callback.ema.num_steps == BATCHES // 2
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    expected = expected_average(start, module.weights[::2])
    found = weights_of(module)
    assert_near({n: found[n] for n in parameters}, {n: expected[n] for n in parameters})


def test_options_reach_the_average(tmp_path):
    callback = EMACallback(schedules.tf_warmup(0.99), update_every=2, buffers="ignore")
    fit(tmp_path, Module(), callback)
    assert callback.ema.decay == schedules.tf_warmup(0.99)
    assert (callback.ema.num_steps, callback.ema.num_updates) == (BATCHES, BATCHES // 2)
    assert "net.1.running_mean" not in callback.ema.state_dict()["buffers"]


# --- swapping ------------------------------------------------------------------------------------


def test_validation_sees_the_averages_and_training_goes_on_with_the_weights(tmp_path):
    module, plain = Module(), Module()
    start = weights_of(module)
    fit(tmp_path, module, EMACallback(decay=DECAY), val_check_interval=2)
    fit(tmp_path, plain, val_check_interval=2)
    assert len(module.evaluated) == 1 + BATCHES // 2  # once before training, for a check
    assert_same(module.evaluated[0], start)
    for i, evaluated in enumerate(module.evaluated[1:], start=1):
        assert_near(evaluated, expected_average(start, module.weights[: 2 * i]))
    for found, expected in zip(module.weights, plain.weights, strict=True):
        assert_same(found, expected)


def test_the_averages_stay_after_training_and_are_tested(tmp_path):
    module = Module()
    start = weights_of(module)
    trainer = fit(tmp_path, module, EMACallback(decay=DECAY))
    expected = expected_average(start, module.weights)
    assert_near(weights_of(module), expected)
    for evaluate in (trainer.test, trainer.validate):
        evaluate(module, verbose=False)
        assert_near(module.evaluated[-1], expected)
        assert_near(weights_of(module), expected)


def test_a_checkpoint_that_is_tested_has_its_own_averages(tmp_path):
    module = Module()
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    callback = EMACallback(decay=DECAY)
    start = weights_of(module)
    trainer = fit(tmp_path, module, callback, checkpoints, enable_checkpointing=True)
    first = min(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    trainer.test(module, ckpt_path=first, verbose=False, weights_only=False)
    expected = expected_average(start, module.weights[:2])
    assert_near(module.evaluated[-1], expected)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert_near(torch.load(tmp_path / "later.ckpt", weights_only=False)["state_dict"], expected)
    fresh = Module()
    make_trainer(tmp_path, EMACallback()).test(fresh, ckpt_path=first, weights_only=False)
    assert_near(fresh.evaluated[-1], expected)


def test_buffers_that_change_in_validation_are_put_back(tmp_path):
    class Changing(Module):
        def validation_step(self, batch: Tensor) -> None:
            self.net[1].running_mean.fill_(5.0)

    module, plain = Changing(), Module()
    fit(tmp_path, module, EMACallback(decay=DECAY), val_check_interval=2)
    fit(tmp_path, plain)
    assert_same(module.weights[-1], plain.weights[-1])


def test_an_interrupted_validation_gives_the_weights_back(tmp_path):
    module = Module(fails_at=4)
    trainer = make_trainer(tmp_path, EMACallback(decay=DECAY), val_check_interval=2)
    with pytest.raises(KeyError, match="validation fails"):
        trainer.fit(module)
    assert_same(weights_of(module), module.weights[3])
    assert trainer.optimizers[0].ema is None


def test_an_error_after_another_training_is_not_hidden(tmp_path):
    class Failing(Module):
        def training_step(self, batch: Tensor) -> Tensor:
            raise KeyError("training fails")

    callback = EMACallback(decay=DECAY)
    fit(tmp_path, Module(), callback)
    with pytest.raises(KeyError, match="training fails"):
        fit(tmp_path, Failing(), callback, num_sanity_val_steps=0)


class FailingToTest(Module):
    def on_test_start(self) -> None:
        raise KeyError("the test fails")

    def on_fit_end(self) -> None:
        if self.fails_at == 0:
            raise KeyError("the end fails")


@pytest.mark.parametrize("other", [False, True])
def test_an_error_after_training_leaves_the_averages(tmp_path, other):
    module, callback = Module(), EMACallback(decay=DECAY)
    trainer = fit(tmp_path, module, callback)
    averages = weights_of(module)
    failing = FailingToTest()
    if not other:
        failing, module.on_test_start = module, failing.on_test_start  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="the test fails"):
        trainer.test(failing, verbose=False)
    assert_same(weights_of(module), averages)


def test_an_error_when_all_has_ended_leaves_the_averages(tmp_path):
    module = FailingToTest(fails_at=0)
    start = weights_of(module)
    with pytest.raises(KeyError, match="the end fails"):
        fit(tmp_path, module, EMACallback(decay=DECAY), num_sanity_val_steps=0)
    assert_near(weights_of(module), expected_average(start, module.weights))


@pytest.mark.parametrize("nothing", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_training_that_has_nothing_to_do_ends_too(tmp_path, nothing):
    module, callback = WithTarget(), EMACallback(decay=DECAY)
    for callbacks in ([callback], [TargetNetworkCallback()]):
        trainer = fit(tmp_path, module, *callbacks, **nothing)
        assert all(optimizer.ema is None for optimizer in trainer.optimizers)
    assert callback.ema.optimizer is None
    assert module.target.ema.optimizer is None


def test_training_that_had_ended_before_it_was_resumed_has_the_averages(tmp_path):
    whole, again = Module(), Module()
    fit(tmp_path, whole, EMACallback(decay=DECAY)).save_checkpoint(tmp_path / "end.ckpt")
    trainer = fit(tmp_path, again, EMACallback(decay=DECAY), ckpt=tmp_path / "end.ckpt")
    assert again.weights == []
    assert_same(weights_of(again), weights_of(whole))
    assert trainer.optimizers[0].ema is None
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    first, second = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("end", "again")
    )
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert_same(second[key], first[key])


def test_a_second_training_starts_from_what_the_module_holds(tmp_path):
    module, callback = Module(), EMACallback(decay=1.0)
    start = weights_of(module)
    trainer = fit(tmp_path, module, callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert callback.ema.num_steps == BATCHES
    for name, _ in module.named_parameters():
        assert_same_bits(weights_of(module)[name], start[name])


# --- checkpoints ---------------------------------------------------------------------------------


def saved(tmp_path: Path, module: Module, callback: Any, **options: Any) -> tuple[Path, Any]:
    """Trains, and returns the file that is saved after the first epoch, and what is in it."""
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, module, callback, checkpoints, enable_checkpointing=True, **options)
    path = tmp_path / "epoch=0.ckpt"
    return path, torch.load(path, weights_only=False)


def test_checkpoints_are_laid_out_as_lightnings_own(tmp_path):
    module, theirs = Module(), Module()
    start = weights_of(module)
    _, ours = saved(tmp_path / "ours", module, EMACallback(decay=DECAY))
    _, own = saved(tmp_path / "theirs", theirs, EMAWeightAveraging(decay=DECAY))
    added = {"current_model_state", "averaging_state"}
    assert added <= set(ours)
    assert set(ours) == set(own)
    assert_near(ours["state_dict"], expected_average(start, module.weights[:BATCHES]))
    assert_same(ours["current_model_state"], module.weights[BATCHES - 1])
    assert ours["averaging_state"] == own["averaging_state"]
    assert_same(ours["averaging_state"], {"n_averaged": torch.tensor(BATCHES)})
    for key in ("state_dict", "current_model_state"):
        assert list(ours[key]) == list(own[key])
        assert [t.dtype for t in ours[key].values()] == [t.dtype for t in own[key].values()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("update_every", [1, 4])
def test_training_resumes_exactly(tmp_path, optimizer, update_every):
    def callback() -> Any:
        return EMACallback(schedules.tf_warmup(0.99), update_every=update_every)

    whole, part = Module(OPTIMIZERS[optimizer]), Module(OPTIMIZERS[optimizer])
    path, _ = saved(tmp_path, whole, callback(), max_epochs=2)
    resumed = callback()
    fit(tmp_path, part, resumed, max_epochs=2, ckpt=path)
    assert resumed.ema.num_steps == 2 * BATCHES
    assert_same(weights_of(part), weights_of(whole))
    assert_same(part.weights[-1], whole.weights[-1])


def test_buffers_of_the_last_update_are_saved_and_resumed(tmp_path):
    """Of 6 steps the first and the fifth are due."""

    class Resumed(Module):
        def on_train_start(self) -> None:
            self.buffers_then = {
                n: t.clone() for n, t in callback.ema.state_dict()["buffers"].items()
            }

    module, part = Module(), Resumed()
    path, checkpoint = saved(tmp_path, module, EMACallback(update_every=4))
    buffers = {name: module.weights[4][name] for name, _ in module.named_buffers()}
    assert_same({name: checkpoint["state_dict"][name] for name in buffers}, buffers)
    assert_same(checkpoint["current_model_state"], module.weights[5])
    callback = EMACallback(update_every=4)
    fit(tmp_path, part, callback, max_epochs=2, ckpt=path)
    assert_same(part.buffers_then, buffers)


def test_a_callback_that_has_been_used_resumes_too(tmp_path):
    whole, part, callback = Module(), Module(), EMACallback(decay=DECAY)
    path, _ = saved(tmp_path, whole, callback, max_epochs=2)
    fit(tmp_path, part, callback, max_epochs=2, ckpt=path)
    assert callback.ema.num_steps == 2 * BATCHES
    assert_same(weights_of(part), weights_of(whole))


def test_the_tuner_goes_back_to_where_it_began(tmp_path):
    """It saves a checkpoint, trains for a while with changing rates, and loads that again."""

    class Tuning(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "began.ckpt")
            with torch.no_grad():
                pl_module.net[0].weight.add_(1.0)
                callback.ema.shadows["net.0.weight"].add_(1.0)
            trainer._checkpoint_connector.restore(tmp_path / "began.ckpt", weights_only=False)

    module, plain, callback = Module(), Module(), EMACallback(decay=DECAY)
    fit(tmp_path, module, callback, Tuning())
    fit(tmp_path, plain, EMACallback(decay=DECAY))
    assert_same(weights_of(module), weights_of(plain))


def test_a_checkpoint_from_after_training_resumes_exactly(tmp_path):
    whole, first, second = Module(), Module(), Module()
    fit(tmp_path, whole, EMACallback(decay=DECAY), max_epochs=2)
    trainer = fit(tmp_path, first, EMACallback(decay=DECAY))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    end = torch.load(tmp_path / "end.ckpt", weights_only=False)
    assert_same(end["current_model_state"], first.weights[-1])
    assert_same(end["state_dict"], weights_of(first))
    fit(tmp_path, second, EMACallback(decay=DECAY), max_epochs=2, ckpt=tmp_path / "end.ckpt")
    assert_same(weights_of(second), weights_of(whole))


def test_a_checkpoint_from_within_validation_has_both_sets(tmp_path):
    class Saving(Module):
        def validation_step(self, batch: Tensor) -> None:
            super().validation_step(batch)
            self.trainer.save_checkpoint(tmp_path / "validating.ckpt")

    module = Saving()
    fit(tmp_path, module, EMACallback(decay=DECAY))
    checkpoint = torch.load(tmp_path / "validating.ckpt", weights_only=False)
    assert_same(checkpoint["state_dict"], module.evaluated[-1])
    assert_same(checkpoint["current_model_state"], module.weights[-1])


def test_a_checkpoint_of_another_module_has_its_own_weights(tmp_path):
    module, other = Module(), Module()
    trainer = fit(tmp_path, module, EMACallback(decay=DECAY))
    trainer.test(other, verbose=False)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    checkpoint = torch.load(tmp_path / "other.ckpt", weights_only=False)
    assert_same(checkpoint["state_dict"], weights_of(other))
    assert "current_model_state" not in checkpoint


@pytest.mark.parametrize("replaced", [False, True])
def test_a_checkpoint_of_a_module_with_new_weights_has_them(tmp_path, replaced):
    module = Module()
    trainer = fit(tmp_path, module, EMACallback(decay=DECAY))
    if replaced:
        module.net = Module().net
    else:
        module.load_state_dict(Module().state_dict())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=False)
    assert_same(checkpoint["state_dict"], weights_of(Module()))
    assert "current_model_state" not in checkpoint


@pytest.mark.parametrize("value", [5.0, float("nan")])
def test_buffers_that_change_after_training_are_saved_as_they_are(tmp_path, value):
    module = Module()
    trainer = fit(tmp_path, module, EMACallback(decay=DECAY))
    module.net[1].running_mean.fill_(value)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    checkpoint = torch.load(tmp_path / "later.ckpt", weights_only=False)
    assert_same(checkpoint["state_dict"], weights_of(module))
    assert_same(checkpoint["current_model_state"], module.weights[-1])


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_that_lack_the_averages_are_warned_of(tmp_path, weights_only):
    checkpoints = ModelCheckpoint(tmp_path, save_weights_only=weights_only)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Module(), EMACallback(), checkpoints, enable_checkpointing=True)
    messages = [str(warning.message) for warning in caught]
    assert sum("save_weights_only=True" in message for message in messages) == weights_only


def test_averages_of_a_half_precision_module_are_saved_and_resumed_in_float32(tmp_path):
    def trained(module: Module, callback: Any, **options: Any) -> Any:
        return fit(tmp_path, module, callback, precision="bf16-true", **options)

    whole, first, second = (Module() for _ in range(3))
    straight, resumed = EMACallback(decay=0.999), EMACallback(decay=0.999)
    trained(whole, straight, max_epochs=2)
    trained(first, EMACallback(decay=0.999)).save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=False)
    assert checkpoint["state_dict"]["net.0.weight"].dtype == torch.float32
    assert checkpoint["current_model_state"]["net.0.weight"].dtype == torch.bfloat16
    trained(second, resumed, max_epochs=2, ckpt=tmp_path / "half.ckpt")
    assert_same(resumed.ema.shadows, straight.ema.shadows)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("buffers", [True, False])
def test_it_averages_as_lightnings_own_and_loads_its_checkpoints(tmp_path, buffers, optimizer):
    """Theirs copies at the first step, as update_after_step=1 does."""
    module, theirs, resumed = (Module(OPTIMIZERS[optimizer]) for _ in range(3))
    options = {"update_after_step": 1, "buffers": "average" if buffers else "ignore"}
    path, _ = saved(
        tmp_path, theirs, EMAWeightAveraging(decay=DECAY, use_buffers=buffers), max_epochs=2
    )
    callback = EMACallback(decay=DECAY, **options)
    fit(tmp_path, module, callback, max_epochs=2)

    def without_counter(module: Module) -> dict[str, Tensor]:
        # They average BatchNorm's counter too, and truncate it. What is not tracked they keep as
        # it was before training, and swap in for validation.
        skipped = "num_batches" if buffers else "net.1."
        return {n: t for n, t in weights_of(module).items() if skipped not in n}

    assert_near(without_counter(module), without_counter(theirs))
    callback = EMACallback(decay=DECAY, **options)
    fit(tmp_path, resumed, callback, max_epochs=2, ckpt=path)
    assert callback.ema.num_steps == 2 * BATCHES
    assert_near(without_counter(resumed), without_counter(theirs))


def test_lightnings_own_loads_our_checkpoints(tmp_path):
    module, resumed = Module(), Module()
    path, checkpoint = saved(tmp_path, module, EMACallback(decay=DECAY))
    theirs = EMAWeightAveraging(decay=DECAY)
    trainer = make_trainer(tmp_path, theirs, max_epochs=2)
    loaded: dict[str, Any] = {}
    theirs.on_train_start = lambda *_: loaded.update(  # type: ignore[method-assign]
        average=weights_of(theirs._average_model), weights=weights_of(resumed)
    )
    trainer.fit(resumed, ckpt_path=path, weights_only=False)
    expected = {f"module.{name}": t for name, t in checkpoint["state_dict"].items()}
    assert_same(loaded["average"], {**checkpoint["averaging_state"], **expected})
    assert_same(loaded["weights"], checkpoint["current_model_state"])


def test_a_checkpoint_without_averages_starts_them(tmp_path):
    plain, module = Module(), Module()
    fit(tmp_path, plain).save_checkpoint(tmp_path / "plain.ckpt")
    callback = EMACallback(decay=1.0)
    fit(tmp_path, module, callback, max_epochs=2, ckpt=tmp_path / "plain.ckpt")
    assert callback.ema.num_steps == BATCHES
    for name, _ in module.named_parameters():
        assert_same_bits(weights_of(module)[name], plain.weights[-1][name])


def test_names_inside_a_compiled_part_are_saved_as_the_module_has_them(tmp_path):
    class Compiled(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    module, resumed = Compiled(), Compiled()
    start = weights_of(module)
    path, checkpoint = saved(tmp_path, module, EMACallback(decay=DECAY), max_epochs=2)
    assert "net._orig_mod.0.weight" in checkpoint["state_dict"]
    assert_near(checkpoint["state_dict"], expected_average(start, module.weights[:BATCHES]))
    callback = EMACallback(decay=DECAY)
    fit(tmp_path, resumed, callback, max_epochs=2, ckpt=path)
    assert callback.ema.num_steps == 2 * BATCHES
    assert_same(weights_of(resumed), weights_of(module))


def test_several_decays_are_refused():
    with pytest.raises(ValueError, match="decay: expected one"):
        EMACallback(decay=[0.9, 0.99])


def test_two_averages_of_one_module_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        make_trainer(tmp_path, EMACallback(0.9), EMACallback(0.99))


# --- target networks -----------------------------------------------------------------------------


class WithTarget(Module):
    def __init__(self, optimizer: Optimizer = OPTIMIZERS["fused_opt"]) -> None:
        super().__init__(optimizer)
        self.target = TargetNetwork(self.net, decay=DECAY)

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - self.target(batch) - batch).square().mean()


def online_weights(steps: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{n[4:]: t for n, t in step.items() if n.startswith("net.")} for step in steps]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_target_moves_once_after_each_step_of_the_optimizer(tmp_path, optimizer, accumulated):
    module = WithTarget(OPTIMIZERS[optimizer])
    start = weights_of(module.net)
    fit(tmp_path, module, TargetNetworkCallback(), accumulate_grad_batches=accumulated)
    after_steps = online_weights(module.weights)[accumulated - 1 :: accumulated]
    assert module.target.ema.num_steps == BATCHES // accumulated
    assert module.target.ema.optimizer is None
    expected = {f"module.{n}": t for n, t in expected_average(start, after_steps).items()}
    found = weights_of(module.target.module)
    assert_near({f"module.{n}": t for n, t in found.items()}, expected)


def test_a_target_that_rides_in_the_modules_optimizer_is_left_there(tmp_path):
    module = WithTarget(lambda params: SGD(params, lr=0.1, ema=module.target))
    trainer = fit(tmp_path, module, TargetNetworkCallback())
    assert module.target.ema.num_steps == BATCHES
    assert trainer.optimizers[0].ema is module.target.ema


def test_a_target_rides_in_the_new_optimizer_of_a_second_training(tmp_path):
    module = WithTarget(lambda params: SGD(params, lr=0.1, ema=module.target))
    trainer = fit(tmp_path, module, TargetNetworkCallback())
    first = trainer.optimizers[0]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert first.ema is None
    assert trainer.optimizers[0].ema is module.target.ema
    assert module.target.ema.num_steps == 2 * BATCHES


def test_a_target_stays_in_an_optimizer_that_is_kept(tmp_path):
    class Keeping(TwoOptimizers):
        def __init__(self) -> None:
            super().__init__()
            self.target = TargetNetwork(self.net, decay=DECAY)
            self.kept = super().configure_optimizers()
            self.kept[1].ema = self.target

        def configure_optimizers(self) -> Any:
            return self.kept

    module = Keeping()
    for count in (2, 4):  # of the steps of the second optimizer
        fit(tmp_path, module, TargetNetworkCallback())
        assert module.target.ema.num_steps == count
        assert module.kept[1].ema is module.target.ema


def test_a_target_resumes_exactly_from_a_checkpoint(tmp_path):
    whole, part = WithTarget(), WithTarget()
    path, _ = saved(tmp_path, whole, TargetNetworkCallback(), max_epochs=2)
    fit(tmp_path, part, TargetNetworkCallback(), max_epochs=2, ckpt=path)
    assert part.target.ema.num_steps == 2 * BATCHES
    assert_same(part.state_dict(), whole.state_dict())


def test_a_target_and_an_average_of_everything_go_together(tmp_path):
    module, alone = WithTarget(), WithTarget()
    callback = EMACallback(decay=DECAY)
    fit(tmp_path, module, TargetNetworkCallback(), callback, max_epochs=2)
    fit(tmp_path, alone, TargetNetworkCallback(), max_epochs=2)
    assert callback.ema.num_steps == module.target.ema.num_steps == 2 * BATCHES
    assert_same(module.weights[-1], {**alone.weights[-1]})


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target_first", [False, True])
def test_an_average_leaves_targets_out_in_either_order(tmp_path, buffers, optimizer, target_first):
    module, alone = WithTarget(OPTIMIZERS[optimizer]), WithTarget(OPTIMIZERS[optimizer])
    callback = EMACallback(decay=DECAY, buffers=buffers)
    callbacks = [callback, TargetNetworkCallback()][:: -1 if target_first else 1]
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, module, *callbacks, checkpoints, enable_checkpointing=True)
    fit(tmp_path, alone, TargetNetworkCallback())
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    tracked = {**callback.ema.shadows, **callback.ema.state_dict()["buffers"]}
    assert not any("target" in name for name in tracked)
    found = (module.evaluated[-1], checkpoint["state_dict"], checkpoint["current_model_state"])
    for state in (weights_of(module), *found):
        for name, tensor in weights_of(alone).items():
            if name.startswith("target."):
                assert_same_bits(state[name], tensor, name)


def test_a_target_further_in_is_found_by_its_path(tmp_path):
    module = Module()
    module.critic = nn.ModuleDict({"target": TargetNetwork(module.net, decay=DECAY)})
    fit(tmp_path, module, TargetNetworkCallback("critic.target"))
    assert module.critic["target"].ema.num_steps == BATCHES


@pytest.mark.parametrize("name", ["tgt", "net"])
def test_what_is_no_target_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"TargetNetwork as '{name}'.*\['target'\]"):
        fit(tmp_path, WithTarget(), TargetNetworkCallback(name))


# --- importing -----------------------------------------------------------------------------------


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return result.stdout + result.stderr


def test_importing_fused_opt_leaves_lightning_alone():
    code = "import fused_opt, sys; print([m for m in sys.modules if 'lightning' in m])"
    assert run_python(code).strip() == "[]"


def test_without_lightning_the_import_names_the_extra():
    block = "import sys; sys.modules.update(dict.fromkeys(['lightning', 'pytorch_lightning']));"
    output = run_python(block + "import fused_opt.lightning")
    assert "ImportError: fused_opt.lightning needs PyTorch Lightning" in output
    assert "pip install 'fused_opt[lightning]'" in output


def test_pytorch_lightning_will_do():
    block = "import sys; sys.modules['lightning'] = None;"
    code = block + "from fused_opt.lightning import EMACallback as c; print(c.__mro__)"
    pytest.importorskip("pytorch_lightning")
    assert "pytorch_lightning.callbacks.callback.Callback" in run_python(code)


def test_it_is_not_lightnings_own_callback():
    assert not issubclass(EMACallback, WeightAveraging)
