"""tests/upstream: torch's own tests with our classes, here on a small stand-in for torch's."""

import sys
from pathlib import Path

import pytest
import torch

UPSTREAM = Path(__file__).parent / "upstream"
sys.path.insert(0, str(UPSTREAM))
import run  # noqa: E402

#: What torch's file has: generated classes over `optim_db`, SGD under its name in `torch.optim`,
#: and the averages of `swa_utils`.
STAND_IN = """
import unittest
import torch
from torch.optim import SGD
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optim_db, optims
from torch.testing._internal.common_utils import TestCase

class TestOptimRenewed(TestCase):
    @optims(optim_db, dtypes=[torch.float32])
    def test_steps(self, device, dtype, optim_info):
        param = torch.nn.Parameter(torch.ones(3, device=device, dtype=dtype))
        param.grad = torch.ones_like(param)
        optim_info.optim_cls([param], lr=0.5).step()
        self.assertEqual(param, torch.full_like(param, 0.5))

    @optims([info for info in optim_db if "fused" in info.supported_impls])
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        param = torch.empty(3, device="meta", dtype=dtype)
        param.grad = torch.empty_like(param)
        with self.assertRaises(RuntimeError):
            optim_info.optim_cls([param], fused=True).step()

instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")

class TestOthers(unittest.TestCase):
    def test_fails_with_any_classes(self):
        self.fail("as it does upstream")

    def test_is_skipped(self):
        self.skipTest("for a reason")

    def test_average(self):
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        shadow = torch.zeros(1)
        average([shadow], [torch.ones(1)], 1)
        self.assertEqual(shadow.item(), 0.5)

    def test_sgd_is_torchs(self):
        self.assertEqual(SGD.__module__, "torch.optim.sgd")

    def test_the_average_is_torchs(self):
        make = torch.optim.swa_utils.get_ema_multi_avg_fn
        self.assertEqual(make.__module__, "torch.optim.swa_utils")
"""
PASSED, FAILED = ({"outcome": outcome, "message": "why"} for outcome in ("passed", "failed"))


def sources(folder: Path, release: str = torch.__version__) -> str:
    (folder / "test").mkdir()
    (folder / "test" / "test_optim.py").write_text(STAND_IN)
    (folder / "version.txt").write_text(release + "\n")
    return str(folder)


def test_torchs_tests_run_with_both_classes(tmp_path, capfd):
    """The only difference beside those that the stand-in adds is the one that is expected."""
    pytest.importorskip("expecttest")
    assert run.main(sources(tmp_path)) == 1
    printed = capfd.readouterr().out
    assert "torch      1 failed, 5 passed, 1 skipped" in printed
    assert "fused_opt  4 failed, 2 passed, 1 skipped" in printed
    assert "3 tests differ, 2 not as expected\n" in printed
    for name in ("test_sgd_is_torchs", "test_the_average_is_torchs"):
        assert f"unexpected: TestOthers::{name}: passed with torch, failed with ours" in printed
    assert "warning" not in printed


@pytest.fixture
def outcomes(monkeypatch, tmp_path):
    """Takes the place of the runs: what the tests become with each of the classes."""
    by_classes = {"torch": {}, "fused_opt": {}}
    monkeypatch.setattr(run, "run_tests", lambda tests, classes: by_classes[classes])
    monkeypatch.setattr(run, "EXPECTED_DIFFERENCES", {"T::test_known_*": "a reason"})
    monkeypatch.setattr(run, "reason_to_skip", lambda source: None)
    return by_classes


def test_what_differs_as_expected_is_no_error(outcomes, tmp_path):
    outcomes["torch"] |= {"T::test_known_cpu": PASSED, "T::test_fails": FAILED}
    outcomes["fused_opt"] |= {"T::test_known_cpu": FAILED, "T::test_fails": FAILED}
    assert run.main(sources(tmp_path)) == 0


@pytest.mark.parametrize(("theirs", "ours"), [(PASSED, FAILED), (FAILED, PASSED), (PASSED, None)])
def test_another_difference_is_an_error(outcomes, tmp_path, capsys, theirs, ours):
    outcomes["torch"] |= {"T::test_known_cpu": PASSED, "T::test_new": theirs}
    outcomes["fused_opt"] |= {"T::test_known_cpu": FAILED} | ({"T::test_new": ours} if ours else {})
    assert run.main(sources(tmp_path)) == 1
    assert "unexpected: T::test_new: " in capsys.readouterr().out


@pytest.mark.parametrize("now", [{"T::test_known_cpu": PASSED}, {"T::test_other": PASSED}])
def test_an_expected_difference_that_does_not_occur_is_an_error(outcomes, tmp_path, capsys, now):
    outcomes["torch"] |= now
    outcomes["fused_opt"] |= now
    assert run.main(sources(tmp_path)) == 1
    assert "expected, but does not occur: T::test_known_*\n" in capsys.readouterr().out


def test_sources_of_another_release_are_told(outcomes, tmp_path, capsys):
    run.main(sources(tmp_path, release="1.13.1"))
    assert f"are of torch 1.13.1, and {torch.__version__} is installed" in capsys.readouterr().out


def test_tests_that_do_not_run_are_an_error(outcomes, tmp_path, capsys):
    outcomes["torch"] |= {"T::test_known_cpu": PASSED}
    assert run.main(sources(tmp_path)) == 2
    assert "the tests did not run" in capsys.readouterr().err


def test_a_folder_without_the_tests_is_an_error(outcomes, tmp_path, capsys):
    assert run.main(str(tmp_path)) == 2
    assert f"there is no {tmp_path}/test/test_optim.py" in capsys.readouterr().err


def test_without_sources_it_is_skipped_with_a_message(capsys):
    assert run.main("") == 0
    printed = capsys.readouterr().out
    assert "skipped: no sources of torch were given; name a checkout with TORCH_SRC=" in printed


def test_without_expecttest_it_is_skipped_with_a_message(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert run.main(sources(tmp_path)) == 0
    assert "skipped: expecttest is not installed" in capsys.readouterr().out


def test_a_user_may_put_our_class_in_torchs_place(monkeypatch):
    """Whatever then asks torch for SGD gets ours, and ours still finds its base."""
    import fused_opt

    monkeypatch.setattr(torch.optim, "SGD", fused_opt.SGD)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    torch.optim.SGD([param], lr=0.5).step()
    assert torch.equal(param, torch.full((3,), 0.5))
