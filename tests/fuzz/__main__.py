"""`make fuzz MINUTES=n`: the state machines, and beside them the targets, each in its process.

python -m fuzz --minutes 30                            both halves, for 30 minutes
python -m fuzz machines --seed 7 --rounds 1            repeats a round of the machines
python -m fuzz sgd_state --input 00ff12                repeats an input of a target
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import native_variants

FOLDER = native_variants.ROOT / "build" / "fuzz"

#: The targets in their order, with the share of the time that each has.
SHARES = {
    "binding": 0.4,
    "sgd_state": 0.25,
    "ema_state": 0.25,
    "scaler_state": 0.05,
    "schedule_state": 0.05,
}
#: With this module of the sanitizers a bad access is found where it happens.
SANITIZED = {"binding": "asan"}


def main() -> int:
    arguments = _arguments()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.what is None:
        return run_all(arguments.minutes, arguments.seed)
    if native_variants.NATIVE in os.environ:
        sys.modules["fused_opt._C"] = native_variants.load(os.environ[native_variants.NATIVE])
    if arguments.what == "machines":
        from fuzz import machines

        counts = machines.run(arguments.minutes, arguments.seed, arguments.rounds)
    else:
        from fuzz import drive

        given = None if arguments.input is None else bytes.fromhex(arguments.input)
        counts = drive.run(arguments.what, arguments.minutes, arguments.seed, given)
    print(json.dumps(counts), flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("what", choices=["machines", *SHARES], nargs="?")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--rounds", type=int, help="of the machines, instead of the minutes")
    parser.add_argument("--input", help="of a target, in hexadecimal digits")
    return parser.parse_args()


def run_all(minutes: float, seed: int) -> int:
    """Both halves side by side, and a summary; 1 if either has found something."""
    sanitized = {target: native_variants.build(name) for target, name in SANITIZED.items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    machines = _started("machines", minutes, seed, None)
    results: dict[str, Any] = {}
    total = sum(SHARES.values())
    for target, share in SHARES.items():
        left = max(0.0, (end - time.monotonic()) / 60)
        process = _started(target, left * share / total, seed, sanitized.get(target))
        results[target] = _finished(target, process)
        total -= share
    results["machines"] = _finished("machines", machines)
    return _summary(results, seed)


def _log(what: str) -> Path:
    return FOLDER / f"{what}.log"


def _started(what: str, minutes: float, seed: int, module: Path | None) -> subprocess.Popen[bytes]:
    environ = dict(os.environ)
    if module is not None:
        environ = native_variants.environment(SANITIZED[what], module)
    # Beside each other, threads that wait must not keep the others from working.
    environ["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, "-X", "faulthandler", "-m", "fuzz", what]
    command += ["--minutes", f"{minutes:.3f}", "--seed", str(seed)]
    print(f"{what}: {minutes:.1f} minutes, into {_log(what)}", flush=True)
    with _log(what).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)


def _finished(what: str, process: subprocess.Popen[bytes]) -> dict[str, int] | None:
    """What it has counted; None if it has failed."""
    code = process.wait()
    lines = _log(what).read_text(errors="replace").splitlines()
    if code == 0:
        found: dict[str, int] = json.loads(lines[-1])
        return found
    print(f"{what} FAILED, exit code {code}; the end of {_log(what)}:")
    print("\n".join(lines[-40:]), flush=True)
    return None


def _summary(results: dict[str, Any], seed: int) -> int:
    for what, counts in results.items():
        print(f"\n{what}: {'FAILED' if counts is None else 'clean'}")
        for name, number in sorted((counts or {}).items()):
            print(f"  {number:>9,}  {name}")
    failed = [what for what, counts in results.items() if counts is None]
    print(f"\nseed {seed}: {'failed: ' + ', '.join(failed) if failed else 'no failure'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
