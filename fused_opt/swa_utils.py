"""Our kernel behind the averages of ``torch.optim.swa_utils``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from fused_opt._hyper import check_decay
from fused_opt.functional import ema_update_

MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], "Tensor | int"], None]


def get_ema_multi_avg_fn(decay: float | Tensor = 0.999) -> MultiAvgFn:
    r"""The exponential moving average for ``torch.optim.swa_utils.AveragedModel``.

    .. math:: s \leftarrow s + (1 - \beta)(p - s)

    Like torch's function of the same name, with two differences. The averages may have another
    dtype than the model: with torch, a float32 average of a bfloat16 model raises. And what is not
    a floating-point number is copied exactly: with ``use_buffers=True`` torch averages BatchNorm's
    ``num_batches_tracked`` as well and truncates the result, so that it falls behind and stays.

    The function can be pickled, and so can an ``AveragedModel`` that holds it.

    Args:
        decay: β, in [0, 1]; a one-element tensor on the parameters' GPU is read there.

    Returns:
        A function of the averages, the model's tensors, and the number of models averaged so far,
        which it does not need.

    Raises:
        ValueError: decay outside [0, 1].

    Example:
        >>> import fused_opt, torch
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = torch.nn.Linear(2, 1)
        >>> average = AveragedModel(model, multi_avg_fn=fused_opt.get_ema_multi_avg_fn(0.9))
        >>> average.update_parameters(model)
    """
    check_decay(decay)
    return partial(_ema_multi_avg, decay=decay)


def _ema_multi_avg(
    averages: Sequence[Tensor],
    tensors: Sequence[Tensor],
    num_averaged: Tensor | int,  # noqa: ARG001 - AveragedModel passes it to any function
    *,
    decay: float | Tensor,
) -> None:
    pairs = list(zip(averages, tensors, strict=True))
    numbers = [pair for pair in pairs if _is_number(pair[0])]
    ema_update_([s for s, _ in numbers], [p for _, p in numbers], decay=decay)
    for average, tensor in pairs:
        if not _is_number(average):
            average.copy_(tensor)


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
