"""What the compiled module was built from and what it chose on this machine."""

from __future__ import annotations

from typing import TypedDict

from fused_opt._native import native


class BuildInfo(TypedDict):
    """The dict that :func:`build_info` returns."""

    version: str
    cuda_version: str | None
    cuda_archs: list[str]
    ptx_archs: list[str]
    cpu_isa: str


def build_info() -> BuildInfo:
    """Returns how the native module ``fused_opt._C`` was built.

    Returns:
        A new dict with these keys:

        - ``version``: the version of fused_opt it was built from, ``"0.1.0"``;
        - ``cuda_version``: the CUDA release that compiled the kernels, such as ``"13.0"``, or None
          for a CPU-only module;
        - ``cuda_archs``: the GPU architectures with machine code in the module, as digit strings,
          lowest first (``"90"`` is compute capability 9.0); empty for a CPU-only module;
        - ``ptx_archs``: the architectures kept as PTX, which the driver compiles for newer GPUs;
        - ``cpu_isa``: the level of the CPU loops that runs here: ``"baseline"``, ``"x86-64-v3"``
          (AVX2) or ``"x86-64-v4"`` (AVX-512).

    Raises:
        ImportError: the native module is not built; the message says how to build it.

    Example:
        >>> import fused_opt
        >>> info = fused_opt.build_info()
        >>> info["version"] == fused_opt.__version__
        True
        >>> (info["cuda_version"] is None) == (info["cuda_archs"] == [])
        True
    """
    module = native()
    return BuildInfo(
        version=module.version,
        cuda_version=module.cuda_version,
        cuda_archs=list(module.cuda_archs),
        ptx_archs=list(module.ptx_archs),
        cpu_isa=module.cpu_isa(),
    )
