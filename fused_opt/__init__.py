"""The whole optimizer tail of a training step in one pass over memory, on CPU and CUDA.

``SGD`` drops in for ``torch.optim.SGD``, ``EMA`` for a hand-written average of the weights, and
``SGD(..., ema=ema)`` runs both as one. ``TargetNetwork`` is a module that holds such an average,
``polyak_update_`` moves one by hand, and ``get_ema_multi_avg_fn`` is for torch's ``AveragedModel``.
``clip_grad_norm_`` clips gradients, which ``SGD(..., max_grad_norm=...)`` does without writing
them. ``GradScaler`` is torch's without a pass of its own over the gradients. ``functional`` has the
same kernels as plain functions, and ``schedules`` decays and learning rates that change with time.
``post_hoc`` makes averages of any width after training, and ``lightning`` has callbacks for PyTorch
Lightning.
"""

from fused_opt import functional, schedules
from fused_opt._build import build_info
from fused_opt.clip import clip_grad_norm_
from fused_opt.ema import EMA
from fused_opt.grad_scaler import GradScaler
from fused_opt.polyak import polyak_update_
from fused_opt.sgd import SGD
from fused_opt.swa_utils import get_ema_multi_avg_fn
from fused_opt.target_network import TargetNetwork

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "SGD",
    "GradScaler",
    "TargetNetwork",
    "build_info",
    "clip_grad_norm_",
    "functional",
    "get_ema_multi_avg_fn",
    "polyak_update_",
    "schedules",
]
