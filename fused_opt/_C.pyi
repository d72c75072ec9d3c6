"""The native module; ``csrc/binding.cpp`` says what its parts do."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

version: str
cuda_version: str | None
cuda_archs: list[str]
ptx_archs: list[str]
chunk_elements: int
norm_chunk_elements: int
norm_lanes: int
group_bytes: int

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def evaluate_schedule(kind: int, parameters: Sequence[float], k: int) -> float: ...

class RowError(Exception): ...
class CudaError(Exception): ...

class Group:
    def __init__(
        self,
        *,
        lr: float = 0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        grad_scale: float = 1,
        nesterov: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        sutskever: bool = False,
        reset_grads: bool = False,
        decay: float = 0,
        tensors: int = -1,
        rounding: tuple[int, int] | None = None,
    ) -> None: ...

class ClipHyper:
    def __init__(
        self, *, max_norm: float = 0, grad_scale: float = 1, infinity: bool = False
    ) -> None: ...
    def set_max_norm(self, address: int, is_double: bool) -> None: ...
    def set_grad_scale(self, address: int, is_double: bool) -> None: ...

_Stream = list[Tensor | None] | None
_Rows = tuple[list[Tensor], _Stream, _Stream, _Stream, _Stream, list[int]]

class Plan:
    def clear(self) -> None: ...
    def add_param_group(
        self,
        params: list[Tensor],
        state: dict[Tensor, Any],
        momentum_key: str | None,
        refinement_key: str | None,
        shadows: dict[Tensor, Tensor] | None,
        first_ordinal: int,
        group: Group,
    ) -> tuple[_Rows, _Rows, list[int], list[int]]: ...
    def add(
        self,
        params: list[Tensor],
        grads: _Stream,
        momentums: _Stream,
        shadows: _Stream,
        refinements: _Stream,
        ordinals: list[int] | None,
        group: Group,
        copies: bool,
    ) -> tuple[list[int], list[int]]: ...
    def add_grads(self, grads: list[Tensor], copies: bool) -> tuple[list[int], list[int]]: ...
    def untouched(self, shadows: dict[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]: ...
    def check(self) -> None: ...
    def written(self) -> list[Tensor]: ...
    def devices(self) -> list[int]: ...
    def norm_chunks(self, device: int) -> tuple[int, bool]: ...
    def grad_norm(self, device: int, threads: int, hyper: ClipHyper, result: int) -> None: ...
    def scale_grads(
        self, device: int, threads: int, coefficient: float, device_coefficient: int
    ) -> None: ...
    def set_scalar(self, tensors: int, which: int, address: int, is_double: bool) -> None: ...
    def set_rounding_steps(self, address: int) -> None: ...
    def set_gate(self, found_inf: int, counters: list[int]) -> None: ...
    def memory_bytes(self, device: int) -> int: ...
    def run(self, device: int, threads: int, memory: int) -> None: ...
