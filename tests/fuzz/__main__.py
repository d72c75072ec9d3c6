"""`make fuzz MINUTES=n`: the state machines, and beside them the targets of atheris."""

from __future__ import annotations

import argparse
import json
import random
import sys

from fuzz import machines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("what", choices=["machines"], nargs="?")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    counts = machines.run(arguments.minutes, arguments.seed)
    print(json.dumps(counts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
