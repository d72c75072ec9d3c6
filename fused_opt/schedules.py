"""Decays and learning rates that depend on how many updates there were.

A schedule is called with k, the number of updates done before this one, 0 at first. The equations
are evaluated in fp64 by native code, the same on the host and on a GPU that alone knows k.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from enum import IntEnum
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fused_opt._native import native
from fused_opt.post_hoc import sigma_rel_to_gamma

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.optim import Optimizer

__all__ = [
    "CosineWarmup",
    "Schedule",
    "constant",
    "cosine",
    "equal",
    "exponential_ramp",
    "half_life",
    "inverse_power",
    "plot",
    "power_function",
    "tf_warmup",
    "zero_debias",
]

_Plottable = Callable[[int], float]


class _Kind(IntEnum):
    """In the order of ``ScheduleKind`` in csrc/rules/schedule.h."""

    CONSTANT = 0
    TF_WARMUP = 1
    INVERSE_POWER = 2
    EXPONENTIAL_RAMP = 3
    EQUAL = 4
    POWER_FUNCTION = 5
    ZERO_DEBIAS = 6
    COSINE = 7
    COSINE_WARMUP = 8


@dataclass(frozen=True)
class Schedule(ABC):
    """What every schedule of this module can do. Schedules never change, and compare by value.

    Example:
        >>> from fused_opt import schedules
        >>> schedule = schedules.tf_warmup(0.999)
        >>> schedule(0), schedule(90), schedule(10**9)
        (0.1, 0.91, 0.999)
        >>> schedules.Schedule.from_dict(schedule.to_dict()) == schedule
        True
    """

    def __call__(self, k: int) -> float:
        """Returns the schedule's value for the update before which there were k.

        Raises:
            ValueError: k is no integer, or below 0.
        """
        if isinstance(k, bool) or not isinstance(k, (int, Integral)) or not 0 <= k < 2**63:
            raise ValueError(f"Invalid k: {k!r}, expected an integer in [0, 2**63)")
        kind, parameters = self._hyper
        value: float = native().evaluate_schedule(kind, parameters, int(k))
        return value

    def to_dict(self) -> dict[str, Any]:
        """Returns the schedule's name and arguments in builtin types, for checkpoints."""
        return {"schedule": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> Schedule:
        """Returns the schedule of which :meth:`to_dict` has told.

        Raises:
            ValueError: there is no schedule of that name, or its arguments are others.
        """
        arguments = dict(state)
        name = arguments.pop("schedule", None)
        kinds = {kind.__name__: kind for kind in Schedule.__subclasses__()}
        if name not in kinds:
            raise ValueError(f"state['schedule']: expected one of {sorted(kinds)}, got {name!r}")
        try:
            return kinds[name](**arguments)
        except TypeError as error:
            raise ValueError(f"state: {error}") from None

    @property
    @abstractmethod
    def _kind(self) -> _Kind:
        """Which equation it is."""

    @cached_property
    def _hyper(self) -> tuple[int, tuple[float, ...]]:
        """The kind and the parameters of the native equation."""
        return int(self._kind), self._parameters()

    def _parameters(self) -> tuple[float, ...]:
        return tuple(map(float, asdict(self).values()))

    def _check(self, name: str, interval: str) -> None:
        """Raises ValueError unless an argument is a number in an interval such as "[0, 1)"."""
        value = getattr(self, name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and _contains(interval, value)):
            raise ValueError(f"Invalid {name}: {value!r}, expected a number in {interval}")
        object.__setattr__(self, name, float(value))

    def _check_integer(self, name: str, interval: str) -> None:
        """Raises ValueError unless an argument is an integer in an interval."""
        value = getattr(self, name)
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if not (is_integer and _contains(interval, value)):
            raise ValueError(f"Invalid {name}: {value!r}, expected an integer in {interval}")
        object.__setattr__(self, name, int(value))


def _contains(interval: str, value: Any) -> bool:
    """Whether a number is in an interval, as it is written: "(" is without the end, "[" with it."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return bool(above and below)


# Schedules are called like the functions of k that they are, and so are named like functions.


@dataclass(frozen=True)
class constant(Schedule):
    """The same decay at every update.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: decay is outside that range.

    Example:
        >>> from fused_opt import schedules
        >>> schedules.constant(0.999)(10)
        0.999
    """

    decay: float
    _kind = _Kind.CONSTANT

    def __post_init__(self) -> None:
        self._check("decay", "[0, 1]")


@dataclass(frozen=True)
class tf_warmup(Schedule):
    r"""Averages over a tenth of what there was, until the decay is reached.

    .. math:: \beta_n = \max(\beta_{min}, \min(\beta, (1 + n) / (10 + n))), \quad n = k + offset

    TensorFlow's ``tf.train.ExponentialMovingAverage(decay, num_updates=n)``, where n is the number
    of updates done, and so is k. torch_ema counts the update that it is doing: ``offset=1``.
    diffusers, without ``use_ema_warmup``, copies at n = 0 and averages from n = 1 on: ``offset=1``
    after an ``update_after_step`` that is one more than its own.

    Args:
        decay: β, the highest, in [0, 1].
        min_decay: the lowest, in [0, decay].
        offset: how many updates n is ahead of k, 0 or more.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from fused_opt import schedules
        >>> schedules.tf_warmup(0.999)(0), schedules.tf_warmup(0.999)(10)
        (0.1, 0.55)
        >>> schedules.tf_warmup(0.999, offset=1)(9)
        0.55
    """

    decay: float
    min_decay: float = 0.0
    offset: int = 0
    _kind = _Kind.TF_WARMUP

    def __post_init__(self) -> None:
        self._check("decay", "[0, 1]")
        self._check("min_decay", f"[0, {self.decay}]")
        self._check_integer("offset", "[0, 1e15]")


@dataclass(frozen=True)
class inverse_power(Schedule):
    r"""Averages over a share of what there was, until the decay is reached.

    .. math:: \beta_k = \max(\beta_{min}, \min(\beta, 1 - (1 + k / \gamma)^{-power})),
        \quad \beta_0 = 0

    The warm-up of ema-pytorch, timm's ModelEmaV3 and diffusers (``use_ema_warmup``), by Katherine
    Crowson. Their ``step - update_after_step - 1``, counted with the update being done, is k; where
    it is not above 0 they copy.

    Args:
        decay: β, the highest, in [0, 1].
        gamma: γ, above 0; their ``inv_gamma``.
        power: above 0. With γ = 1, 2/3 reaches 0.999 after 31,600 updates and 0.9999 after a
            million, 3/4 after 10,000 and 215,000.
        min_decay: the lowest but for the copy, in [0, decay].

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from fused_opt import schedules
        >>> schedule = schedules.inverse_power(0.999, power=1.0)
        >>> schedule(0), schedule(1), schedule(3), schedule(10**6)
        (0.0, 0.5, 0.75, 0.999)
    """

    decay: float
    gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    _kind = _Kind.INVERSE_POWER

    def __post_init__(self) -> None:
        self._check("decay", "[0, 1]")
        self._check("gamma", "(0, inf)")
        self._check("power", "(0, inf)")
        self._check("min_decay", f"[0, {self.decay}]")


@dataclass(frozen=True)
class exponential_ramp(Schedule):
    r"""Approaches the decay exponentially.

    .. math:: \beta_n = \beta (1 - e^{-n / \tau}), \quad n = k + 1

    The ModelEMA of Ultralytics (YOLOv5 and later), whose n counts the update that it is doing.

    Args:
        decay: β, in [0, 1].
        tau: τ, the number of updates after which 63 % of it are reached, above 0.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from fused_opt import schedules
        >>> round(schedules.exponential_ramp(0.9999)(1999), 4)
        0.6321
    """

    decay: float
    tau: float = 2000.0
    _kind = _Kind.EXPONENTIAL_RAMP

    def __post_init__(self) -> None:
        self._check("decay", "[0, 1]")
        self._check("tau", "(0, inf)")


@dataclass(frozen=True)
class half_life(Schedule):
    r"""The constant decay by which a parameter's share in the average halves in a given time.

    .. math:: \beta = 2^{-interval / half\_life}

    As in StyleGAN (Karras et al., "A Style-Based Generator Architecture for Generative Adversarial
    Networks", CVPR 2019), which counts images: ``half_life(10_000, interval=batch_size)``. It is
    the same at every k.

    Args:
        half_life: above 0, in updates, or in any other unit of which ``interval`` is.
        interval: the length of one update in that unit, above 0.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from fused_opt import schedules
        >>> schedules.half_life(1)(0), schedules.half_life(512, interval=1024)(0)
        (0.5, 0.25)
    """

    half_life: float
    interval: float = 1.0
    _kind = _Kind.CONSTANT

    def __post_init__(self) -> None:
        self._check("half_life", "(0, inf)")
        self._check("interval", "(0, inf)")

    def _parameters(self) -> tuple[float, ...]:
        return (2.0 ** (-self.interval / self.half_life),)


@dataclass(frozen=True)
class equal(Schedule):
    r"""The mean of all updates, each of which counts the same; the first one copies.

    .. math:: 1 - \beta_n = 1 / (n + 1), \quad n = k

    Stochastic weight averaging (Izmailov et al., "Averaging Weights Leads to Wider Optima and
    Better Generalization", UAI 2018) as in ``torch.optim.swa_utils.AveragedModel``, whose
    ``n_averaged`` is k.

    Example:
        >>> from fused_opt import schedules
        >>> schedules.equal()(0), schedules.equal()(1), schedules.equal()(3)
        (0.0, 0.5, 0.75)
    """

    _kind = _Kind.EQUAL


@dataclass(frozen=True)
class power_function(Schedule):
    r"""Averages over the same share of what there was, however long that is.

    .. math:: \beta_t = (1 - 1/t)^{\gamma + 1}, \quad t = k + 1

    The parameters of update τ then have a weight in proportion to about τ^γ, and
    :func:`fused_opt.post_hoc.synthesize` can make averages of other widths from two. From Karras et
    al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), CVPR 2024.

    Args:
        sigma_rel: the standard deviation of these weights as a share of the training so far, in
            [1e-6, 0.3002]; :func:`fused_opt.post_hoc.sigma_rel_to_gamma` makes γ of it. The paper
            tracks 0.05 and 0.10.

    Raises:
        ValueError: sigma_rel is outside that range.

    Example:
        >>> from fused_opt import schedules
        >>> schedule = schedules.power_function(0.05)
        >>> schedule(0), round(schedule(999), 4)
        (0.0, 0.9822)
    """

    sigma_rel: float
    _kind = _Kind.POWER_FUNCTION

    def __post_init__(self) -> None:
        sigma_rel_to_gamma(self.sigma_rel)
        object.__setattr__(self, "sigma_rel", float(self.sigma_rel))

    def _parameters(self) -> tuple[float, ...]:
        return (sigma_rel_to_gamma(self.sigma_rel),)


@dataclass(frozen=True)
class zero_debias(Schedule):
    r"""The decay whose average of what there was is not biased to where it started.

    .. math:: 1 - \beta_n = (1 - \beta) / (1 - \beta^n), \quad n = k + 1

    It gives the average that starts at zero, divided by 1 − β^n, as Adam's moments (Kingma and Ba,
    "Adam: A Method for Stochastic Optimization", ICLR 2015), whose t is n, or TensorFlow's
    ``zero_debias``. The first update copies.

    Args:
        decay: β, in [0, 1).

    Raises:
        ValueError: decay is outside that range.

    Example:
        >>> from fused_opt import schedules
        >>> schedule = schedules.zero_debias(0.5)
        >>> schedule(0), round(schedule(1), 3), schedule(100)
        (0.0, 0.333, 0.5)
    """

    decay: float
    _kind = _Kind.ZERO_DEBIAS

    def __post_init__(self) -> None:
        self._check("decay", "[0, 1)")


@dataclass(frozen=True)
class cosine(Schedule):
    r"""Rises to 1 along a cosine, for the target network of a self-supervised method.

    .. math:: \beta_k = 1 - (1 - base) (\cos(\pi k / K) + 1) / 2

    and 1 from k = K on. BYOL's τ (Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020), whose k
    this is; DINO's momentum too.

    Args:
        base: the first decay, in [0, 1]; 0.996 in both.
        steps: K, the number of updates in all, 1 or more.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> from fused_opt import schedules
        >>> schedule = schedules.cosine(0.5, steps=100)
        >>> schedule(0), round(schedule(50), 3), schedule(100)
        (0.5, 0.75, 1.0)
    """

    base: float
    steps: int
    _kind = _Kind.COSINE

    def __post_init__(self) -> None:
        self._check("base", "[0, 1]")
        self._check_integer("steps", "[1, 1e15]")


@dataclass(frozen=True)
class CosineWarmup(Schedule):
    r"""A learning rate that rises linearly and then falls along a cosine.

    .. math:: \eta_k = \begin{cases}
        \eta_{begin} + (\eta_{base} - \eta_{begin}) \, k / w & k < w \\
        \eta_{final} + (\eta_{base} - \eta_{final}) (1 + \cos(\pi (k - w) / (max - w))) / 2
        & w \le k < max \\
        \eta_{final} & k \ge max \end{cases}

    with w = warmup_steps: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm
    Restarts", ICLR 2017, without restarts, after the warm-up of Goyal et al., "Accurate, Large
    Minibatch SGD", 2017. The k of both is this one. Without a warm-up it is
    ``torch.optim.lr_scheduler.CosineAnnealingLR(T_max=max_update, eta_min=final_lr)`` up to T_max.

    Args:
        max_update: the number of updates in all, warm-up included, 1 or more.
        base_lr: the highest lr, above 0.
        final_lr: the lr after ``max_update`` updates, 0 or more.
        warmup_steps: w, from 0 to ``max_update``.
        warmup_begin_lr: the lr at first where there is a warm-up, 0 or more.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from fused_opt import SGD, schedules
        >>> schedule = schedules.CosineWarmup(100, base_lr=0.5, final_lr=0.1, warmup_steps=20)
        >>> schedule(0), schedule(10), schedule(20), round(schedule(60), 3), schedule(100)
        (0.0, 0.25, 0.5, 0.3, 0.1)
        >>> optimizer = SGD(torch.nn.Linear(2, 1).parameters(), lr=0.5)
        >>> scheduler = schedule.scheduler(optimizer)
        >>> for _ in range(10):
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr()
        [0.25]
    """

    max_update: int
    base_lr: float
    final_lr: float = 0.0
    warmup_steps: int = 0
    warmup_begin_lr: float = 0.0
    _kind = _Kind.COSINE_WARMUP

    def __post_init__(self) -> None:
        self._check_integer("max_update", "[1, 1e15]")
        self._check("base_lr", "(0, inf)")
        self._check("final_lr", "[0, inf)")
        self._check_integer("warmup_steps", f"[0, {self.max_update}]")
        self._check("warmup_begin_lr", "[0, inf)")

    def scheduler(self, optimizer: Optimizer, last_epoch: int = -1) -> LRScheduler:
        """Returns a scheduler of torch that sets the lr of an optimizer.

        A param group whose lr is c times ``base_lr`` gets c times the schedule, from the next step
        of the scheduler on also one that is added later. An lr that is a
        tensor is filled in place, without waiting for its device. The scheduler's ``state_dict``
        holds this schedule too, and can be loaded with ``weights_only=True``.

        Args:
            optimizer: any of torch's.
            last_epoch: k of the last update before training goes on; -1 if it begins.

        Raises:
            KeyError: training goes on, and a param group has no ``initial_lr``.
        """
        return _CosineWarmupLR(self, optimizer, last_epoch)


class _CosineWarmupLR(LRScheduler):
    """Multiplies each group's lr at the start by the schedule relative to its ``base_lr``."""

    def __init__(self, schedule: CosineWarmup, optimizer: Optimizer, last_epoch: int) -> None:
        self.schedule = schedule
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        if not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use "
                "`get_last_lr()`.",
                UserWarning,
                stacklevel=2,
            )
        lr = self.schedule(self.last_epoch)
        # In this order: a group that starts at base_lr gets the schedule to the last bit.
        return [base_lr / self.schedule.base_lr * lr for base_lr in self._all_base_lrs()]

    def _all_base_lrs(self) -> list[float | Tensor]:
        """The lrs at the start, to which those of groups that were added since are appended."""
        groups = self.optimizer.param_groups
        for group in groups[len(self.base_lrs) :]:
            lr = group["lr"]
            lr = group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
            self.base_lrs.append(lr.clone() if isinstance(lr, Tensor) else lr)
        return self.base_lrs[: len(groups)]  # a state may know of a group that is to be added yet

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "schedule": self.schedule.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        schedule = Schedule.from_dict(state_dict.get("schedule", {}))
        if not isinstance(schedule, CosineWarmup):
            raise ValueError(f"state_dict['schedule']: expected a CosineWarmup, got {schedule}")
        super().load_state_dict({**state_dict, "schedule": schedule})


