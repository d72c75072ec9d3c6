"""Clipping by the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from types import GeneratorType

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fused_opt._hyper import ClipHyper
from fused_opt._plan import thread_plan


@_disable_dynamo
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scales all gradients down, in place, so that their common norm is at most ``max_norm``.

    .. math::
        n = \Bigl(\sum_{p} \sum_i |g_{p,i}|^2\Bigr)^{1/2}, \qquad
        g \leftarrow \min\Bigl(1, \frac{n_\text{max}}{n + 10^{-6}}\Bigr) \, g

    A drop-in for ``torch.nn.utils.clip_grad_norm_``: one pass over the gradients for the norm and
    one that scales them, which writes nothing where they are short enough. To clip without the
    second pass, use ``fused_opt.SGD(..., max_grad_norm=...)``.

    The norm has the same bits for any number of threads, any CPU level, and on CPU and CUDA: every
    gradient is summed in 2048 lanes over chunks of 16384 elements, in float32 (float64 for
    float64), and everything beyond a chunk in float64. A float32 norm of 2 is within 1e-6 of the
    exact one, however many elements there are. As in torch, squares overflow: an element beyond
    1.8e19 makes the norm inf, and below 1e-19 squares lose their digits. A norm that is inf or NaN
    scales finite gradients to 0 or NaN.

    Sparse and complex gradients and tensor subclasses take part through torch's own operations.
    Nothing waits for the GPU unless ``error_if_nonfinite`` asks, or gradients lie on CPU and GPU.

    Args:
        parameters: a tensor or an iterable of tensors, whose ``grad`` may be None; of any shapes,
            dtypes and devices.
        max_norm: the largest norm that is left alone.
        norm_type: p. 2 and inf are computed as above; with any other, torch's own function runs.
        error_if_nonfinite: raises where the norm is inf or NaN.
        foreach: selects nothing, except where torch's own function runs.

    Returns:
        The norm of the gradients as they were, a tensor of no dimensions on the first gradient's
        device: float64 where a gradient is, and otherwise float32, where torch's has the dtype of
        the gradients. 0 if there are no gradients.

    Raises:
        RuntimeError: ``error_if_nonfinite``, and the norm is. Nothing has changed.
        ValueError: gradients of different parameters share memory. Nothing has changed.

    Example:
        >>> import torch
        >>> from fused_opt import clip_grad_norm_
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([p], max_norm=1.0)
        tensor(5.)
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if isinstance(parameters, GeneratorType) and not tensors:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.",
            stacklevel=4,  # past two frames of the decorator
        )
    return _clip(tensors, max_norm, norm_type, error_if_nonfinite, foreach)


@torch.no_grad()
def _clip(
    tensors: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
) -> Tensor:
    grads = [p.grad for p in tensors if p.grad is not None]
    order = float(norm_type)
    if not _is_ours(grads, order):
        return torch.nn.utils.clip_grad_norm_(
            tensors, max_norm, norm_type, error_if_nonfinite, foreach
        )
    with thread_plan(grads) as plan:
        plan.add_grads(grads)
        plan.check()
        hyper = ClipHyper(float(max_norm), infinity=order != 2.0)
        clip = plan.grad_norm(hyper, grads[0].device)
        norm = clip.norm()
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(_NONFINITE.format(order))
        plan.scale_grads(clip)
    return norm


def _is_ours(grads: list[Tensor], order: float) -> bool:
    """Whether the norm is computed here, or by torch's own function with all it does."""
    # A gradient that is there twice counts twice, and is scaled twice, one after the other.
    distinct = len(set(map(id, grads))) == len(grads)
    # The norm of nothing but DTensors is one too.
    plain = any(type(grad).__torch_dispatch__ is Tensor.__torch_dispatch__ for grad in grads)
    return order in (2.0, float("inf")) and distinct and plain


# torch's words.
_NONFINITE = (
    "The total norm of order {} for gradients from `parameters` is non-finite, so it cannot be "
    "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
    "`error_if_nonfinite=False`"
)
