"""What the doctor sees, as plain data: its findings, its text and its JSON all read this alone.

Releases are strings such as ``"13.0"``; architectures and compute capabilities are numbers such as
90. Standard library only, Python 3.9 or newer, as the rest of the doctor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Python:
    """This interpreter."""

    version: str
    executable: str
    platform: str


@dataclass(frozen=True)
class Package:
    """The Python files that are examined."""

    version: str | None
    folder: str
    source: str | None
    """The source tree that they are part of; None for an installed wheel."""


@dataclass(frozen=True)
class Program:
    """A program or file that a build uses."""

    name: str
    path: str | None
    version: str | None


@dataclass(frozen=True)
class Compiler:
    """An nvcc, healthy or not."""

    path: str
    source: str
    """Where its name came from: a variable, PATH, a folder, pip."""
    explicit: bool
    release: str | None
    tools: list[Program]
    host_compiler: str | None
    default_arch: int | None
    archs: list[int]
    problem: str | None
    warnings: list[str]


@dataclass(frozen=True)
class Build:
    """What a build would do here, or why it would refuse."""

    nvcc: str | None = None
    """None: it would be CPU-only."""
    buildable: list[int] = field(default_factory=list)
    """Every architecture that this nvcc can build."""
    cubins: list[int] = field(default_factory=list)
    ptx: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refusal: str | None = None


@dataclass(frozen=True)
class Module:
    """The compiled module ``fused_opt._C``."""

    path: str | None = None
    error: str | None = None
    """Why it cannot be imported."""
    hidden: str | None = None
    """Another fused_opt, which has a module, and which this one hides from ``import``."""
    version: str | None = None
    cuda_version: str | None = None
    cubins: list[int] = field(default_factory=list)
    ptx: list[int] = field(default_factory=list)
    cpu_isa: str | None = None
    cpu_isas: list[str] = field(default_factory=list)
    oldest_driver: str | None = None
    """The CUDA release of the oldest driver that runs all of it, and the name of its branch:"""
    oldest_driver_branch: str | None = None


@dataclass(frozen=True)
class Torch:
    """The torch that this interpreter imports."""

    version: str | None = None
    cuda_version: str | None = None
    gpus: int = 0
    """How many it can use."""
    error: str | None = None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver, as its own library describes it."""

    release: str | None = None
    """The newest CUDA release that it runs; None: there is no driver."""
    error: str | None = None
    """Why it does not start."""
    devices: bool = False
    """Whether the system has a device file of it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver shows to this process."""

    device: str
    """Its name in torch, such as cuda:0."""
    name: str
    capability: int
    code: str | None = None
    """What it would run of the module: "cubin", "ptx" (compiled by the driver), or None."""
    why_none: str | None = None


@dataclass(frozen=True)
class Step:
    """A step of one element, and what it left in the parameter, its momentum and its average."""

    device: str
    expected: list[float]
    found: list[float] | None = None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether these are the exact numbers."""
        return self.error is None and self.found == self.expected


@dataclass(frozen=True)
class Fault:
    """A section that the doctor could not finish."""

    section: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """Everything that was seen. None, or nothing in a list, where a section has a fault."""

    python: Python
    package: Package
    environment: dict[str, str] = field(default_factory=dict)
    compilers: list[Compiler] = field(default_factory=list)
    build: Build | None = None
    programs: list[Program] = field(default_factory=list)
    module: Module | None = None
    torch: Torch | None = None
    driver: Driver | None = None
    gpus: list[Gpu] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


# ---- Words and numbers ---------------------------------------------------------------------------


def dotted(numbers: Sequence[int]) -> str:
    """Returns a release as text.

    >>> dotted((13, 0))
    '13.0'
    """
    return ".".join(map(str, numbers))


def numbers(release: str) -> tuple[int, int]:
    """Returns the major and minor number of a release, for comparisons.

    >>> numbers("2.13.0+cpu") > numbers("2.9")
    True
    """
    found = [int(digits) for digits in re.findall(r"\d+", release)]
    return (*found, 0, 0)[0], (*found, 0, 0)[1]


def capability(value: int) -> str:
    """Returns a compute capability as people write it.

    >>> capability(120)
    '12.0'
    """
    return f"{value // 10}.{value % 10}"


def code(cubins: Sequence[object], ptx: Sequence[object]) -> str:
    """Names GPU code.

    >>> code([80, 90], [90])
    'machine code 80 90 and PTX 90'
    """
    machine, portable = (" ".join(map(str, archs)) or "none" for archs in (cubins, ptx))
    return f"machine code {machine} and PTX {portable}"


def counted(gpus: Sequence[Gpu]) -> str:
    """Names GPUs, with their number."""
    plural = "s" if len(gpus) != 1 else ""
    return f"{len(gpus)} GPU{plural} ({', '.join(gpu.name for gpu in gpus)})"