def plot(
    schedule: _Plottable | Sequence[_Plottable] | Mapping[str, _Plottable],
    steps: int,
    ax: Axes | None = None,
) -> Figure:
    """Draws schedules as a figure of matplotlib.

    Decays are drawn on a scale on which .9, .99 and .999 are equally far apart. On the right of it
    is the number of updates that they average over, 1 / (1 − decay).

    Args:
        schedule: one, or a list of several, or a dict of them by label. They may also be functions
            of k of your own, which are drawn on a linear scale.
        steps: how many updates are drawn, 1 or more.
        ax: axes to draw into, such as ``plt.gca()``, beside the curves that are there; their scale
            is that of decays only if all are. A new figure if None.

    Returns:
        The figure, for ``figure.savefig(path)``; a notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: steps is no integer above 0, or there is no schedule.

    Example:
        >>> from fused_opt import schedules
        >>> figure = schedules.plot([schedules.tf_warmup(0.999), schedules.equal()], steps=1000)
        >>> figure.axes[0].get_xlabel()
        'update k'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "schedules.plot needs matplotlib: pip install 'fused_opt[demo]'"
        ) from error
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"Invalid steps: {steps!r}, expected an integer above 0")
    curves = _labelled(schedule)
    if ax is None:
        ax = Figure(figsize=(7.2, 4.0), layout="constrained").subplots()
    is_empty = not ax.get_lines()
    updates = _spread(int(steps), _PLOTTED_POINTS)
    for label, curve in curves:
        ax.plot(updates, [curve(k) for k in updates], label=label, linewidth=2)
    ax.set_xlabel("update k")
    ax.grid(alpha=0.3)
    _scale(ax, _unit([curve for _, curve in curves]), is_empty)
    ax.legend()
    return ax.get_figure(root=True)


_PLOTTED_POINTS = 1000
_HORIZONS = "1 / (1 - decay), in updates"


def _labelled(schedule: Any) -> list[tuple[str, _Plottable]]:
    """Schedules with labels: what they are called with, or a function's name."""
    if isinstance(schedule, Mapping):
        curves = list(schedule.items())
    else:
        several = [schedule] if callable(schedule) else list(schedule)
        curves = [(_label(curve), curve) for curve in several]
    if not curves:
        raise ValueError("schedule: expected at least one, got none")
    return curves


