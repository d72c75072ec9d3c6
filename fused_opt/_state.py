"""What an optimizer's state holds for a parameter, in whatever form, and how one becomes another.

The momentum is kept in one of two formulations, and what refines a half-precision parameter in one
of three modes. Users change both between steps, and load checkpoints of either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fused_opt._hyper import HALF_DTYPES, REFINEMENT_KEY, STATE_KEY, SgdHyper, as_scalar
from fused_opt._masters import (
    check_refinable,
    converted_refinement,
    fits,
    new_refinement,
    store_,
)

_T = TypeVar("_T")
_OTHER = {"torch": "sutskever", "sutskever": "torch"}


class ParamStates:
    """The state of an optimizer by its parameters.

    Args:
        state: ``Optimizer.state``.
        subject: names a tensor at fault in an error, from its stream and its parameter.
    """

    def __init__(
        self, state: dict[Tensor, dict[str, Any]], subject: Callable[[str, Tensor], str]
    ) -> None:
        self._state = state
        self._subject = subject

    def has_momentum(self, param: Tensor, hyper: SgdHyper) -> bool:
        """Whether there is momentum in the formulation of ``hyper``."""
        return self._state.get(param, {}).get(str(hyper.state_key)) is not None

    def has_other_momentum(self, param: Tensor, hyper: SgdHyper) -> bool:
        """Whether there is momentum in the formulation that ``hyper`` does not have."""
        return STATE_KEY[_OTHER[hyper.formulation]] in self._state.get(param, {})

    def converted_momentum(self, param: Tensor, hyper: SgdHyper) -> Tensor | None:
        """That momentum in the formulation of ``hyper``: w = -lr v."""
        momentum = self._state.get(param, {}).get(STATE_KEY[_OTHER[hyper.formulation]])
        if momentum is None:
            return None
        if hyper.formulation == "sutskever":
            return momentum * -as_scalar(hyper.lr, "lr")  # type: ignore[no-any-return]
        if hyper.lr == 0:
            raise ValueError(
                f"{self._subject('momentum_buffers', param)}: expected a learning rate other than "
                "0 to convert the velocity of the sutskever formulation"
            )
        return momentum / -as_scalar(hyper.lr, "lr")  # type: ignore[no-any-return]

    def keep_momentum(self, param: Tensor, momentum: Tensor | None, hyper: SgdHyper) -> None:
        state = self._state[param]
        state[STATE_KEY[hyper.formulation]] = momentum
        state.pop(STATE_KEY[_OTHER[hyper.formulation]], None)

    def refinement(self, param: Tensor) -> Tensor | None:
        """What refines the parameter, of any mode."""
        state: dict[str, Tensor] = self._state.get(param, {})
        return next((state[key] for key in REFINEMENT_KEY.values() if key in state), None)

    def sync_refinement(self, param: Tensor) -> None:
        """Has the refinement say that the parameter is exact; drops one that does not fit it."""
        refinement = self.refinement(param)
        if refinement is None:
            return
        if fits(param, refinement):
            store_(param.detach().float(), param.detach().clone(), refinement)
            return
        for key in REFINEMENT_KEY.values():
            self._state[param].pop(key, None)

    def check_refinable(self, param: Tensor, master_weights: str) -> None:
        """Raises ValueError for a parameter that the mode cannot refine."""
        if param.dtype in HALF_DTYPES:
            self._explained(param, lambda: check_refinable(param, master_weights))

    def wanted_refinement(self, param: Tensor, hyper: SgdHyper) -> Tensor | None:
        """What refines the parameter in the mode of ``hyper``: as it is, converted, or new."""
        if not isinstance(param, Tensor) or param.dtype not in HALF_DTYPES:
            return None
        mode, held = str(hyper.master_weights), self.refinement(param)
        if held is None:
            return self._explained(param, lambda: new_refinement(param, mode))
        if hyper.refinement_key in self._state[param]:
            return held
        return self._explained(param, lambda: converted_refinement(param, held, mode))

    def _explained(self, param: Tensor, call: Callable[[], _T]) -> _T:
        """What the call returns; its errors name the parameter."""
        try:
            return call()
        except ValueError as error:
            raise ValueError(f"{self._subject('params', param)}: {error}") from None

    def keep_refinement(self, param: Tensor, refinement: Tensor | None, hyper: SgdHyper) -> None:
        for other in REFINEMENT_KEY.values():
            self._state[param].pop(other, None)
        if refinement is not None and hyper.refinement_key is not None:
            self._state[param][hyper.refinement_key] = refinement
