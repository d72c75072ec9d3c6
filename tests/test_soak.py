"""A long run: no growth in memory, and no drift from float64 beyond what rounding explains.

The loop is training: gradients are those of a quadratic, g = a (p - t) with 0 < a <= 1, at the
parameters as they are. It contracts, so that errors do not grow; see `drift` for how large they can
become. On a problem that is chaotic, two correct runs part within a few hundred steps.
"""

import ctypes
import gc
import sys

import pytest
import torch
from reference import assert_same_bits, random_tensor
from torch import Tensor
from torch.nn import Parameter

from fused_opt import EMA, SGD

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

STEPS = 100_000
NUMEL = 64
LR, MOMENTUM, DECAY, LOWEST = 0.1, 0.9, 0.99, 0.05

#: How far a parameter may be from the float64 oracle, in units of its dtype's eps.
#:
#: The error e of (parameter, momentum) obeys e' = M e + r, with the matrix of the exact step on one
#: element of curvature a, M = [[1 - lr a, -lr mu], [a, mu]], and r what one step rounds. All
#: parameters, targets and momenta stay below B = 4 in magnitude. A step takes five rounded
#: operations, on a gradient of two: together |r| <= 8 * (eps / 2) * B, in each of both. Summed up,
#: |e| <= sum_k |M^k| |r|, where sum_k |M^k| in the largest-row norm is computed below for the
#: curvatures in use. The average follows with a factor of at most 1, and one lerp of three
#: operations each step, |r'| <= 3 * (eps / 2) * B, sums up to r' / (1 - decay).
BOUND_OF_VALUES = 4.0


def gain(curvature: float) -> float:
    """The sum of the norms of M^k: what an error of each step adds up to at most."""
    step = torch.tensor(
        [[1 - LR * curvature, -LR * MOMENTUM], [curvature, MOMENTUM]], dtype=torch.float64
    )
    power, total = torch.eye(2, dtype=torch.float64), 0.0
    for _ in range(20_000):
        total += float(power.abs().sum(1).max())
        power = step @ power
    return total


def drift(dtype: torch.dtype) -> tuple[float, float]:
    """What a parameter and its average may be off."""
    half_eps = torch.finfo(dtype).eps / 2
    of_param = max(gain(a) for a in (LOWEST, 0.1, 0.3, 1.0)) * 8 * half_eps * BOUND_OF_VALUES
    return of_param, of_param + 3 * half_eps * BOUND_OF_VALUES / (1 - DECAY)


class Problem:
    """A parameter on a quadratic, and how its gradient is made without new tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.param = Parameter(random_tensor((NUMEL,), F32, seed=1).clamp(-1, 1).to(dtype))
        self.curvature = torch.linspace(LOWEST, 1, NUMEL, dtype=torch.float64).to(dtype)
        self.target = random_tensor((NUMEL,), F32, seed=2).clamp(-1, 1).to(dtype)
        self.param.grad = torch.zeros_like(self.param)

    def set_grad(self, sign: int) -> None:
        """Towards targets of one sign and the other, so that it never comes to rest."""
        grad = self.param.grad
        torch.sub(self.param.detach(), self.target, alpha=sign, out=grad)
        grad.mul_(self.curvature)


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]
    IN_MAPS, IN_USE = 4, 7  # hblkhd, uordblks


def allocated() -> list[int]:
    """What is allocated: blocks of Python's allocator, objects that it tracks, bytes of malloc.

    Resident pages would tell less: the kernel makes huge pages of small ones when it likes.
    """
    gc.collect()
    found = [sys.getallocatedblocks(), len(gc.get_objects())]
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = MallocInfo
        info = mallinfo()
        fields = [getattr(info, name) for name, _ in MallocInfo._fields_]
        found.append(fields[MallocInfo.IN_MAPS] + fields[MallocInfo.IN_USE])
    return found


@pytest.mark.slow
def test_a_long_training_neither_grows_nor_drifts():
    problems = [Problem(F32), Problem(F64), Problem(BF16), Problem(BF16), Problem(BF16)]
    params = [problem.param for problem in problems]
    ema = EMA(params, DECAY)
    groups = [
        {"params": params[:2], "max_grad_norm": 1e30},
        {"params": [params[2]], "master_weights": "split"},
        {"params": [params[3]], "master_weights": "fp32"},
        {"params": [params[4]], "stochastic_rounding": True},
    ]
    optimizer = SGD(groups, lr=LR, momentum=MOMENTUM, ema=ema, max_grad_norm=1e30)
    exact = [Problem(F64), Problem(F64)]
    exact[0].target = problems[0].target.double()
    exact[0].curvature = problems[0].curvature.double()
    with torch.no_grad():
        for mine, theirs in zip(problems[:2], exact, strict=True):
            theirs.param.copy_(mine.param)
    oracle = torch.optim.SGD([p.param for p in exact], lr=LR, momentum=MOMENTUM, foreach=False)
    averages: list[Tensor] = [p.param.detach().clone() for p in exact]
    allowed = [drift(F32), drift(F64)]
    worst = [[0.0, 0.0], [0.0, 0.0]]
    before: list[int] = []
    for step in range(STEPS):
        sign = 1 if (step // 500) % 2 == 0 else -1
        for problem in problems:
            problem.set_grad(sign)
        optimizer.step()
        for problem in exact:
            problem.set_grad(sign)
        oracle.step()
        for average, problem in zip(averages, exact, strict=True):
            average.lerp_(problem.param.detach(), 1 - DECAY)
        if step % 500 == 499:
            for k in range(2):
                shadow = ema.shadows[str(k)].double()
                errors = (params[k].double() - exact[k].param, shadow - averages[k])
                for i, error in enumerate(errors):
                    worst[k][i] = max(worst[k][i], float(error.detach().abs().max()))
            assert_same_bits(params[2], params[3], "split and whole masters")
            assert float(params[4].detach().abs().max()) < BOUND_OF_VALUES
        if step == STEPS // 5:
            before = allocated()
    after = allocated()
    for k in range(2):
        for found, limit in zip(worst[k], allowed[k], strict=True):
            assert found <= limit, (k, worst, allowed)
    assert worst[0][0] > 0, "float32 cannot be exact"
    assert ema.num_updates == STEPS
    # Blocks, objects, and bytes: in all, not for each of the 80,000 steps.
    for found, known, limit in zip(after, before, (50, 50, 4096), strict=False):
        assert found <= known + limit, (before, after)
