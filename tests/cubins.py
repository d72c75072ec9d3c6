"""What cuobjdump says of the GPU code in a compiled module. Needs no GPU and no driver.

The tests of the build ask here, and so does .ci/gpu-check, which imports nothing else of tests/.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

#: How to get cuobjdump where there is none.
CURE = "pip install nvidia-cuda-cuobjdump"

#: What every module has, in whatever form; without one of them something was not read.
KINDS = ("step_kernel", "norm_kernel", "scale_kernel", "pass_kernel")


class Kernel(NamedTuple):
    """A kernel of one architecture, and the memory of each thread beside its registers."""

    arch: str
    name: str
    #: Bytes of arrays and of spilled registers.
    stack: int
    local: int


def _candidates() -> Iterator[Path]:
    for folder in map(Path, sys.path):
        yield from sorted(folder.glob("nvidia/*/bin/cuobjdump"))
        yield folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/cuobjdump")


def find_cuobjdump() -> str | None:
    """The path of cuobjdump: from a wheel, from PATH or from the toolkit."""
    return next((str(path) for path in _candidates() if path.is_file()), None)


def _ask(cuobjdump: str, *arguments: str | Path) -> str:
    command = [cuobjdump, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
    return result.stdout


def architectures(cuobjdump: str, module: Path) -> tuple[list[str], list[str]]:
    """The architectures of the machine code and of the PTX in a module, such as "90"."""
    listing = _ask(cuobjdump, "--list-elf", "--list-ptx", module)
    cubins = re.findall(r"\.sm_(\d+)\.cubin", listing)
    ptx = re.findall(r"\.sm_(\d+)\.ptx", listing)
    return sorted(set(cubins), key=int), sorted(set(ptx), key=int)


def kernels(cuobjdump: str, path: Path) -> list[Kernel]:
    """Every kernel of every architecture in a module, or in a cubin (whose arch is "")."""
    found = []
    for section in _ask(cuobjdump, "--dump-resource-usage", path).split("Fatbin "):
        arch = re.search(r"^arch = sm_(\d+)", section, re.M)
        rows = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", section)
        if len(rows) != section.count("Function "):
            raise RuntimeError(f"this cuobjdump describes functions in another way:\n{section}")
        found += [
            Kernel(arch[1] if arch else "", name, int(stack), int(local))
            for name, stack, local in rows
        ]
    return found


def problems(found: Sequence[Kernel], archs: Sequence[str]) -> list[str]:
    """What is wrong with the kernels of a module that was built for these architectures."""
    names = {arch: {kernel.name for kernel in found if kernel.arch == arch} for arch in archs}
    everything = {kernel.name for kernel in found}
    wrong = [
        f"sm_{arch} lacks {name}"
        for arch, present in names.items()
        for name in sorted(everything - present)
    ]
    for kind in KINDS:
        if not any(kind in name for name in everything):
            wrong.append(f"no {kind} was found")
    # Spilled registers lie on the stack. So does a copy of a kernel parameter that is indexed while
    # not `const __grid_constant__`: 19 KB that no count of spills shows.
    return wrong + [
        f"sm_{kernel.arch} {kernel.name}: stack frame {kernel.stack}, local {kernel.local} bytes"
        for kernel in found
        if kernel.stack or kernel.local
    ]