def _label(curve: _Plottable) -> str:
    """A function's name; that of a schedule with those arguments that are not the default."""
    if not isinstance(curve, Schedule):
        return getattr(curve, "__name__", repr(curve))
    arguments = [(field, getattr(curve, field.name)) for field in fields(curve)]
    given = [
        ("" if field.default is MISSING else f"{field.name}=") + repr(value).removesuffix(".0")
        for field, value in arguments
        if value != field.default
    ]
    return f"{type(curve).__name__}({', '.join(given)})"


def _spread(steps: int, points: int) -> list[int]:
    """At most so many of the first k, the first and the last among them."""
    count = min(steps, points)
    return [i * (steps - 1) // max(count - 1, 1) for i in range(count)]


def _unit(curves: list[_Plottable]) -> str:
    """What schedules are of, if of the same; nothing for other functions."""
    if all(isinstance(curve, CosineWarmup) for curve in curves):
        return "learning rate"
    are_decays = all(isinstance(c, Schedule) and not isinstance(c, CosineWarmup) for c in curves)
    return "decay" if are_decays else ""


def _scale(ax: Axes, unit: str, was_empty: bool) -> None:
    """Scales axes for what they show now that curves of this unit are drawn last."""
    horizons = _horizons_of(ax)
    if unit == "decay" and (was_empty or horizons is not None):
        _scale_to_decays(ax, ax.twinx() if horizons is None else horizons)
        return
    if horizons is not None:
        horizons.remove()
        ax.set_yscale("linear")
        ax.autoscale(axis="y")
    ax.set_ylabel(unit if was_empty or unit == ax.get_ylabel() else "")


def _horizons_of(ax: Axes) -> Axes | None:
    """The axes on the right of decays that were drawn before."""
    place = ax.get_position(original=True).bounds
    siblings: list[Axes] = ax.get_shared_x_axes().get_siblings(ax)
    for other in siblings:
        is_twin = other is not ax and other.get_position(original=True).bounds == place
        if is_twin and other.get_ylabel() == _HORIZONS:
            return other
    return None


def _scale_to_decays(ax: Axes, right: Axes) -> None:
    """Gives axes the scale -log10(1 - decay), whose unit is one more nine.

    It ends at the highest decay, or where an average would be over ten times the updates drawn.
    """
    import numpy as np
    from numpy.typing import NDArray

    drawn = [np.asarray(line.get_xydata()).max(axis=0) for line in ax.get_lines()]
    last, highest = np.max(drawn, axis=0).tolist()
    least = min(max(1 - highest, 0.1 / (last + 1)), 0.5)  # of 1 - decay

    def nines(decay: NDArray[Any]) -> Any:
        return -np.log10(np.maximum(1 - decay, least))

    def decay(nines: NDArray[Any]) -> Any:
        return 1 - 10.0**-nines

    horizons = [1, 2, *(10**i for i in range(1, 16) if 10**-i > 0.999 * least)]
    decays = [1 - 1 / horizon for horizon in horizons]
    for side, name, labels in (
        (ax, "decay", [f"{decay:.15g}" for decay in decays]),
        (right, _HORIZONS, [f"{horizon:,}" for horizon in horizons]),
    ):
        side.set_yscale("function", functions=(nines, decay))
        side.set_ylim(0, 1 - least)
        side.set_yticks(decays, labels)
        side.set_ylabel(name)
