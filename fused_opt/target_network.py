"""Target networks: the averaged copy of a network that another loss compares it with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fused_opt._decay_rules import DecayRule
from fused_opt._ema_names import _elements
from fused_opt._shadows import WIDER
from fused_opt.ema import EMA, Buffers

#: What of an EMA's state is not in the parameters and buffers of the target.
_EXTRA_STATE = ("decay", "num_steps", "update_every", "update_after_step")


class TargetNetwork(nn.Module):
    r"""An averaged copy of a network, which runs like it and is never trained.

    .. math:: \xi \leftarrow \tau \xi + (1 - \tau)\,\theta

    with the online network's parameters θ, the target's ξ, and the decay τ: MoCo's key encoder
    (He et al., 2019), the targets of BYOL (Grill et al., 2020) and DINO (Caron et al., 2021), soft
    Q targets (Lillicrap et al., 2015), and with ``decay=0, update_every=C`` DQN's target (Mnih et
    al., 2015), a copy of every C-th step.

    Its parameters are the shadows of an :class:`EMA` of the online network and never require
    gradients. :meth:`update` moves them after a step of the optimizer, and ``SGD(..., ema=target)``
    in the step; either way it is once per step of the optimizer, however many batches that step
    has accumulated.

    The online network is no part of the target: a module may hold both, and ``parameters()``,
    ``state_dict()`` and ``to()`` of the target are its own. To copy or pickle the target alone
    takes a copy of the online network along, which the new target follows; copied together, the
    copies belong together.

    Parameters have the online network's dtypes, and float32 for bfloat16 and float16, in which an
    average with a decay near 1 stops moving; ``to()``, ``half()`` and ``bfloat16()`` leave them so.
    Such a target wants float32 inputs, or ``torch.autocast``.

    ``train()`` and ``eval()`` are the user's. As MoCo, BYOL and DINO have it, a target in training
    mode normalizes by the batch, and with ``buffers="ignore"`` its BatchNorm gathers statistics of
    its own, which ``"copy"`` replaces by the online network's at every update. In eval mode, as
    reinforcement learning and distillation have it, ``"copy"`` and ``"average"`` are for targets
    whose statistics must follow.

    Args:
        online: the network to follow; what ``torch.compile`` or ``DistributedDataParallel`` has
            wrapped is taken out.
        decay: τ, in [0, 1]; a number, a schedule, or whatever else :class:`EMA` takes for one
            average.
        dtype: of the floating-point parameters and buffers.
        buffers: ``"copy"``, ``"average"`` or ``"ignore"``, as of :class:`EMA`.
        update_every: how many steps to take for an update.
        update_after_step: how many steps only copy.

    Attributes:
        module: the averaged copy itself, for what ``forward`` does not reach.
        ema: the average that it holds, with its ``decay`` and its counters.

    Raises:
        ValueError: as :class:`EMA`; or several decays.

    Example:
        >>> import torch
        >>> from fused_opt import SGD, TargetNetwork
        >>> online = torch.nn.Linear(2, 2)
        >>> target = TargetNetwork(online, decay=0.99)
        >>> optimizer = SGD(online.parameters(), lr=0.1, ema=target)
        >>> x = torch.ones(1, 2)
        >>> loss = torch.nn.functional.mse_loss(online(x), target(-x))
        >>> loss.backward()
        >>> optimizer.step()
        >>> target.ema.num_updates
        1
    """

    def __init__(
        self,
        online: nn.Module,
        decay: DecayRule = 0.999,
        *,
        dtype: torch.dtype | None = None,
        buffers: Buffers = "copy",
        update_every: int = 1,
        update_after_step: int = 0,
    ) -> None:
        super().__init__()
        online = _unwrapped(online)
        self.ema = EMA(
            online,
            decay,
            dtype=dtype,
            buffers=buffers,
            update_every=update_every,
            update_after_step=update_after_step,
        )
        if isinstance(self.ema.decay, list):
            raise ValueError(f"decay: expected one for a target network, got {decay!r}")
        self.module = _twin(online, dtype)
        self.training = online.training
        self.ema._keep_in(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged copy."""
        return self.module(*args, **kwargs)

    def update(self) -> None:
        """Moves the target, after a step of the online network's optimizer.

        Raises:
            RuntimeError: the target is attached to an optimizer, whose steps update it.
        """
        self.ema.update()

    def get_extra_state(self) -> dict[str, Any]:
        """The decay and the counters of the EMA, whose averages are the parameters."""
        state = self.ema.state_dict()
        return {key: state[key] for key in _EXTRA_STATE}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.ema.load_state_dict({**self.ema.state_dict(), **state})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TargetNetwork:
        """Moves and converts, but never to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in WIDER and tensor.dtype not in WIDER:
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _unwrapped(online: nn.Module) -> nn.Module:
    while isinstance(online, (DistributedDataParallel, DataParallel)):
        online = online.module
    inner = getattr(online, "_orig_mod", None)  # what torch.compile has wrapped
    return online if inner is None else _unwrapped(inner)


def _twin(online: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A deep copy without gradients; tensors that share elements become one."""
    memo: dict[int, Tensor] = {}
    of_elements: dict[Any, Tensor] = {}
    for tensor in (*online.parameters(), *online.buffers()):
        elements = _elements(tensor)
        if elements not in of_elements:
            copied = tensor.detach().to(_dtype_of(tensor, dtype), copy=True)
            is_param = isinstance(tensor, nn.Parameter)
            of_elements[elements] = nn.Parameter(copied, False) if is_param else copied
        memo[id(tensor)] = of_elements[elements]
    return copy.deepcopy(online, memo)


def _dtype_of(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What the target's copy of a tensor has."""
    if dtype is not None and tensor.is_floating_point():
        return dtype
    return WIDER.get(tensor.dtype, tensor.dtype)
