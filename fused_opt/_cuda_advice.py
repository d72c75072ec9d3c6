"""What to do about an error that a step on a GPU has met."""

from __future__ import annotations

import torch

from fused_opt._native import native


def cuda_advice(code: int, device: int = 0) -> str:
    """What to do about a ``cudaError_t`` that a step on a GPU has met."""
    # Imported where there is an error to explain, to keep the import of fused_opt short.
    from fused_opt._doctor_findings import oldest_driver

    cuda = native().cuda_version or "12.1"
    release, branch = oldest_driver(cuda)
    driver = f"{branch or 'one'} (CUDA {release})"
    advice = _CUDA_ADVICE.get(code, "The CUDA runtime's documentation describes this error.")
    advice = advice.format(cuda=cuda, driver=driver)
    if code not in _WITHOUT_CODE:
        return advice
    return f"{_code_for_gpu(device)}. {advice}: {rebuild_command(device)}"


def _code_for_gpu(device: int) -> str:
    """What a GPU is, and what the module has for it to run."""
    from fused_opt._doctor_facts import code

    built = native()
    gpu = f"cuda:{device} is of an unknown architecture"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        gpu = f"{name} (cuda:{device}) is of architecture {_arch(device)}"
    has = code(built.cuda_archs, built.ptx_archs)
    return f"{gpu}, and fused_opt was built with {has}, none of which runs there"


def rebuild_command(device: int) -> str:
    """The command that builds the module for a GPU."""
    from fused_opt._doctor_findings import build_command, source_tree

    return build_command(source_tree(), [_arch(device)] if torch.cuda.is_available() else [])


def _arch(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_WITHOUT_CODE = (209, 222)  # The GPU is named before the advice, the command that builds after it.
_DOCTOR = "`python -m fused_opt.doctor` shows what is there"
_CUDA_ADVICE = {
    3: (  # cudaErrorInitializationError
        "The process was forked after CUDA had been used, which CUDA does not survive. Start "
        "workers with multiprocessing's 'spawn' or 'forkserver' method."
    ),
    35: (  # cudaErrorInsufficientDriver
        "The NVIDIA driver is too old for this build, made with CUDA {cuda}. Update the driver to "
        "{driver} or newer, or rebuild fused_opt with an older nvcc, 12.1 at the least, named by "
        f"FUSED_OPT_NVCC. {_DOCTOR}."
    ),
    100: (  # cudaErrorNoDevice
        "No GPU is visible. Check nvidia-smi and CUDA_VISIBLE_DEVICES, and in a container that it "
        f"was started with its GPUs. {_DOCTOR}."
    ),
    209: f"{_DOCTOR}. Rebuild it for this GPU",  # cudaErrorNoKernelImageForDevice
    222: (  # cudaErrorUnsupportedPtxVersion
        "The driver is older than CUDA {cuda} and does not understand that PTX. "
        f"{_DOCTOR}. Update the driver, or rebuild with machine code for this GPU"
    ),
    801: (  # cudaErrorNotSupported
        "A driver older than R530 (CUDA 12.1) refuses the kernel parameters above 4 KB of a long "
        f"list of tensors: update it. {_DOCTOR}."
    ),
}
