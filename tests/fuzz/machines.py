"""The state machines for as long as there is time, with random seeds."""

from __future__ import annotations

import time
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import run_state_machine_as_test

from fuzz.training import COUNTS, TrainingMachine

#: Where hypothesis keeps examples that failed, to try them first the next time.
EXAMPLES = Path(__file__).resolve().parents[2] / "build" / "fuzz" / "examples"

#: As many in a round, which has a seed of its own, as can be repeated in a minute or two.
EXAMPLES_OF_A_ROUND = 100
STEPS_OF_AN_EXAMPLE = 40


def run(minutes: float, seed: int, most: int | None = None) -> dict[str, int]:
    """Runs rounds until the time is over, or so many; raises what the machine finds."""
    torch.set_num_threads(2)
    end = time.monotonic() + 60 * minutes
    rounds = 0
    while rounds == 0 or (time.monotonic() < end if most is None else rounds < most):
        run_round(seed + rounds)
        rounds += 1
        print(f"round {rounds}: {COUNTS}", flush=True)
    return {"rounds": rounds, **COUNTS}


def run_round(seed: int) -> None:
    """One round, which the seed decides."""
    profile = settings(
        max_examples=EXAMPLES_OF_A_ROUND,
        stateful_step_count=STEPS_OF_AN_EXAMPLE,
        deadline=None,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(EXAMPLES),
        suppress_health_check=list(HealthCheck),
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
    )
    machine = hypothesis.seed(seed)(type(f"Seed{seed}", (TrainingMachine,), {}))
    try:
        run_state_machine_as_test(machine, settings=profile)
    except BaseException:
        print(f"failed; to repeat: python -m fuzz machines --rounds 1 --seed {seed}", flush=True)
        raise
