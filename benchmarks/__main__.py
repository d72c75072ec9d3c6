"""`python -m benchmarks`, or `python -m fused_opt.benchmarks` of an installed package."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"The benchmarks need the package {error.name}, which is not installed: "
            f"`pip install {error.name}`, or all of them with `pip install 'fused_opt[bench]'`."
        )
    app(prog_name=f"python -m {__package__}")
