"""Interleavings of all that a training run does, against the oracle: see fuzz/training.py."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from fuzz.training import TrainingMachine
from hypothesis import HealthCheck, settings

#: Few enough for every run of the suite; `make fuzz` runs as many as there is time for.
SHORT = settings(max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck))

TestTraining = TrainingMachine.TestCase
TestTraining.settings = SHORT
