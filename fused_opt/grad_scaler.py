"""Loss scaling without a pass over the gradients of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from fused_opt.sgd import SGD


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that lets ``fused_opt.SGD`` find infinite gradients by itself.

    torch's scaler reads and writes all gradients before a step to look for inf and NaN, with any
    optimizer. This one lets ``fused_opt.SGD`` take a norm, which reads them once: with
    ``max_grad_norm`` the one that it clips by, and that costs nothing more; without it the largest
    magnitude. Scale, growth, backoff and ``state_dict`` are torch's, and other optimizers,
    ``differentiable`` ones, and gradients that ``unscale_`` was called for take torch's way.

    With ``max_grad_norm`` a step is skipped where the norm is infinite, which it is for finite
    float32 gradients beyond 1.8e19, whose squares overflow.

    Args:
        *args, **kwargs: as for ``torch.amp.GradScaler``.

    Raises:
        RuntimeError: torch's scaler lacks what this one builds on. ``step``: as in torch; or a
            subclass of ``fused_opt.SGD`` steps without its ``step``.

    Example:
        >>> import torch
        >>> from fused_opt import SGD, GradScaler
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = SGD(model.parameters(), lr=0.1, max_grad_norm=1.0)
        >>> scaler = GradScaler("cpu", init_scale=1024.0)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        ...     scaler.step(opt)
        ...     scaler.update()
        >>> scaler.get_scale()
        1024.0
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        missing = [name for name in _PROTOCOL if not hasattr(torch.amp.GradScaler, name)]
        if missing:
            raise RuntimeError(
                f"torch {torch.__version__}: torch.amp.GradScaler has no {', '.join(missing)}, by "
                "which fused_opt.GradScaler tells it of infinite gradients; use torch's"
            )
        super().__init__(*args, **kwargs)

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[str, Any]:
        """What ``step`` calls to look for inf and NaN, if ``unscale_`` has not."""
        if not _finds_infs(optimizer):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        # The step that follows fills it in, after its pre-hooks, which may change gradients.
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        optimizer._sought_inf = found_inf  # type: ignore[attr-defined]
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        found[scale.device] = found_inf
        return found  # type: ignore[no-any-return]

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Steps, unless gradients are infinite; as ``torch.amp.GradScaler.step``."""
        own = {name: vars(optimizer)[name] for name in _TOLD if name in vars(optimizer)}
        try:
            loss = super().step(optimizer, *args, **kwargs)
            if getattr(optimizer, "_sought_inf", None) is not None:
                raise RuntimeError(
                    f"step: {type(optimizer).__name__}.step has not looked for infinite gradients, "
                    "as fused_opt.SGD.step does; use torch.amp.GradScaler"
                )
        except BaseException:
            # Torch's scaler leaves them, and the next step would unscale twice.
            for name in _TOLD:
                vars(optimizer).pop(name, None)
            vars(optimizer).update(own)
            raise
        finally:
            if isinstance(optimizer, SGD):
                optimizer._sought_inf = None
        return loss


#: The attributes by which a scaler tells a step what it has found.
_TOLD = ("found_inf", "grad_scale")


#: What a scaler of torch 2.10 to 2.13 is told of infinite gradients by.
_PROTOCOL = ("_check_inf_per_device", "_check_scale_growth_tracker", "_found_inf_per_device")


def _finds_infs(optimizer: Optimizer) -> bool:
    """Whether the optimizer's own step looks for infs; without gradients, torch has to judge."""
    if not isinstance(optimizer, SGD) or optimizer.defaults["differentiable"]:
        return False
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
