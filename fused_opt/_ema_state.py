"""What an EMA holds and what a saved state says, in the same words; and our own format of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_opt._decay_rules import DecayRule, plain, rule_of_plain
from fused_opt._ema_names import Names, fitted

State = Mapping[str, Any]


class Progress(NamedTuple):
    """How many steps were taken, and which of them copy or average."""

    num_steps: int
    update_every: int
    update_after_step: int

    @property
    def num_due(self) -> int:
        """How many steps have copied or averaged."""
        return -(-self.num_steps // self.update_every)

    @property
    def num_copies(self) -> int:
        """How many steps copy, in all."""
        return -(-self.update_after_step // self.update_every)

    @property
    def num_updates(self) -> int:
        """How many steps have averaged."""
        return max(0, self.num_due - self.num_copies)

    def after_due(self, count: int) -> Progress:
        """The same rule, when so many steps have copied or averaged."""
        return self._replace(num_steps=count * self.update_every)

    def after_updates(self, count: int) -> Progress:
        """The same rule, when so many steps have averaged."""
        return self.after_due(self.num_copies + count)


class Origin(NamedTuple):
    """What a foreign state said that an EMA has no use for, to write it back as it was.

    Where it says nothing, exported tensors have their parameter's dtype, as in those packages.
    """

    dtypes: Mapping[str, torch.dtype] = {}
    diffusers: Mapping[str, Any] = {}
    has_collected: bool = False
    has_online: bool = True


class Held(NamedTuple):
    """What an EMA holds.

    ``averages`` are what is averaged, and all parameters; ``copied`` is the rest. ``names`` and
    ``weights`` are the whole model's, tracked or not: the weights that it trains, also while an
    average is in their place. ``collected`` is what was last kept aside for that.
    """

    names: Names
    averages: list[dict[str, Tensor]]
    copied: dict[str, Tensor]
    decays: list[DecayRule]
    progress: Progress
    weights: dict[str, Tensor]
    collected: dict[str, Tensor]
    applied: int | None
    origin: Origin

    @property
    def tracked(self) -> dict[str, Tensor]:
        """The weights that are averaged or copied."""
        kept = {**self.averages[0], **self.copied}
        return {name: tensor for name, tensor in self.weights.items() if name in kept}


class Saved(NamedTuple):
    """What a state says, None or empty where it says nothing. It fits the EMA in every point."""

    averages: list[dict[str, Tensor]]
    decays: list[DecayRule | None]
    progress: Progress
    copied: Mapping[str, Tensor] = {}
    collected: Mapping[str, Tensor] = {}
    applied: int | None = None
    origin: Origin = Origin()


def write_own(held: Held) -> dict[str, Any]:
    """Our own state: plain numbers, and the tensors themselves."""
    state = {
        "decay": [plain(rule) for rule in held.decays],
        **held.progress._asdict(),
        "averages": held.averages,
        "buffers": held.copied,
    }
    if held.applied is not None:
        state |= {"applied": held.applied, "weights": held.tracked}
    return state


def is_own(state: State) -> bool:
    """Whether it is of this format, complete or not."""
    return "averages" in state


def read_own(state: State, held: Held) -> Saved:
    """Reads our own state; raises ValueError if it does not fit."""
    keys = ["decay", *Progress._fields, "averages", "buffers"]
    is_applied = "applied" in state or "weights" in state
    check_keys(state, [*keys, "applied", "weights"] if is_applied else keys)
    for key in ("averages", "decay"):
        expected = len(held.averages)
        if not isinstance(state[key], list) or len(state[key]) != expected:
            raise ValueError(f"state_dict[{key!r}]: expected a list of {expected}")
    saved = Saved(
        averages=[
            fitted(f"state_dict['averages'][{i}]", found, held.averages[i], held.names)
            for i, found in enumerate(state["averages"])
        ],
        decays=[rule_of_plain(rule) for rule in state["decay"]],
        progress=Progress(
            integer(state, "num_steps"),
            integer(state, "update_every", at_least=1),
            integer(state, "update_after_step"),
        ),
        copied=fitted("state_dict['buffers']", state["buffers"], held.copied, held.names),
    )
    if not is_applied:
        return saved
    applied = integer(state, "applied", below=len(held.averages))
    weights = fitted("state_dict['weights']", state["weights"], held.tracked, held.names)
    return saved._replace(applied=applied, collected=weights)


def check_keys(state: State, expected: list[str]) -> None:
    """Raises ValueError unless a state has these keys and no others."""
    if set(state) != set(expected):
        raise ValueError(
            f"state_dict: expected the keys {sorted(expected)}, got {sorted(map(str, state))}"
        )


def integer(state: State, key: str, at_least: int = 0, below: int = 2**63) -> int:
    """An integer of a state, which may be a tensor there; raises ValueError if it is none."""
    value = state[key]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < below:
        raise ValueError(
            f"state_dict[{key!r}]: expected an integer of at least {at_least}"
            f"{'' if below == 2**63 else f' and below {below}'}, got {value!r}"
        )
    return value
