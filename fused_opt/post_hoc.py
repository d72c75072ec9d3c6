"""Post-hoc EMA: averages of any width after training, from snapshots that were kept during it.

From Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024,
section 3 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: No power function is wider: the golden ratio to the power of -5/2, at gamma = -0.38.
_MAX_SIGMA_REL = 0.30028310600077757
#: What is narrower averages nothing.
_MIN_SIGMA_REL = 1e-6


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    r"""Returns the exponent γ of the power function whose relative width is given.

    The largest root of

    .. math:: \gamma^3 + 7 \gamma^2 + (16 - \sigma^{-2}) \gamma + 12 - \sigma^{-2} = 0

    in Viète's trigonometric form, in fp64.

    Args:
        sigma_rel: σ, the standard deviation of the profile as a share of the training so far, in
            [1e-6, 0.3002]. At 0.2887 all weights so far count the same (γ = 0), above it the early
            ones count more.

    Raises:
        ValueError: sigma_rel is outside that range.

    Example:
        >>> from fused_opt.post_hoc import sigma_rel_to_gamma
        >>> round(sigma_rel_to_gamma(0.05), 2), round(sigma_rel_to_gamma(0.10), 2)
        (16.97, 6.94)
    """
    is_number = isinstance(sigma_rel, Real) and not isinstance(sigma_rel, bool)
    if not (is_number and _MIN_SIGMA_REL <= sigma_rel <= _MAX_SIGMA_REL):
        raise ValueError(
            f"Invalid sigma_rel: {sigma_rel!r}, expected a number in "
            f"[{_MIN_SIGMA_REL}, {_MAX_SIGMA_REL}]"
        )
    # With gamma = x - 7/3 it is x^3 - p x + q = 0, and x = 2 sqrt(p / 3) cos(angle / 3).
    sigma = float(sigma_rel)
    p = 1 / (sigma * sigma) + 1 / 3
    q = 4 / (3 * sigma * sigma) + 2 / 27
    cosine = -q / 2 / math.sqrt(p * p * p / 27)  # from 0 down to -1, for the largest sigma
    return 2 * math.sqrt(p / 3) * math.cos(math.acos(cosine) / 3) - 7 / 3


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An average with a power-function decay, as it was at some time.

    Shadows are updated in place: clone those that are to be kept in memory.

    Attributes:
        num_updates: t, how many updates the average had had; 1 or more.
        sigma_rel: σ of its ``schedules.power_function``.
        shadows: the average, by parameter name, in any dtypes and on any devices.

    Raises:
        ValueError: num_updates or sigma_rel is not what it may be.

    Example:
        >>> import torch
        >>> from fused_opt.post_hoc import Snapshot
        >>> snapshot = Snapshot(1000, 0.05, {"weight": torch.ones(2)})
        >>> Snapshot.from_dict(snapshot.to_dict()).num_updates
        1000
    """

    num_updates: int
    sigma_rel: float
    shadows: dict[str, Tensor]

    def __post_init__(self) -> None:
        _check_num_updates(self.num_updates)
        sigma_rel_to_gamma(self.sigma_rel)

    def to_dict(self) -> dict[str, Any]:
        """Returns the snapshot in builtin types, for ``torch.save``; the tensors are the same."""
        return {
            "num_updates": int(self.num_updates),
            "sigma_rel": float(self.sigma_rel),
            "shadows": dict(self.shadows),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Snapshot:
        """Takes what :meth:`to_dict` returned, and ``torch.load(weights_only=True)`` loads.

        Raises:
            ValueError: a key is missing or unknown, or a value is not what it may be.
        """
        expected = {"num_updates", "sigma_rel", "shadows"}
        if set(state) != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        return cls(**state)


@torch.no_grad()
def synthesize(
    snapshots: Sequence[Snapshot], sigma_rel: float, num_updates: int | None = None
) -> dict[str, Tensor]:
    r"""Returns the average that a power function of another width would have given.

    An average of exponent γ has at time t weighed the parameters of the time τ ≤ t by its profile
    p(τ) = (γ + 1) τ^γ / t^(γ + 1), whose integral is 1. The result is the combination of snapshots

    .. math:: \sum_i x_i s_i, \quad \min_x \int \Bigl(p(\tau) - \sum_i x_i p_i(\tau)\Bigr)^2 d\tau,
        \quad \sum_i x_i = 1

    whose profile is nearest to the one asked for. The paper's equations have no such constraint;
    with it parameters that do not change come out as they are, where there are few snapshots too.

    The x are solved for in fp64. Tensors are read one after the other and summed in fp64, so that
    snapshots which were loaded with ``mmap=True`` need not fit into memory. Tensors of integers are
    those of the snapshot that weighs most.

    Args:
        snapshots: two or more, of one training: averages of two widths, such as 0.05 and 0.10, at
            a few dozen times; more of them make it more exact. One alone gives itself.
        sigma_rel: σ of the result, from 1e-6 to 0.3002. It is most exact between the widths of the
            snapshots.
        num_updates: t of the result, by default that of the last snapshot. It is most exact at a
            snapshot's time.

    Returns:
        The average by name, in new tensors, in the dtypes and on the devices of the snapshot that
        weighs most.

    Raises:
        ValueError: names or shapes of the snapshots differ, two have the same profile or share
            memory, there are too few, or the result would be later than the last.

    Example:
        >>> import torch
        >>> from fused_opt.post_hoc import Snapshot, synthesize
        >>> snapshots = [
        ...     Snapshot(num_updates, sigma_rel, {"weight": torch.full((2,), 7.0)})
        ...     for num_updates in (1000, 2000)
        ...     for sigma_rel in (0.05, 0.10)
        ... ]
        >>> synthesize(snapshots, sigma_rel=0.08)
        {'weight': tensor([7., 7.])}
    """
    _check_snapshots(snapshots)
    profiles = [_Profile(s.num_updates, sigma_rel_to_gamma(s.sigma_rel)) for s in snapshots]
    last = max(profile.time for profile in profiles)
    target = _Profile(last if num_updates is None else num_updates, sigma_rel_to_gamma(sigma_rel))
    _check_num_updates(target.time)
    if target.time > last:
        raise ValueError(
            f"Invalid num_updates: {target.time}, expected at most {last}, the last snapshot's"
        )
    weights = _weights(profiles, target)
    return {
        name: _weighted([snapshot.shadows[name] for snapshot in snapshots], weights)
        for name in snapshots[0].shadows
    }


class _Profile(NamedTuple):
    """By what share an average has taken in the parameters: in proportion to τ^γ up to a time."""

    time: int
    gamma: float


def _weights(profiles: Sequence[_Profile], target: _Profile) -> list[float]:
    """Returns the factors, 1 in sum, of the sum of profiles that is nearest to the target.

    All profiles are taken in units of their own 2-norms, (γ + 1) / √((2γ + 1) t). Their products
    are then cosines between 0 and 1: nothing overflows, and the system is as well conditioned as it
    can be. With the Lagrange multiplier λ of the constraint it is C y + λ c = b, c·y = 1.
    """
    if target in profiles:
        return [float(profile == target) for profile in profiles]
    if len(profiles) < 2:
        raise ValueError(
            "snapshots: expected two or more, or one whose num_updates and sigma_rel are those of "
            f"the result; got {len(profiles)}"
        )
    time, gamma = torch.tensor([*profiles, target], dtype=torch.float64, device="cpu").T
    cosines = _cosine(time[:, None], gamma[:, None], time, gamma)
    norms = (gamma + 1) / ((2 * gamma + 1) * time).sqrt()
    in_units = norms[-1] / norms[:-1]
    # The last row and column, the target's, become those of the constraint.
    system = cosines.clone()
    system[-1, :-1] = system[:-1, -1] = in_units
    system[-1, -1] = 0
    right = cosines[:, -1]  # whose last entry, the target's cosine with itself, is the 1 of c·y = 1
    solution: list[float] = (torch.linalg.solve(system, right)[:-1] * in_units).tolist()
    return solution


def _cosine(time_a: Tensor, gamma_a: Tensor, time_b: Tensor, gamma_b: Tensor) -> Tensor:
    """The integral of the product of two profiles, over the square roots of those with themselves.

    The integral ends with the earlier one, so that of the ratio of times the exponent is the later
    one's.
    """
    ratio = torch.minimum(time_a, time_b) / torch.maximum(time_a, time_b)
    later = torch.where(time_a > time_b, gamma_a, gamma_b)
    at_equal_times = ((2 * gamma_a + 1) * (2 * gamma_b + 1)).sqrt() / (gamma_a + gamma_b + 1)
    return at_equal_times * ratio ** (later + 0.5)


def _weighted(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Sums tensors, in float64, with weights whose sum is 1.

    What is summed are the differences from the heaviest: nothing is lost where there are none, and
    little where weights of both signs cancel.
    """
    base = tensors[max(range(len(weights)), key=lambda i: abs(weights[i]))]
    if not (base.is_floating_point() or base.is_complex()):
        return base.clone()
    exact = torch.promote_types(base.dtype, torch.float64)
    start = base.to(exact)
    total = start.clone()
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight != 0 and tensor is not base:
            total += weight * (tensor.to(base.device, exact) - start)
    return total.to(base.dtype)


def _check_num_updates(num_updates: Any) -> None:
    if isinstance(num_updates, bool) or not isinstance(num_updates, Integral) or num_updates < 1:
        raise ValueError(f"Invalid num_updates: {num_updates!r}, expected an integer above 0")


def _check_snapshots(snapshots: Sequence[Snapshot]) -> None:
    """Raises ValueError, saying which, unless all are different averages of the same tensors."""
    if not snapshots:
        raise ValueError("snapshots: expected two or more, got none")
    expected = _shapes(snapshots[0])
    profiles: dict[tuple[int, float], int] = {}
    owners: dict[tuple[torch.device, int], int] = {}
    for i, snapshot in enumerate(snapshots):
        found = _shapes(snapshot)
        differences = [
            f"{name!r}: expected {expected.get(name, 'none')}, got {found.get(name, 'none')}"
            for name in sorted(expected | found)
            if expected.get(name) != found.get(name)
        ]
        if differences:
            raise ValueError(
                f"snapshots[{i}] differs from snapshots[0] in names or shapes; "
                + "; ".join(differences)
            )
        twin = profiles.setdefault((snapshot.num_updates, snapshot.sigma_rel), i)
        if twin != i:
            raise ValueError(
                f"snapshots[{twin}] and snapshots[{i}]: expected different ones, both have "
                f"num_updates={snapshot.num_updates} and sigma_rel={snapshot.sigma_rel}"
            )
        for name, tensor in snapshot.shadows.items():
            memory = (tensor.device, tensor.data_ptr())
            owner = owners.setdefault(memory, i) if tensor.numel() else i
            if owner != i:
                raise ValueError(
                    f"snapshots[{owner}] and snapshots[{i}] share the memory of {name!r}, so that "
                    "one of them has changed since it was taken; expected clones of the shadows"
                )


def _shapes(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in snapshot.shadows.items()}
