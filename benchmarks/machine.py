"""What a result must say about where it comes from: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import fused_opt

ROOT = Path(__file__).resolve().parents[1]


def machine_name(device: torch.device) -> str:
    """Returns the name of the GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> int:
    """Returns the memory that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in meminfo if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def git(*arguments: str) -> str | None:
    """Returns the output of a git command in the repository, or None where git cannot answer."""
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def provenance(device: torch.device) -> dict[str, str]:
    """Returns the columns that every row of one run shares.

    A copy of the sources without git takes the commit from the variable `BENCHMARK_COMMIT`.
    """
    # The results themselves do not count: recording a first run must not make the next one dirty.
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    build = fused_opt.build_info()
    return {
        "commit": git("rev-parse", "HEAD") or os.environ.get("BENCHMARK_COMMIT", "unknown"),
        "dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "machine": machine_name(device),
        "device": device.type,
        "torch": torch.__version__,
        "fused_opt": fused_opt.__version__,
        "cuda": build["cuda_version"] or "",
        "cpu_isa": build["cpu_isa"],
    }
