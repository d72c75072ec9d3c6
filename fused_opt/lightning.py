"""Callbacks of PyTorch Lightning: an average of the weights, and target networks.

Needs ``pip install 'fused_opt[lightning]'``. They are callbacks of ``lightning``, and of
``pytorch_lightning`` where only that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_opt._decay_rules import DecayRule
from fused_opt._ema_names import Names, named, named_as
from fused_opt.ema import EMA
from fused_opt.sgd import SGD
from fused_opt.target_network import TargetNetwork

try:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
        from lightning.pytorch.utilities import rank_zero_warn
    except ModuleNotFoundError:
        from pytorch_lightning import (  # type: ignore[assignment]
            Callback,
            LightningModule,
            Trainer,
        )
        from pytorch_lightning.utilities import rank_zero_warn
except ImportError as error:
    raise ImportError(
        "fused_opt.lightning needs PyTorch Lightning: pip install 'fused_opt[lightning]'"
    ) from error


class _AveragingCallback(Callback):
    """Updates an EMA once per step of the optimizer.

    Where one :class:`fused_opt.SGD` takes all steps, the EMA rides in it, unless another does.
    Otherwise it is updated when a training batch ends in which an optimizer has stepped.
    """

    def __init__(self) -> None:
        self._ema: EMA | None = None
        self._has_stepped = False
        self._leave: list[Callable[[], None]] = []

    def _follow(self, ema: EMA, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ema, self._has_stepped = ema, False
        optimizers = trainer.optimizers
        if any(optimizer is ema.optimizer for optimizer in optimizers):
            return
        first = optimizers[0] if len(optimizers) == 1 else None
        if isinstance(first, SGD) and first.ema is None and pl_module.automatic_optimization:
            first.ema = ema
            self._leave = [partial(setattr, first, "ema", None)]
            return
        # trainer.global_step would also count the steps that a GradScaler has skipped.
        self._leave = [
            optimizer.register_step_post_hook(self._note_step).remove for optimizer in optimizers
        ]

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Under a GradScaler, which says so here, optimizers that support it skip steps themselves.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or float(found_inf) == 0:
            self._has_stepped = True

    def on_train_batch_end(self, *_: Any) -> None:
        """Updates the average, if an optimizer has stepped."""
        if self._has_stepped and self._ema is not None:
            self._has_stepped = False
            self._ema.update()

    def _leave_optimizers(self) -> None:
        for leave in self._leave:
            leave()
        self._leave = []

    def on_train_end(self, *_: Any) -> None:
        """Leaves the optimizers."""
        self._leave_optimizers()

    def on_fit_end(self, *_: Any) -> None:
        """Does so where there was nothing to train on, and training neither began nor ended."""
        self.on_train_end()

    def on_exception(self, *_: Any) -> None:
        """Leaves the optimizers."""
        self._leave_optimizers()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Leaves the optimizers also where Lightning's tuner has stopped before training."""
        self._leave_optimizers()


