"""Polyak averaging: the soft update that moves a target network towards the network it follows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fused_opt._ema_names import named
from fused_opt._hyper import check_decay
from fused_opt.functional import ema_update_


@torch.no_grad()
def polyak_update_(
    target: nn.Module | Iterable[Tensor], source: nn.Module | Iterable[Tensor], tau: float | Tensor
) -> None:
    r"""Moves every target towards its source, in one pass over memory.

    .. math:: t \leftarrow t + \tau (s - t)

    One update of an average with decay 1 − τ (Lillicrap et al., "Continuous control with deep
    reinforcement learning", 2015); τ = 1 copies exactly and τ = 0 keeps exactly. Modules are
    matched by name, without what ``torch.compile`` and ``DistributedDataParallel`` put into names:
    their parameters are averaged, frozen ones too, and their buffers are copied exactly, so that
    BatchNorm's statistics and its counter are the source's. Lists are matched by order, and all of
    their tensors are averaged.

    Args:
        target: a module or an iterable of tensors, updated in place. It may have other dtypes than
            the source: an average of bfloat16 weights stalls in bfloat16 and does not in float32.
        source: of the same names and shapes, and on the same devices.
        tau: τ, in [0, 1]; a one-element tensor on the parameters' GPU is read there.

    Raises:
        ValueError: names, lengths, shapes or devices differ, or tau is outside [0, 1]. Nothing has
            changed.
        TypeError: a module beside a list, or something in a list is no tensor. Nothing has changed.

    Example:
        >>> import torch
        >>> from fused_opt import polyak_update_
        >>> critic, target = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> _ = torch.nn.init.ones_(critic.weight), torch.nn.init.zeros_(target.weight)
        >>> polyak_update_(target, critic, tau=0.25)
        >>> target.weight.item()
        0.25
    """
    check_decay(tau, "tau")
    targets, sources = _Tensors(target, "target"), _Tensors(source, "source")
    if targets.are_listed != sources.are_listed:
        raise TypeError("expected two modules or two iterables of tensors, got one of each")
    _check_match(targets.params | targets.buffers, sources.params | sources.buffers)
    # In double, where 1 - (1 - tau) is tau to all the digits that a float32 update can tell.
    decay = 1 - (tau.double() if isinstance(tau, Tensor) else tau)
    names = list(sources.params)
    ema_update_(
        [targets.params[name] for name in names],
        [sources.params[name] for name in names],
        decay=decay,
    )
    for name, buffer in targets.buffers.items():
        buffer.copy_(sources.buffers[name])


class _Tensors:
    """The tensors of one side by name; those of a list are known by their place in it."""

    def __init__(self, tensors: nn.Module | Iterable[Tensor], side: str) -> None:
        self.are_listed = not isinstance(tensors, nn.Module)
        self.params: dict[str, Tensor]
        self.buffers: dict[str, Tensor] = {}
        if isinstance(tensors, nn.Module):
            names = named(tensors)
            found = names.tensors
            self.params = {name: found[name] for name in names.params}
            self.buffers = {name: found[name] for name in names.buffers}
            return
        if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
            raise TypeError(
                f"{side}: expected a module or an iterable of tensors, got {type(tensors).__name__}"
            )
        self.params = {str(i): tensor for i, tensor in enumerate(tensors)}
        for name, tensor in self.params.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{side}[{name}]: expected a tensor, got {type(tensor).__name__}")


def _check_match(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """Raises ValueError, listing every fault, unless names and shapes are the same."""
    faults = {
        "missing": [name for name in sources if name not in targets],
        "unknown": [name for name in targets if name not in sources],
        "of another shape": [
            f"{name}: {tuple(target.shape)} for {tuple(sources[name].shape)}"
            for name, target in targets.items()
            if name in sources and target.shape != sources[name].shape
        ],
    }
    found = ", ".join(f"{fault} {names}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"target: expected the names and shapes of the source; {found}")
