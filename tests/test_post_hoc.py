"""Post-hoc EMA against averages that were tracked, and least squares on sampled profiles."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_opt import schedules
from fused_opt.post_hoc import Snapshot, sigma_rel_to_gamma, synthesize

STEPS, EVERY, NUMEL = 4000, 250, 64
TRACKED = (0.05, 0.10)


def random_walk(seed: int = 0) -> Tensor:
    """The parameters after each update: a walk with a drift, as of a training that goes on."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(STEPS, NUMEL, dtype=torch.float64, generator=generator)
    return (steps + 0.05).cumsum(0) / math.sqrt(STEPS)


def tracked(walk: Tensor, sigma_rel: float) -> list[Tensor]:
    """The average after each update, by the schedule."""
    schedule, shadow, shadows = schedules.power_function(sigma_rel), torch.zeros(NUMEL), []
    for k, params in enumerate(walk):
        shadow = params + schedule(k) * (shadow - params)
        shadows.append(shadow)
    return shadows


def snapshots_of(walk: Tensor, sigmas: Sequence[float] = TRACKED) -> list[Snapshot]:
    averages = {sigma: tracked(walk, sigma) for sigma in sigmas}
    return [
        Snapshot(t, sigma, {"weight": averages[sigma][t - 1]})
        for sigma in sigmas
        for t in range(EVERY, STEPS + 1, EVERY)
    ]


@pytest.fixture(scope="module")
def walk() -> Tensor:
    return random_walk()


@pytest.fixture(scope="module")
def snapshots(walk: Tensor) -> list[Snapshot]:
    return snapshots_of(walk)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- sigma_rel and gamma


@pytest.mark.parametrize("sigma_rel", [1e-6, 1e-3, 0.05, 0.1, 0.2, 1 / math.sqrt(12), 0.29, 0.3])
def test_gamma_has_the_width_that_is_asked_for(sigma_rel: float) -> None:
    gamma = sigma_rel_to_gamma(sigma_rel)
    width = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)  # of the profile, by integration
    assert width == pytest.approx(sigma_rel, rel=1e-14)


def test_gamma_is_the_largest_root_of_the_papers_cubic() -> None:
    for sigma_rel in np.linspace(0.01, 0.3, 100):
        s = float(sigma_rel) ** -2
        roots = np.roots([1, 7, 16 - s, 12 - s])
        assert abs(roots.imag).max() == 0
        assert sigma_rel_to_gamma(float(sigma_rel)) == pytest.approx(roots.real.max(), abs=1e-9)


def test_equal_weights_are_gamma_0() -> None:
    assert sigma_rel_to_gamma(1 / math.sqrt(12)) == pytest.approx(0, abs=1e-13)


def test_widest_profile_is_at_the_golden_ratio() -> None:
    golden = (1 + math.sqrt(5)) / 2
    assert sigma_rel_to_gamma(golden**-2.5) == pytest.approx(-(golden**-2), abs=1e-7)
    with pytest.raises(ValueError, match="Invalid sigma_rel"):
        sigma_rel_to_gamma(golden**-2.5 + 1e-9)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 1e-7, 0.31, math.nan, math.inf, True, "0.1"])
