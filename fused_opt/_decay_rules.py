"""The decay of an average: a number, a schedule, or a function of the user's; used by ``EMA``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fused_opt._hyper import check_decay
from fused_opt.schedules import CosineWarmup, Schedule

DecayRule = float | Tensor | Schedule | Callable[[int], float]


def rules_of(decay: DecayRule | Sequence[DecayRule]) -> list[DecayRule]:
    """The decays of all averages; raises ValueError for what is none."""
    rules: list[Any] = list(decay) if isinstance(decay, (list, tuple)) else [decay]
    if not rules:
        raise ValueError("decay: expected at least one, got none")
    for rule in rules:
        if isinstance(rule, CosineWarmup):
            raise ValueError(f"decay: expected a decay, got the learning rate {rule}")
        if not callable(rule):
            check_decay(rule)
    return [rule if callable(rule) or isinstance(rule, Tensor) else float(rule) for rule in rules]


def decay_at(rule: DecayRule, k: int) -> float | Tensor:
    """The decay of the update before which there were k; raises ValueError outside [0, 1]."""
    decay = rule(k) if callable(rule) else rule
    check_decay(decay)
    return decay


def plain(rule: DecayRule) -> float | dict[str, Any] | None:
    """A decay in builtin types; None for a function, which cannot be saved."""
    if isinstance(rule, Schedule):
        return rule.to_dict()
    return None if callable(rule) else float(rule)


def rule_of_plain(saved: Any) -> DecayRule | None:
    """What :func:`plain` was given; raises ValueError for what it does not return."""
    if isinstance(saved, Mapping):
        return Schedule.from_dict(saved)
    if saved is None:
        return None
    check_decay(saved)
    return float(saved)
