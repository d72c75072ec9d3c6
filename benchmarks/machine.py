"""What a result says about where it comes from: machine, its state as found, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import fused_opt

ROOT = Path(__file__).resolve().parents[1]
PEER_PACKAGES = ("torch-ema", "ema-pytorch", "timm", "apex", "triton")
UNKNOWN_CACHE_BYTES = 64 << 20  # taken where Linux does not say how large the last cache is


def output_of(*command: str) -> str | None:
    """Returns what a command prints, or None where it is not there or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def cpuinfo(key: str) -> str | None:
    """Returns the first value of a key in /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.partition(":")[0].strip() == key:
            return line.partition(":")[2].strip()
    return None


def machine_name(device: torch.device) -> str:
    """Returns the name of the GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpuinfo("model name") or platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> int:
    """Returns the memory that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in meminfo if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


@cache
def last_cache_bytes(device: torch.device | None = None) -> int:
    """Returns the size of the CPU's last cache, or of the L2 cache of a GPU."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=UNKNOWN_CACHE_BYTES)


def state_as_found(device: torch.device) -> dict[str, str]:
    """Returns driver, clocks and power; empty what the machine does not tell."""
    if device.type == "cuda":
        return gpu_state(device)
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    governor = f", governor {folder.read_text().strip()}" if folder.exists() else ""
    mhz = cpuinfo("cpu MHz")
    clocks = f"{float(mhz):.0f} MHz{governor}" if mhz else ""
    return {"driver": "", "clocks": clocks, "power": ""}


def gpu_state(device: torch.device) -> dict[str, str]:
    """Returns what nvidia-smi says of a GPU; it is asked, and nothing is set."""
    state = dict.fromkeys(("driver", "clocks", "power"), "")
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit"
    query = (f"--query-gpu={fields}", "--format=csv,noheader")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = (f"--id=GPU-{uuid}",) if uuid else ()
    answer = output_of("nvidia-smi", *query, *which) or output_of("nvidia-smi", *query)
    parts = [part.strip() for part in (answer or "").splitlines()[:1] for part in part.split(",")]
    if len(parts) == len(fields.split(",")):
        driver, sm, most, memory, draw, limit = parts
        state["driver"] = driver
        state["clocks"] = f"SM {sm} of {most}, memory {memory}"
        state["power"] = f"{draw} of {limit}"
    return state


def git(*arguments: str) -> str | None:
    """Returns the output of git in the checkout of the benchmarks, or None where there is none."""
    if not (ROOT / "pyproject.toml").exists():  # installed: a repository around it is another's
        return None
    return output_of("git", "-C", str(ROOT), *arguments)


def package_version(name: str) -> str | None:
    """Returns the version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(device: torch.device) -> dict[str, str]:
    """Returns the columns that every row of one run shares.

    A copy of the sources without git takes the commit from the variable `BENCHMARK_COMMIT`.
    """
    # Results and plots do not count: recording a first run must not make the next one dirty.
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    build = fused_opt.build_info()
    peers = [(name, package_version(name)) for name in PEER_PACKAGES]
    return {
        "commit": git("rev-parse", "HEAD") or os.environ.get("BENCHMARK_COMMIT", "unknown"),
        "dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "machine": machine_name(device),
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_opt": fused_opt.__version__,
        "cuda": torch.version.cuda or "",
        "module_cuda": build["cuda_version"] or "",
        "cpu_isa": build["cpu_isa"],
        "peers": ", ".join(f"{name} {version}" for name, version in peers if version),
        **state_as_found(device),
    }