def test_widths_that_no_profile_has_are_refused(sigma_rel: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Invalid sigma_rel: .*expected a number in \[1e-06, 0\.3"
    ):
        sigma_rel_to_gamma(sigma_rel)


# --- synthesis


@pytest.mark.parametrize(
    ("sigma_rel", "tolerance"), [(0.075, 5e-4), (0.06, 5e-4), (0.15, 2e-3), (0.2, 1e-2)]
)
def test_result_is_the_average_of_that_width(
    walk: Tensor, snapshots: list[Snapshot], sigma_rel: float, tolerance: float
) -> None:
    expected = tracked(walk, sigma_rel)[-1]
    found = synthesize(snapshots, sigma_rel)["weight"]
    assert relative_error(found, expected) < tolerance
    # Nearer than any of the snapshots is, by far.
    nearest = min(relative_error(s.shadows["weight"], expected) for s in snapshots)
    assert relative_error(found, expected) < nearest / 20


def test_result_may_be_earlier_than_the_last_snapshot(
    walk: Tensor, snapshots: list[Snapshot]
) -> None:
    expected = tracked(walk, 0.075)[2999]
    assert relative_error(synthesize(snapshots, 0.075, 3000)["weight"], expected) < 5e-4


def test_more_snapshots_are_more_exact(walk: Tensor, snapshots: list[Snapshot]) -> None:
    expected = tracked(walk, 0.075)[-1]
    few = [snapshot for snapshot in snapshots if snapshot.num_updates % 1000 == 0]
    errors = [relative_error(synthesize(s, 0.075)["weight"], expected) for s in (few, snapshots)]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("sigma_rel", TRACKED)
@pytest.mark.parametrize("num_updates", [EVERY, 2000, STEPS])
def test_a_tracked_average_comes_out_bit_for_bit(
    snapshots: list[Snapshot], sigma_rel: float, num_updates: int
) -> None:
    (same,) = (s for s in snapshots if (s.num_updates, s.sigma_rel) == (num_updates, sigma_rel))
    found = synthesize(snapshots, sigma_rel, num_updates)["weight"]
    assert torch.equal(found, same.shadows["weight"])
    assert found.data_ptr() != same.shadows["weight"].data_ptr()
    assert torch.equal(synthesize([same], sigma_rel)["weight"], same.shadows["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.3])
def test_constants_come_out_as_they_are(dtype: torch.dtype, sigma_rel: float) -> None:
    constant = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    few = [Snapshot(t, sigma, {"weight": constant.clone()}) for t in (10, 300) for sigma in TRACKED]
    assert torch.equal(synthesize(few, sigma_rel, 200)["weight"], constant)


def as_impulses(snapshots: list[Snapshot]) -> list[Snapshot]:
    """The same averages of as many tensors of which each is 1 in one snapshot: their weights."""
    rows = torch.eye(len(snapshots), dtype=torch.float64)
    return [
        Snapshot(s.num_updates, s.sigma_rel, {"row": row.clone()})
        for s, row in zip(snapshots, rows, strict=True)
    ]


def weights_of(snapshots: list[Snapshot], sigma_rel: float, num_updates: int | None) -> np.ndarray:
    return np.asarray(synthesize(as_impulses(snapshots), sigma_rel, num_updates)["row"])


def sampled_least_squares(
    profiles: list[tuple[int, float]], target: tuple[int, float], cells: int
) -> np.ndarray:
    """The nearest combination of profiles, summing to 1, by numpy's least squares.

    A profile is its mean in each of many cells of time, of the same length. That the weights sum to
    1 is put in by writing the last as 1 minus the others.
    """
    edges = np.linspace(0, max(time for time, _ in profiles), cells + 1)

    def means(profile: tuple[int, float]) -> np.ndarray:
        time, sigma_rel = profile
        integral = np.minimum(edges / time, 1) ** (sigma_rel_to_gamma(sigma_rel) + 1)
        return np.diff(integral) / np.diff(edges)

    *others, last = [means(profile) for profile in profiles]
    matrix = np.stack(others, axis=1) - last[:, None]
    free = np.linalg.lstsq(matrix, means(target) - last, rcond=None)[0]
    return np.append(free, 1 - free.sum())


@pytest.mark.parametrize("num_updates", [4000, 3100])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.25])
def test_weights_are_those_of_least_squares(sigma_rel: float, num_updates: int) -> None:
    profiles = [(t, sigma) for t in (1000, 2500, 3000, 4000) for sigma in TRACKED]
    few = [Snapshot(t, sigma, {}) for t, sigma in profiles]
    expected = sampled_least_squares(profiles, (num_updates, sigma_rel), cells=400_000)
    found = weights_of(few, sigma_rel, num_updates)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_weights_depend_on_ratios_of_times_only() -> None:
    def weights(scale: int) -> np.ndarray:
        few = [Snapshot(t * scale, s, {}) for t in (10, 25, 40) for s in TRACKED]
        return weights_of(few, 0.075, 40 * scale)

    np.testing.assert_allclose(weights(10**15), weights(1), rtol=1e-9)


def test_result_scales_with_the_parameters(snapshots: list[Snapshot]) -> None:
    large = [
        Snapshot(s.num_updates, s.sigma_rel, {"weight": s.shadows["weight"] * 1024})
        for s in snapshots
    ]
    found = synthesize(large, 0.075)["weight"]
    assert torch.equal(found, synthesize(snapshots, 0.075)["weight"] * 1024)


def test_order_of_the_snapshots_changes_rounding_only(snapshots: list[Snapshot]) -> None:
    forward = synthesize(snapshots, 0.075)["weight"]
    backward = synthesize(snapshots[::-1], 0.075)["weight"]
    assert relative_error(backward, forward) < 1e-12


def test_extreme_widths_and_times_do_not_overflow() -> None:
    extreme = [(1, 1e-6), (1, 0.3), (10**12, 1e-6), (10**12, 1e-4), (10**15, 0.3), (10**15, 0.1)]
    weights = weights_of([Snapshot(t, s, {}) for t, s in extreme], 0.2, 10**15)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)


