"""The `cuda` marker, the `device` fixture, the thread count and the hypothesis profile."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator

import native_variants
import pytest
import torch

# A variant of the module is loaded under the name of the package's own before the package is, and
# entered there as an import would do it.
if native_variants.NATIVE in os.environ:
    variant = native_variants.load(os.environ[native_variants.NATIVE])
    sys.modules["fused_opt._C"] = variant
    importlib.import_module("fused_opt").__dict__["_C"] = variant

#: Names the ISA level that all tests run on, unless they choose one themselves.
ISA = "FUSED_OPT_TEST_ISA"
if ISA in os.environ:
    importlib.import_module("fused_opt._C").set_cpu_isa(os.environ[ISA])

#: With this variable set to 1, a `cuda` test fails where there is no GPU instead of being skipped.
REQUIRE_GPU = "FUSED_OPT_REQUIRE_GPU"

#: Two threads, so that work is shared out even on the smallest machine, and no more than it has.
TEST_THREADS = 2

try:
    from hypothesis import settings
except ImportError:  # .ci/gpu-check runs with the packages that a machine has.
    pass
else:
    # The same examples in every run: a failure that a change causes is never a matter of luck.
    settings.register_profile(
        "fused_opt", derandomize=True, max_examples=100, deadline=None, database=None
    )
    settings.load_profile("fused_opt")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get(REQUIRE_GPU) == "1":
        pytest.fail(f"no GPU is available, and {REQUIRE_GPU}=1 asks for one", pytrace=False)
    pytest.skip("no GPU is available")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that a step runs on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def pinned_threads() -> Iterator[None]:
    """Gives each test the same thread count, whatever the machine has or another test has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(TEST_THREADS)
    yield
    torch.set_num_threads(before)
