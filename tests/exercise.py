"""Every kind of kernel once, on few numbers: what .ci/gpu-check runs under compute-sanitizer.

The same runs on the CPU first, whose bits the GPU must have. Run as a program with the name of the
device, `cuda` unless named; it needs no pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# Run as a file, its folder is on sys.path and the checkout is not.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import fused_opt
from fused_opt import clip
from fused_opt.functional import ema_update, sgd_step

#: Below and above a vector of 16 bytes and the chunks of the kernels, and nothing at all.
SIZES = (0, 1, 7, 8, 17, 257, 4099, 16385)
#: More tensors than the tables of a launch hold.
MANY = 760

Scenario = Callable[[torch.device], Iterable[Tensor]]


def host_data(size: int, dtype: torch.dtype) -> Tensor:
    """The same numbers in every run, computed on the host: the sanitizers see a plain copy."""
    return (torch.arange(size, dtype=torch.float32) % 23 / 8 - 1.25).to(dtype)


def parameters(device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> list[Tensor]:
    """Parameters with gradients. One of them begins in the middle of a vector."""
    found = []
    for size in sizes:
        whole = host_data(size + 1, dtype).to(device)
        param = nn.Parameter(whole[1:] if size == 257 else whole[:size])
        param.grad = host_data(size, dtype).to(device)
        found.append(param)
    return found


def stepping(dtype: torch.dtype, sizes: Iterable[int] = SIZES, **options: object) -> Scenario:
    """Three steps of SGD with an EMA."""

    def run(device: torch.device) -> list[Tensor]:
        params = parameters(device, dtype, sizes)
        ema = fused_opt.EMA(params, decay=0.9)
        optimizer = fused_opt.SGD(params, lr=0.1, momentum=0.9, ema=ema, **options)
        for _ in range(3):
            optimizer.step()
        state = [optimizer.state[param].values() for param in params]
        kept = [value for values in state for value in values if isinstance(value, Tensor)]
        return [*params, *ema.shadows.values(), *kept]

    return run


def clipping(norm_type: float) -> Scenario:
    """A norm of gradients, and the pass that scales them."""

    def run(device: torch.device) -> list[Tensor]:
        params = parameters(device, torch.float32, SIZES)
        norm = clip.clip_grad_norm_(params, 0.5, norm_type)
        return [norm, *(param.grad for param in params if param.grad is not None)]

    return run


def passing(device: torch.device) -> list[Tensor]:
    """A differentiable step and average, and their backward."""
    params = parameters(device, torch.float32, SIZES[1:])
    rate = host_data(1, torch.float32).to(device).requires_grad_()
    buffers = [host_data(param.numel(), torch.float32).to(device) for param in params]
    stepped, _ = sgd_step(params, [param.grad for param in params], buffers, lr=rate, momentum=0.9)
    averages = ema_update([param.detach() for param in params], stepped, decay=0.5)
    ones = [torch.ones(average.numel()).to(device) for average in averages]
    return [*stepped, *averages, *torch.autograd.grad(averages, [rate, *params], ones)]


SCENARIOS: dict[str, Scenario] = {
    "steps in fp32": stepping(torch.float32),
    "steps in fp64": stepping(torch.float64),
    "steps in fp16, gradients reset": stepping(torch.float16, reset_grads=True),
    "many tensors": stepping(torch.float32, [3] * MANY),
    "clipped steps": stepping(torch.float32, max_grad_norm=0.5),
    "fp32 masters": stepping(torch.bfloat16, master_weights="fp32"),
    "split masters": stepping(torch.bfloat16, master_weights="split"),
    "compensation": stepping(torch.float16, master_weights="kahan"),
    "stochastic rounding": stepping(torch.bfloat16, stochastic_rounding=True),
    "capturable steps": stepping(torch.float32, capturable=True),
    "clipping": clipping(2.0),
    "clipping by the largest": clipping(float("inf")),
    "differentiable passes": passing,
}


def differences(scenario: Scenario, device: torch.device) -> int:
    """How many tensors differ from the CPU's in a bit. They are compared on the host."""
    expected = [tensor.detach() for tensor in scenario(torch.device("cpu"))]
    found = [tensor.detach().cpu() for tensor in scenario(device)]
    pairs = zip(expected, found, strict=True)
    return sum(bits(a) != bits(b) for a, b in pairs)


def bits(tensor: Tensor) -> bytes:
    """The memory of a tensor of the host."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main() -> int:
    """Runs every scenario; the last line of the output says how it went."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    wrong = []
    for name, scenario in SCENARIOS.items():
        count = differences(scenario, device)
        print(f"{name}: {f'{count} tensors differ' if count else 'the same bits'}", flush=True)
        if count:
            wrong.append(name)
    if wrong:
        print(f"not the CPU's bits: {', '.join(wrong)}")
        return 1
    print(f"{len(SCENARIOS)} scenarios have the CPU's bits on {device.type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