def test_sums_in_float64_and_rounds_once(walk: Tensor) -> None:
    few = [s for s in snapshots_of(walk) if s.num_updates % 1000 == 0]
    for dtype in (torch.float32, torch.bfloat16):
        narrow = [
            Snapshot(s.num_updates, s.sigma_rel, {"weight": s.shadows["weight"].to(dtype)})
            for s in few
        ]
        widened = [
            Snapshot(s.num_updates, s.sigma_rel, {"weight": s.shadows["weight"].double()})
            for s in narrow
        ]
        found = synthesize(narrow, 0.075)["weight"]
        assert found.dtype == dtype
        assert torch.equal(found, synthesize(widened, 0.075)["weight"].to(dtype))


def test_integers_and_complex_numbers() -> None:
    few = [
        Snapshot(
            t,
            sigma,
            {
                "count": torch.tensor(round(t * 1e6 + sigma * 100)),
                "empty": torch.ones(0),
                "complex": torch.full((2,), complex(t, sigma)),
            },
        )
        for t in (10, 20)
        for sigma in TRACKED
    ]
    found = synthesize(few, 0.085)
    assert torch.equal(found["count"], few[-1].shadows["count"])  # the nearest: 0.10, at 20
    found["count"].zero_()
    assert all(snapshot.shadows["count"] > 0 for snapshot in few)
    assert found["empty"].shape == (0,)
    times = [Snapshot(s.num_updates, s.sigma_rel, {"t": s.shadows["complex"].real}) for s in few]
    assert torch.equal(found["complex"].real, synthesize(times, 0.085)["t"])
    assert found["complex"].dtype == torch.complex64


def test_result_is_no_part_of_a_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    few = [Snapshot(t, 0.05, {"weight": leaf * t}) for t in (10, 20)]
    assert not synthesize(few, 0.075)["weight"].requires_grad


def test_snapshots_survive_a_checkpoint(snapshots: list[Snapshot]) -> None:
    file = io.BytesIO()
    torch.save([snapshot.to_dict() for snapshot in snapshots], file)
    file.seek(0)
    loaded = [Snapshot.from_dict(state) for state in torch.load(file, weights_only=True)]
    expected = synthesize(snapshots, 0.075)["weight"]
    assert torch.equal(synthesize(loaded, 0.075)["weight"], expected)


# --- errors

ONES = {"weight": torch.ones(2), "bias": torch.ones(3)}


def pair(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[Snapshot]:
    return [Snapshot(10, 0.05, first), Snapshot(10, 0.10, second)]


@pytest.mark.parametrize(
    ("snapshots", "message"),
    [
        ([], "expected two or more, got none"),
        ([Snapshot(10, 0.05, ONES)], "expected two or more, or one whose num_updates .* got 1"),
        (
            pair(ONES, {"weight": torch.ones(2), "other": torch.ones(3)}),
            r"snapshots\[1\] .*'bias': expected \(3,\), got none; 'other': expected none, got \(3,",
        ),
        (
            pair(ONES, {"weight": torch.ones(2, 1), "bias": torch.ones(4)}),
            r"'bias': expected \(3,\), got \(4,\); 'weight': expected \(2,\), got \(2, 1\)",
        ),
        (
            [Snapshot(10, 0.05, {}), Snapshot(20, 0.05, {}), Snapshot(10, 0.05, {})],
            r"snapshots\[0\] and snapshots\[2\]: .* num_updates=10 and sigma_rel=0\.05",
        ),
        (pair(ONES, ONES), r"snapshots\[0\] and snapshots\[1\] share the memory of 'weight'"),
    ],
)
def test_snapshots_that_do_not_fit_are_named(snapshots: list[Snapshot], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(snapshots, 0.075)


@pytest.mark.parametrize(
    ("num_updates", "message"),
    [
        (4001, "Invalid num_updates: 4001, expected at most 4000"),
        (0, "Invalid num_updates: 0, expected an integer above 0"),
        (10.0, r"Invalid num_updates: 10\.0"),
    ],
)
def test_times_without_snapshots_are_refused(
    snapshots: list[Snapshot], num_updates: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(snapshots, 0.075, num_updates)


def test_bad_snapshots_are_refused() -> None:
    for num_updates in (0, 1.5, True):
        with pytest.raises(ValueError, match="Invalid num_updates"):
            Snapshot(num_updates, 0.05, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid sigma_rel"):
        Snapshot(1, 0.5, {})
    state = Snapshot(1, 0.05, {}).to_dict()
    del state["shadows"]
    with pytest.raises(ValueError, match=r"expected the keys .*'shadows'.* got"):
        Snapshot.from_dict(state)
