"""A pytest plugin for torch's own tests: puts our classes in the place of torch's, if asked to.

``run.py`` loads it with ``-p swap``, before pytest imports a test. It leaves out the tests of other
optimizers than SGD, and writes what becomes of each test to a file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

#: Says whose classes the tests get: "torch" or "fused_opt".
CLASSES = "FUSED_OPT_UPSTREAM_CLASSES"
#: Names the file that receives the outcomes, as JSON by test.
OUTCOMES = "FUSED_OPT_UPSTREAM_OUTCOMES"

#: The names of generated tests hold the optimizer's between underscores.
OTHER_OPTIMIZERS = [
    f"_{info.optim_cls.__name__}_" for info in optim_db if info.optim_cls is not torch.optim.SGD
]

outcomes: dict[str, dict[str, str]] = {}


def swap() -> None:
    """Whoever asks torch for SGD, or for the average of ``swa_utils``, gets ours."""
    import fused_opt

    info = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
    info.optim_cls = torch.optim.SGD = sys.modules["torch.optim.sgd"].SGD = fused_opt.SGD
    torch.optim.swa_utils.get_ema_multi_avg_fn = fused_opt.get_ema_multi_avg_fn


if os.environ[CLASSES] == "fused_opt":
    swap()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [i for i in items if any(name in f"{i.name}_" for name in OTHER_OPTIMIZERS)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has the outcome of its call, or of the phase beside it that went wrong."""
    name = report.nodeid.partition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if crash is None else crash.message.strip().partition("\n")[0]
        outcomes[name] = {"outcome": report.outcome, "message": message}


def pytest_sessionfinish() -> None:
    Path(os.environ[OUTCOMES]).write_text(json.dumps(outcomes))
