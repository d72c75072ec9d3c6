"""Which cases a run measures: those that were asked for, or those that people care about."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .ops import DTYPES, OPS
from .providers import PEERS
from .shapes import QUICK_SWEEPS, SHAPES, SWEEPS


class UnknownNameError(ValueError):
    """A name on the command line that means nothing."""


@dataclass(frozen=True)
class Plan:
    """All ops that suit, on all lists, in all dtypes."""

    shapes: tuple[str, ...]
    ops: tuple[str, ...]
    dtypes: tuple[str, ...] = ("fp32",)

    def cases(self, quick: bool) -> list[tuple[str, str, str]]:
        """Returns lists, ops and dtypes, sweeps taken apart."""
        sweeps = QUICK_SWEEPS if quick else SWEEPS
        names = [name for each in self.shapes for name in sweeps.get(each, [each])]
        return [
            (name, op, dtype)
            for name in names
            for dtype in self.dtypes
            for op in self.ops
            if OPS[op].suits(DTYPES[dtype])
        ]


SGD_TO_TAIL = ("sgd", "sgd+ema", "clip+sgd+ema")
ALL_OPS = tuple(OPS)
SWEPT_LISTS = [name for lists in (*SWEEPS.values(), *QUICK_SWEEPS.values()) for name in lists]
SWEPT = Plan(("sweep-size", "sweep-count"), ("sgd+ema",))

QUICK = (Plan(("resnet50",), ("sgd", "sgd+ema")), Plan(("small-500",), ("sgd+ema",)), SWEPT)
FULL = (
    Plan(("resnet50", "gpt2", "small-500"), ALL_OPS),
    Plan(("vit-b16",), SGD_TO_TAIL),
    Plan(("gpt2",), ("sgd", "sgd+ema", "sgd+ema+master"), ("bf16",)),
    SWEPT,
)
#: What a GPU has the speed and the memory for.
FULL_ON_GPU = (
    *FULL,
    Plan(("moe-10k",), SGD_TO_TAIL),
    Plan(("llama-7b",), ("sgd", "sgd+ema"), ("bf16",)),
    Plan(("one-2^31",), ("sgd",), ("bf16",)),
)


def names_in(text: str | None, known: Collection[str], what: str) -> tuple[str, ...] | None:
    """Takes a comma list apart, or returns None where there is none.

    Raises:
        UnknownNameError: A name is not among the known ones.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        said = f"unknown {what} {', '.join(unknown)}" if unknown else f"no {what}"
        raise UnknownNameError(f"{said}; known are {', '.join(dict.fromkeys(known))}")
    return names


def cases(
    shapes: str | None, ops: str | None, dtypes: str | None, *, quick: bool, device: str
) -> list[tuple[str, str, str]]:
    """Returns lists, ops and dtypes to measure, in the order of the plans, none twice."""
    chosen_shapes = names_in(shapes, [*SHAPES, *SWEEPS, *SWEPT_LISTS], "shapes")
    chosen_ops = names_in(ops, OPS, "ops")
    chosen_dtypes = names_in(dtypes, DTYPES, "dtype")
    full = FULL_ON_GPU if device == "cuda" else FULL
    plans: tuple[Plan, ...] = QUICK if quick else full
    if chosen_shapes:
        plans = (Plan(chosen_shapes, SGD_TO_TAIL if quick else ALL_OPS),)
    if chosen_ops or chosen_dtypes:
        plans = tuple(
            Plan(each.shapes, chosen_ops or each.ops, chosen_dtypes or each.dtypes)
            for each in plans
        )
    return list(dict.fromkeys(case for each in plans for case in each.cases(quick)))


def peers(against: str | None) -> list[str] | None:
    """Returns the peers that were asked for, or None."""
    names = names_in(against, PEERS, "peers")
    return None if names is None else list(names)
