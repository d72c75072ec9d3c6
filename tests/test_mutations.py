"""Every mutation of the CUDA sources is caught in the emulator, for the reason that it should be.

mutations.py has the table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import mutations
import native_variants
import pytest
from mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes() -> Any:
    """What each scenario ended with, with the sources unchanged and with each mutation."""
    module = mutations.build()
    result = subprocess.run(
        [sys.executable, mutations.__file__],
        env=native_variants.environment("emulated-asan", module, native_variants.EMULATED),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_scenario_passes_without_a_mutation(outcomes):
    assert {name: text for name, text in outcomes["unchanged"].items() if text} == {}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_caught_for_the_right_reason(mutation: Mutation, outcomes):
    found = outcomes["mutated"][mutation.name]
    assert found, "the scenario passes"
    assert re.search(mutation.reason, found), found[-3000:]
