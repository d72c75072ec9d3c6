"""Feeds a target with inputs for a time: those of atheris where it is installed, random ones else.

An input that fails is printed in hexadecimal digits, and belongs into test_fuzz_targets.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CORPUS = Path(__file__).resolve().parents[2] / "build" / "fuzz" / "corpus"
LONGEST_INPUT = 512


def run(name: str, minutes: float, seed: int, given: bytes | None) -> dict[str, int]:
    """Runs the target, and returns what it has counted."""
    torch.set_num_threads(1)
    has_atheris = importlib.util.find_spec("atheris") is not None
    if given is None and has_atheris:
        return _with_atheris(name, minutes, seed)
    from fuzz import targets

    target, inputs = _explained(name, targets.TARGETS[name]), 0
    if given is not None:
        target(given)
        return {"executions": 1, **targets.COUNTS}
    print("atheris is not installed: inputs are random", flush=True)
    source, end = random.Random(seed), time.monotonic() + 60 * minutes
    while inputs == 0 or time.monotonic() < end:
        target(source.randbytes(source.randrange(LONGEST_INPUT)))
        inputs += 1
    return {"executions": inputs, **targets.COUNTS}


def _with_atheris(name: str, minutes: float, seed: int) -> dict[str, int]:
    """Guided by what of fused_opt runs; the native module is not instrumented for coverage."""
    import atheris

    with atheris.instrument_imports(include=["fused_opt"]):
        import fused_opt  # noqa: F401
    from fuzz import targets

    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    target, inputs = _explained(name, targets.TARGETS[name]), 0
    end = time.monotonic() + 60 * minutes

    def one(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        target(data)
        if time.monotonic() > end:  # libFuzzer takes every exception for a fault, and never returns
            print(json.dumps({"executions": inputs, **targets.COUNTS}), flush=True)
            os._exit(0)

    options = [f"-seed={1 + seed % 2**31}", f"-max_len={LONGEST_INPUT}", "-timeout=120"]
    options += ["-rss_limit_mb=0", "-verbosity=0", "-handle_segv=0", "-handle_abrt=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, internal_libfuzzer=True)
    atheris.Fuzz()
    raise AssertionError("libFuzzer has returned")


def _explained(name: str, target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Keeps the input where a crash leaves it, and prints one that fails."""
    last = CORPUS.parent / f"{name}.last"
    last.parent.mkdir(parents=True, exist_ok=True)

    def run_target(data: bytes) -> None:
        last.write_text(data.hex())
        try:
            target(data)
        except BaseException:
            print(f"failed; to repeat: python -m fuzz {name} --input {data.hex()}", flush=True)
            raise

    return run_target