class TargetNetworkCallback(_AveragingCallback):
    """Updates a :class:`fused_opt.TargetNetwork` of the module, once per step of the optimizer.

    Where one ``fused_opt.SGD`` takes all steps, the target is updated inside its pass. With several
    optimizers, or by hand, it is once per training batch in which any of them has stepped; steps
    that a ``GradScaler`` skips do not count. The target's weights and counters are in the module's
    ``state_dict``, and so in every checkpoint.

    Args:
        name: the module's attribute that holds the target; "critic.target" names one further in.

    Raises:
        ValueError: when training starts, if there is no target network of that name.

    Example:
        >>> from fused_opt.lightning import TargetNetworkCallback
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=TargetNetworkCallback("target"), logger=False)
    """

    def __init__(self, name: str = "target") -> None:
        super().__init__()
        self._name = name
        self._old_home: SGD | None = None  # whose steps moved the target before this fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Frees the target for the optimizer that ``configure_optimizers`` makes for this fit."""
        target = self._find(pl_module)
        self._old_home = None
        if stage == "fit" and target is not None and target.ema.optimizer is not None:
            self._old_home = target.ema.optimizer
            self._old_home.ema = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the target."""
        target, home = self._find(pl_module), self._old_home
        self._old_home = None
        if target is None:
            found = [n for n, m in pl_module.named_modules() if isinstance(m, TargetNetwork)]
            raise ValueError(
                f"TargetNetworkCallback: expected a TargetNetwork as {self._name!r} of the "
                f"{type(pl_module).__name__}, which has {found}"
            )
        is_free = target.ema.optimizer is None
        if is_free and home is not None and home.ema is None and home in trainer.optimizers:
            home.ema = target  # configure_optimizers has made none, but returned this one again
        self._follow(target.ema, trainer, pl_module)

    def _find(self, pl_module: LightningModule) -> TargetNetwork | None:
        found = dict(pl_module.named_modules()).get(self._name)
        return found if isinstance(found, TargetNetwork) else None


class _ModuleEMA(EMA):
    """Leaves out the target networks of a module, which are averages themselves."""

    def _tracked(self, found: Names) -> Names:
        tracked, names = super()._tracked(found), named(self._source)
        modules = self._source.modules() if isinstance(self._source, nn.Module) else ()
        targets = [module for module in modules if isinstance(module, TargetNetwork)]
        own = {id(t) for target in targets for t in (*target.parameters(), *target.buffers())}
        left_out = {name for name, tensor in names.tensors.items() if id(tensor) in own}
        return tracked._replace(
            params={name: p for name, p in tracked.params.items() if name not in left_out},
            buffers={name: b for name, b in tracked.buffers.items() if name not in left_out},
        )


class EMACallback(_AveragingCallback):
    """Averages the weights of the module, and validates, tests and saves the averages.

    The average is updated once per step of the optimizer: after it, however many batches it has
    accumulated, and inside its pass where one ``fused_opt.SGD`` takes all steps. With several
    optimizers, or by hand, it is once per training batch in which any of them has stepped. Steps
    that a ``GradScaler`` skips do not count.

    While the module is validated it holds the averages, and once training has ended it keeps them,
    so that it is tested with them too. Buffers that change while it is validated are then put back
    with the weights. A :class:`fused_opt.TargetNetwork` in the module is an average itself: it is
    not averaged again, but validated and saved as it is.

    Checkpoints are laid out as those of Lightning's own
    ``WeightAveraging``: ``state_dict`` has the averages, ``current_model_state`` the weights, and
    ``averaging_state`` the number of updates; either callback loads the other's. Training that is
    resumed from one goes on as if it had not stopped, also from one saved after the end.

    Checkpoints that are saved with ``save_weights_only`` hold the module as it is, during training
    without the averages, which callbacks cannot change; there is a warning of it. So do those of
    another module, or of one that has been given other weights after training. Strategies that
    shard the module are not supported.

    Args:
        decay: as of :class:`fused_opt.EMA`, for one average.
        ema_options: further options of :class:`fused_opt.EMA`. ``update_after_step=1`` starts from
            the weights after the first step, as ``WeightAveraging`` does, instead of those before.

    Raises:
        ValueError: several decays; and when training starts, as :class:`fused_opt.EMA` does.

    Example:
        >>> from fused_opt.lightning import EMACallback
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=EMACallback(decay=0.9999), logger=False)
    """

    def __init__(self, decay: DecayRule = 0.999, **ema_options: Any) -> None:
        super().__init__()
        if isinstance(decay, (list, tuple)):
            raise ValueError(
                f"decay: expected one, since a checkpoint has one average, got {decay}"
            )
        self._options: dict[str, Any] = {"decay": decay, **ema_options}
        self._is_validating = False  # with the averages in the place of the weights
        self._is_over = False  # the training, with the averages left there
        self._checkpoint: dict[str, Any] | None = None  # to resume from, once there is an EMA

    @property
    def ema(self) -> EMA | None:
        """The average, from the start of training on."""
        return self._ema

    # --- training and validation ------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the last training, and warns of checkpoints that will lack the averages."""
        if stage == "fit":
            _warn_of_weights_only(trainer)
            self._ema, self._checkpoint = None, None
            self._is_validating = self._is_over = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the weights as they are, where they are; or from a checkpoint."""
        ema = _ModuleEMA(pl_module, **self._options)
        self._resume(ema, pl_module)
        self._follow(ema, trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Puts the averages in the place of the weights."""
        if self._ema is not None and trainer.state.fn == "fit":
            self._ema.apply_shadow()
            self._is_validating = True

    def on_validation_end(self, *_: Any) -> None:
        """Puts the weights back."""
        if self._ema is not None and self._is_validating:
            self._ema.restore()
            self._is_validating = False

    def on_train_end(self, *_: Any) -> None:
        """Leaves the averages in the place of the weights, and keeps these for checkpoints."""
        super().on_train_end()
        if self._ema is not None and not self._is_over:
            self._ema.apply_shadow()
            self._is_over = True

    def on_exception(self, *_: Any) -> None:
        """Puts the weights back if validation was interrupted."""
        super().on_exception()
        self.on_validation_end()

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The EMA's counter, which also counts the steps that ``update_every`` passes over."""
        return {} if self._ema is None else {"num_steps": self._ema.num_steps}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the averages as the module's state, and the weights beside them."""
        averages = {} if self._ema is None else _averages_of(self._ema, pl_module)
        if self._ema is None or not averages.keys() >= self._ema._kept.names.params.keys():
            return  # it has other weights than this has averaged
        state, module_state = self._ema.state_dict(), checkpoint["state_dict"]
        weights = state.get("weights", {})  # kept aside while the averages are in their place
        num_averaged = -(-state["num_steps"] // state["update_every"])
        checkpoint["state_dict"] = _with_tensors(module_state, averages, pl_module)
        checkpoint["current_model_state"] = _with_tensors(module_state, weights, pl_module)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(num_averaged)}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Loads the weights; what the module has loaded as its state are the averages."""
        if trainer.state.fn != "fit":
            self._ema = None  # of another training than what the module holds now
            return
        if "current_model_state" not in checkpoint:
            return  # saved without averages: they start from its weights
        weights = checkpoint["current_model_state"]
        pl_module.load_state_dict(weights, strict=pl_module.strict_loading)
        self._checkpoint = checkpoint
        if self._ema is not None:  # Lightning's tuner goes back to where it began
            self._resume(self._ema, pl_module)

    def _resume(self, ema: EMA, pl_module: LightningModule) -> None:
        """Loads the averages and how many steps were taken, once there is an EMA."""
        if self._checkpoint is None:
            return
        checkpoint, self._checkpoint = self._checkpoint, None
        state = ema.state_dict()
        averages = _named_tensors(checkpoint["state_dict"], pl_module)
        for tensors in (*state["averages"], state["buffers"]):
            tensors.update((name, averages[name]) for name in tensors if name in averages)
        num_averaged = int(checkpoint["averaging_state"]["n_averaged"])
        state["num_steps"] = num_averaged * state["update_every"]
        state.update(checkpoint["callbacks"].get(self.state_key, {}))
        ema.load_state_dict(state)


def _warn_of_weights_only(trainer: Trainer) -> None:
    if any(getattr(saver, "save_weights_only", False) for saver in trainer.checkpoint_callbacks):
        rank_zero_warn(
            "EMACallback: a checkpoint callback has save_weights_only=True; what it saves during "
            "training are the weights, not their averages, as Lightning then asks no callback"
        )


def _averages_of(ema: EMA, module: nn.Module) -> dict[str, Tensor]:
    """The averages of a module's tensors; while they are applied, of those that still hold them."""
    averages, now = ema._kept.everything(0), named(module).tensors
    if ema._source is not module:
        return {}
    if ema._applied is None:
        return averages
    return {name: t for name, t in averages.items() if name in now and _holds(now[name], t)}


@torch.no_grad()
def _holds(weight: Tensor, average: Tensor) -> bool:
    if weight.shape != average.shape:
        return False
    return torch.allclose(weight, average.to(weight), rtol=0, atol=0, equal_nan=True)


def _named_tensors(state_dict: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A module's state dict by the names under which an EMA knows its tensors."""
    names = named(module)
    found = named_as(state_dict, names.layout)
    return {names.first(name): value for name, value in found.items()}


def _with_tensors(
    state_dict: Mapping[str, Any], tensors: Mapping[str, Tensor], module: nn.Module
) -> dict[str, Any]:
    """A module's state dict with tensors in the place of others, by the names of an EMA."""
    names = named(module)
    keys = named_as({key: key for key in state_dict}, names.layout)
    replaced = {key: tensors.get(names.first(name)) for name, key in keys.items()}
    return {
        key: value if replaced[key] is None else replaced[key] for key, value in state_dict.items()
    }
