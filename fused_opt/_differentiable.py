"""Steps that autograd can look through: out of place, with every hyper-parameter open to it.

``functional.sgd_step`` and ``ema_update`` are :func:`step` and :func:`update`. Where the kernels
reach, a step is one pass over memory and one node of the graph, whose backward is one more pass;
elsewhere, and for derivatives of derivatives, the same equations run as torch operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fused_opt._hyper import HALF_DTYPES, as_scalar, check_decay
from fused_opt._launch import CPU, launch, require_kernels_for
from fused_opt._native import cached_native

Number: TypeAlias = float | Tensor
#: One for all parameters, or one for each.
Hyper: TypeAlias = Number | Sequence[Number]
Tensors: TypeAlias = Sequence[Tensor | None]

_SGD, _SGD_BACKWARD, _EMA, _EMA_BACKWARD = range(4)  # PassKind in csrc
_SUMS = 4  # kPassSums: the numbers of a rule
_TORCH = 2  # of Pass::Fit
_NODE_ELEMENTS = 1 << 12  # at least, where the memory of fewer is nothing beside a node's own


class SgdHypers(NamedTuple):
    """The hyper-parameters of :func:`step`."""

    lr: Hyper
    momentum: Hyper = 0.0
    weight_decay: Hyper = 0.0
    dampening: Hyper = 0.0


def step(
    params: Sequence[Tensor],
    grads: Tensors,
    momentum_buffers: Tensors | None,
    hypers: SgdHypers,
    nesterov: bool,
    maximize: bool,
    out: tuple[Tensors, Tensors] | None = None,
    in_two: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """``functional.sgd_step``, which documents all but ``out`` and ``in_two``.

    ``out`` holds tensors that new parameters and new buffers are written to, of the same shapes and
    dtypes, and which are then returned. They must share no memory with the inputs or with each
    other, and autograd must have no part in the step. Entries of parameters without a gradient are
    not looked at, and for an entry of None there is a new tensor.

    ``in_two`` makes two nodes of a step that is not small. What a node has saved is free once it
    has run backward, and one alone holds all of that beside all derivatives.
    """
    new_params, grads = list(params), list(grads)
    count = len(new_params)
    new_buffers: list[Tensor | None] = [None] * count
    if momentum_buffers is not None:
        new_buffers = list(momentum_buffers)
    _check_length("grads", grads, count)
    _check_length("momentum_buffers", new_buffers, count)
    hypers = SgdHypers(*map(_checked_hyper, SgdHypers._fields, hypers, [count] * len(hypers)))
    if nesterov:
        _check_nesterov(hypers)

    places = [i for i, grad in enumerate(grads) if grad is not None]
    rows = _SgdRows(
        places,
        [new_params[i] for i in places],
        [grad for grad in grads if grad is not None],
        [new_buffers[i] for i in places],
        SgdHypers(*(_taken(h, places) if isinstance(h, list) else h for h in hypers)),
        nesterov,
        maximize,
    )
    own_out = None if out is None else (_taken(out[0], places), _taken(out[1], places))
    for i, param, buffer in zip(places, *_stepped(rows, own_out, in_two), strict=True):
        new_params[i], new_buffers[i] = param, buffer
    return new_params, new_buffers


def step_by_torch(
    params: Sequence[Tensor],
    grads: Tensors,
    momentum_buffers: Tensors,
    hypers: SgdHypers,
    nesterov: bool,
    maximize: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """:func:`step` from torch operations: of few small tensors they take less time than a node."""
    new_params, new_buffers = list(params), list(momentum_buffers)
    hypers = SgdHypers(
        *map(_checked_hyper, SgdHypers._fields, hypers, [len(new_params)] * len(hypers))
    )
    if nesterov:
        _check_nesterov(hypers)
    numbers = zip(*(_by_row(value, len(new_params)) for value in hypers), strict=True)
    rows = zip(params, grads, momentum_buffers, numbers, strict=True)
    for i, (param, grad, buffer, row_numbers) in enumerate(rows):
        if grad is not None:
            _check_row(i, {"params": param, "grads": grad, "momentum_buffers": buffer})
            row = _SgdRow(param, grad, buffer, *row_numbers)
            new_params[i], new_buffers[i] = _sgd_formula(row, nesterov, maximize)
    return new_params, new_buffers


def update(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    decay: Hyper,
    out: Tensors | None = None,
) -> list[Tensor]:
    """``functional.ema_update``; ``out`` is as in :func:`step`."""
    shadows, params = list(shadows), list(params)
    _check_length("params", params, len(shadows))
    decay = _checked_hyper("decay", decay, len(shadows))
    for each in _entries(decay):
        if not isinstance(each, Tensor):
            check_decay(each)
    return _updated(shadows, params, decay, out)


class _SgdRows(NamedTuple):
    """Parameters that have a gradient, their places in the caller's lists, and what steps them."""

    places: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor | None]
    hypers: SgdHypers
    nesterov: bool
    maximize: bool


def _stepped(
    rows: _SgdRows, out: tuple[Tensors, Tensors] | None, in_two: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    call = _sgd_call(rows)
    if call is None:
        return _stepped_by_torch(rows, out)
    buffers = call.with_momentum(rows.buffers)
    hypers = [number for _, _, number in call.tensors]
    if not _wants_graph(rows.params, rows.grads, (b for b in buffers if b is not None), hypers):
        return _sgd_forward(call, rows.params, rows.grads, buffers, out)
    _check_no_out(out)
    new_params: list[Tensor] = []
    new_buffers: list[Tensor | None] = []
    cut = _third(rows.params) if in_two else 0
    for part in (slice(0, cut), slice(cut, None)) if cut else (slice(None),):
        own = call.take(list(range(call.rows))[part]) if cut else call
        found: Any = _SgdStep.apply(  # type: ignore[no-untyped-call]
            own, *rows.params[part], *rows.grads[part], *buffers[part], *hypers
        )
        new_params += found[: own.rows]
        new_buffers += found[own.rows :]
    return new_params, new_buffers


def _third(params: list[Tensor]) -> int:
    """Where a step is cut in two, of which the later runs backward first; 0 if it is small.

    Then the most that it holds is what is saved and four thirds of what the parameters take, both
    at the end of the first node and at the end of the second.
    """
    sizes = list(map(Tensor.numel, params))
    third, before = sum(sizes) / 3, 0
    if third < _NODE_ELEMENTS:
        return 0
    for i, size in enumerate(sizes):
        if before + size / 2 > third:  # nearer than the next place
            return i
        before += size
    return 0


def _updated(
    shadows: list[Tensor], params: list[Tensor], decay: Hyper, out: Tensors | None
) -> list[Tensor]:
    call = _ema_call(shadows, params, decay)
    if call is None:
        return _updated_by_torch(shadows, params, decay, out)
    hypers = [number for _, _, number in call.tensors]
    if not _wants_graph(shadows, params, hypers):
        return _ema_forward(call, shadows, params, out)
    _check_no_out(out)
    found: Any = _EmaUpdate.apply(  # type: ignore[no-untyped-call]
        call, *shadows, *params, *hypers
    )
    return list(found)


# --- What the kernels are called with


class _Rule(NamedTuple):
    """The hyper-parameters of some rows, as a kernel takes them; an EMA has its decay as the first.

    Without momentum, and at a first step, what has no part in the equations is 0.
    """

    lr: Number
    momentum: Number = 0.0
    weight_decay: Number = 0.0
    dampening: Number = 0.0
    plain: bool = False  # without momentum


class _Call(NamedTuple):
    """What a node of the graph knows beside the tensors of its rows."""

    rows: int
    rules: list[_Rule]
    rule_of: list[int] | None  # that of each row, or None if there is one for all
    nesterov: bool
    maximize: bool
    device: int
    chunks: int  # of rules/sums.h, in all rows
    tensors: list[tuple[int, int, Tensor]]  # among the numbers: of rule r the number k

    def of_rows(self, of_rules: list[Any]) -> list[Any]:
        """For each row, what its rule has."""
        if self.rule_of is None:
            return of_rules * self.rows
        return [of_rules[k] for k in self.rule_of]

    def with_momentum(self, buffers: list[Any]) -> list[Any]:
        """The buffers of rows that have momentum, and None for the others."""
        if not any(rule.plain for rule in self.rules):
            return buffers
        plain = self.of_rows([rule.plain for rule in self.rules])
        return [None if p else buffer for p, buffer in zip(plain, buffers, strict=True)]

    def take(self, rows: list[int]) -> _Call:
        """The same for some of the rows."""
        rule_of = None if self.rule_of is None else [self.rule_of[i] for i in rows]
        return self._replace(rows=len(rows), rule_of=rule_of)

    def run(
        self, kind: int, inputs: list[Any], outputs: list[Any], trusted: int, sums: Any
    ) -> bool:
        """Runs a kernel; False, and nothing is done, if some tensor is out of its reach.

        Inputs from ``trusted`` on, and outputs, are known to hold their values as they lie.
        """
        if self._run(kind, [*inputs, *outputs], trusted, sums):
            return True
        ordered = _ordered(self.rows, inputs, outputs)
        return ordered is not None and self._run(kind, [*ordered, *outputs], trusted, sums)

    def _run(self, kind: int, streams: list[Any], trusted: int, sums: Tensor | None) -> bool:
        args = (kind, streams, self.rule_of, self.rules, self.nesterov, self.maximize, trusted)
        address = 0 if sums is None else sums.data_ptr()
        return bool(
            launch(
                self.device, lambda _, threads: cached_native().run_pass(*args, threads, address)
            )
        )

    def new_sums(self, needed: Sequence[bool]) -> Tensor | None:
        """Memory for the derivatives by hyper-parameters, if some are asked for."""
        if not any(needed):
            return None
        device = torch.device("cpu") if self.device == CPU else torch.device("cuda", self.device)
        size = _SUMS * (len(self.rules) + self.chunks)
        return torch.empty(size, dtype=torch.float64, device=device)

    def derivatives(self, sums: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
        """For each of the tensors, what the kernel has left there."""
        if sums is None:
            return [None] * len(needed)
        return [
            _alike(sums[_SUMS * r + k], number) if asked else None
            for asked, (r, k, number) in zip(needed, self.tensors, strict=True)
        ]


def _sgd_call(rows: _SgdRows) -> _Call | None:
    """How the kernels take a step; None if they do not."""
    if not rows.params or not _are_values_real():
        return None
    first = [buffer is None for buffer in rows.buffers]
    examples, rule_of = _sorted_by(first, rows.hypers)
    rules = [_sgd_rule(rows, i, first[i]) for i in examples]
    streams = [rows.params, rows.grads, rows.buffers]
    return _fitting_call(streams, rules, rule_of, rows.nesterov, rows.maximize)


def _ema_call(shadows: list[Tensor], params: list[Tensor], decay: Hyper) -> _Call | None:
    if not shadows or not _are_values_real():
        return None
    examples, rule_of = _sorted_by([False] * len(shadows), [decay])
    rules = [_Rule(_readable(_entry(decay, i), shadows[i])) for i in examples]
    return _fitting_call([shadows, params], rules, rule_of)


def _fitting_call(
    streams: list[Any],
    rules: list[_Rule],
    rule_of: list[int] | None,
    nesterov: bool = False,
    maximize: bool = False,
) -> _Call | None:
    module = cached_native()
    try:
        fit, device, chunks = module.fit_pass(streams, rules)
    except TypeError:  # an entry is no tensor, and is named later
        return None
    if fit == _TORCH:
        return None
    require_kernels_for([device])
    tensors = [
        (r, k, number)
        for r, rule in enumerate(rules)
        for k, number in enumerate(rule[:_SUMS])
        if isinstance(number, Tensor)
    ]
    return _Call(len(streams[0]), rules, rule_of, nesterov, maximize, device, chunks, tensors)


def _are_values_real() -> bool:
    """Whether tensors are what they seem: no transform and no mode stands before them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _wants_graph(*tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for some in tensors for t in some)


def _sorted_by(first: list[bool], hypers: Iterable[Hyper]) -> tuple[list[int], list[int] | None]:
    """A row of each rule, and the rule of each row."""
    columns = [map(id, value) for value in hypers if isinstance(value, list)]
    if not columns and (all(first) or not any(first)):
        return [0], None
    keys = list(zip(first, *columns, strict=True))
    examples = dict(zip(keys, range(len(keys)), strict=True))
    number = {key: k for k, key in enumerate(examples)}
    return list(examples.values()), [number[key] for key in keys]


def _sgd_rule(rows: _SgdRows, i: int, first: bool) -> _Rule:
    lr, momentum, weight_decay, dampening = (_entry(value, i) for value in rows.hypers)
    plain = not _is_on(momentum)
    if plain or first:
        dampening = 0.0
    if plain or (first and not rows.nesterov):
        momentum = 0.0
    lr, momentum, weight_decay, dampening = (
        _readable(number, rows.params[i]) for number in (lr, momentum, weight_decay, dampening)
    )
    return _Rule(lr, momentum, weight_decay, dampening, plain)


def _readable(number: Number, param: Tensor) -> Number:
    """A hyper-parameter that the kernels read where it is."""
    if not isinstance(number, Tensor):
        return float(number)
    if number.dtype not in (torch.float32, torch.float64):
        number = number.to(torch.float32 if number.dtype in HALF_DTYPES else torch.float64)
    # The CPU is in reach of all.
    return number.to(param.device) if number.is_cuda and isinstance(param, Tensor) else number


def _ordered(rows: int, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
    """Inputs with dense copies in place of what is not in the order of the row's outputs.

    Where it has none the first input has the order. None if a layout has no order.
    """
    ordered: list[list[Any]] = [
        [None] * rows if stream is None else list(stream) for stream in inputs
    ]
    written = [stream for stream in outputs if stream is not None]
    for i in range(rows):
        found = [stream[i] for stream in (*written, *ordered) if stream[i] is not None]
        if any(tensor.layout != torch.strided for tensor in found):
            return None
        order = torch.empty_like(found[0]) if found else None
        for stream in ordered:
            tensor = stream[i]
            if tensor is not None and order is not None and tensor.stride() != order.stride():
                stream[i] = torch.empty_like(order).copy_(tensor)
    return ordered


def _alike(derivative: Tensor, of: Tensor) -> Tensor:
    """A derivative by a hyper-parameter, in its dtype and shape and on its device."""
    derivative = derivative.to(of.device, of.dtype, copy=True)
    return derivative if derivative.dim() == of.dim() else derivative.reshape(of.shape)


# --- The nodes of the graph. A derivative that the kernels do not reach, or that is to have
# --- derivatives itself, comes from the same equations in torch operations.


class _Asked(NamedTuple):
    """Which derivatives a backward gives: by the rows of each input, and by the call's tensors."""

    by_rows: list[Sequence[bool]]
    by_numbers: Sequence[bool]

    @classmethod
    def of(cls, ctx: Any, call: _Call) -> _Asked:
        n, needed = call.rows, ctx.needs_input_grad[1:]  # the first input is the call
        split = len(needed) - len(call.tensors)
        return cls([needed[k : k + n] for k in range(0, split, n)], needed[split:])

    def take(self, rows: list[int]) -> _Asked:
        return self._replace(by_rows=[_taken(stream, rows) for stream in self.by_rows])

    def numbers(self, call: _Call) -> list[list[bool]]:
        """Those by the numbers of each rule."""
        found = [[False] * _SUMS for _ in call.rules]
        for (r, k, _), asked in zip(call.tensors, self.by_numbers, strict=True):
            found[r][k] = asked
        return found


class _SgdStep(torch.autograd.Function):
    """Its inputs are a call, the parameters, gradients and buffers of the rows, and its tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor | None, ...]:
        n = call.rows
        params, grads, buffers = tensors[:n], tensors[n : 2 * n], tensors[2 * n : 3 * n]
        new_params, new_buffers = _sgd_forward(call, params, grads, buffers)
        ctx.call, ctx.asked = call, _Asked.of(ctx, call)
        needed = _saved_by_sgd(call, ctx.asked.numbers(call))
        kept = [
            _kept(call, stream, [rule[k] for rule in needed])
            for k, stream in enumerate((params, grads, buffers, new_buffers))
        ]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(t for stream in kept for t in stream), *tensors[3 * n :])
        outputs = (*new_params, *new_buffers)
        depends = [d for stream in _depending_by_sgd(call, ctx.asked) for d in stream]
        ctx.mark_non_differentiable(
            *(t for t, d in zip(outputs, depends, strict=True) if t is not None and not d)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor | None) -> Any:
        call: _Call = ctx.call
        n, saved = call.rows, ctx.saved_tensors
        streams = [of_outputs[:n], of_outputs[n:], *(saved[k * n : (k + 1) * n] for k in range(4))]
        return _backward(_sgd_backward, _sgd_backward_by_torch, ctx, streams, 2)


class _EmaUpdate(torch.autograd.Function):
    """Its inputs are a call, the shadows and parameters of the rows, and its tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        n = call.rows
        shadows, params = tensors[:n], tensors[n : 2 * n]
        ctx.call, ctx.asked = call, _Asked.of(ctx, call)
        needed = [rule[0] for rule in ctx.asked.numbers(call)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *_kept(call, shadows, needed), *_kept(call, params, needed), *tensors[2 * n :]
        )
        outputs = tuple(_ema_forward(call, shadows, params))
        by_decay = call.of_rows([rule[0] for rule in ctx.asked.numbers(call)])
        depends = map(any, zip(*ctx.asked.by_rows, by_decay, strict=True))
        ctx.mark_non_differentiable(*(t for t, d in zip(outputs, depends, strict=True) if not d))
        return outputs

    @staticmethod
    def backward(ctx: Any, *of_shadows: Tensor | None) -> Any:
        n, saved = ctx.call.rows, ctx.saved_tensors
        streams = [of_shadows, saved[:n], saved[n : 2 * n]]
        return _backward(_ema_backward, _ema_backward_by_torch, ctx, streams, 1)


def _backward(by_kernel: Any, by_torch: Any, ctx: Any, streams: list[Any], incoming: int) -> Any:
    """The derivatives by all inputs of a node, from incoming ones and from what was saved.

    Rows whose outputs nothing depends on are left out: a number may be infinite there.
    """
    call: _Call = ctx.call
    asked: _Asked = ctx.asked
    reached = [t is not None for t in streams[0]]
    for stream in streams[1:incoming]:
        reached = [r or t is not None for r, t in zip(reached, stream, strict=True)]
    some = [i for i, is_reached in enumerate(reached) if is_reached]
    own_call, own_asked = call, asked
    if len(some) < call.rows:
        own_call, own_asked = call.take(some), asked.take(some)
        streams = [_taken(stream, some) for stream in streams]
    streams = list(map(list, streams))
    found = None
    if some and _are_values_real() and not torch.is_grad_enabled():
        found = by_kernel(own_call, own_asked, streams)
    if found is None:
        found = by_torch(own_call, own_asked, streams)
    by_rows, by_numbers = found
    if len(some) < call.rows:
        by_rows = [_placed(stream, some, call.rows) for stream in by_rows]
    return (None, *(t for stream in by_rows for t in stream), *by_numbers)


def _sgd_forward(
    call: _Call,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Tensors,
    out: tuple[Tensors, Tensors] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    new_params = _new(params, None if out is None else out[0])
    new_buffers = call.with_momentum(_new(params, None if out is None else out[1]))
    outputs = [new_params, new_buffers]
    if not call.run(_SGD, [list(params), list(grads), list(buffers)], outputs, 0, None):
        if out is None:
            raise RuntimeError("tensors have changed while they were stepped")
        # What there is to write to lies in another order, or is of another kind.
        found = _sgd_forward(call, params, grads, buffers)
        return _written(new_params, found[0]), _written(new_buffers, found[1])
    if out is not None:
        increment_version([t for stream in outputs for t in stream if t is not None])
    return new_params, new_buffers


def _ema_forward(
    call: _Call, shadows: Sequence[Tensor], params: Sequence[Tensor], out: Tensors | None = None
) -> list[Tensor]:
    new = _new(shadows, out)
    if not call.run(_EMA, [list(shadows), list(params)], [new], 0, None):
        if out is None:
            raise RuntimeError("tensors have changed while they were averaged")
        return _written(new, _ema_forward(call, shadows, params))
    if out is not None:
        increment_version(new)
    return new


def _depending_by_sgd(call: _Call, asked: _Asked) -> tuple[list[bool], list[bool]]:
    """Which new parameters and buffers depend on what a derivative is asked by.

    The others are constants: they are in the node because of what stands beside them.
    """
    of_params, of_grads, of_buffers = asked.by_rows
    if all(of_grads):
        return [True] * call.rows, [True] * call.rows
    rules = call.of_rows(list(zip(call.rules, asked.numbers(call), strict=True)))
    new_params, new_buffers = [], []
    for of_p, of_g, of_v, (rule, numbers) in zip(
        of_params, of_grads, of_buffers, rules, strict=True
    ):
        of_lr, of_momentum, of_weight_decay, of_dampening = numbers
        of_d = of_g or of_weight_decay or (of_p and _is_on(rule.weight_decay))
        of_v = of_d or of_v or of_momentum or of_dampening
        new_params.append(of_p or of_v or of_lr)
        new_buffers.append(of_v)
    return new_params, new_buffers


def _saved_by_sgd(call: _Call, asked: list[list[bool]]) -> list[tuple[bool, ...]]:
    """Which of p, g, v and v' the derivatives by its numbers need, for each rule.

    As ``SgdBackwardPass`` of ``csrc/rules/differentiable.h`` has it.
    """
    needed: list[tuple[bool, ...]] = []
    for rule, (lr, momentum, weight_decay, dampening) in zip(call.rules, asked, strict=True):
        d = dampening or (lr and (rule.plain or call.nesterov))
        p = weight_decay or (d and _is_on(rule.weight_decay))
        new_buffer = not rule.plain and (lr or (momentum and call.nesterov))
        needed.append((p, d, momentum, new_buffer))
    return needed


def _sgd_backward(call: _Call, asked: _Asked, streams: list[Any]) -> Any:
    of_params, of_buffers = streams[:2]
    like = [b if p is None else p for p, b in zip(of_params, of_buffers, strict=True)]
    decays = call.of_rows([_is_on(rule.weight_decay) for rule in call.rules])
    by_params = _new(like, None, map(all, zip(asked.by_rows[0], decays, strict=True)))
    by_grads, by_buffers = (_new(like, None, each) for each in asked.by_rows[1:])
    sums = call.new_sums(asked.by_numbers)
    if not call.run(_SGD_BACKWARD, streams, [by_params, by_grads, by_buffers], 2, sums):
        return None
    if not all(decays):  # where p' depends on p alone
        by_params = [
            by if decay else of if needed else None
            for by, of, decay, needed in zip(
                by_params, of_params, decays, asked.by_rows[0], strict=True
            )
        ]
    return [by_params, by_grads, by_buffers], call.derivatives(sums, asked.by_numbers)


def _ema_backward(call: _Call, asked: _Asked, streams: list[Any]) -> Any:
    by_rows = [_new(streams[0], None, each) for each in asked.by_rows]
    sums = call.new_sums(asked.by_numbers)
    if not call.run(_EMA_BACKWARD, streams, by_rows, 1, sums):
        return None
    return by_rows, call.derivatives(sums, asked.by_numbers)


def _sgd_backward_by_torch(call: _Call, asked: _Asked, streams: list[Any]) -> Any:
    by_rows: list[list[Any]] = [[None] * call.rows for _ in asked.by_rows]
    by_numbers = _NumberSums(call, asked)
    rule_of = call.of_rows(list(range(len(call.rules))))
    row: tuple[Any, ...]
    for i, row in enumerate(zip(*streams, strict=True)):
        tensors: list[Any] = [None if t is None else _dense(t) for t in row]
        of_p, of_v, p, g, v, new_v = tensors
        rule, like = call.rules[rule_of[i]], of_v if of_p is None else of_p
        lr, momentum, weight_decay = (_number(number, like) for number in rule[:3])
        undamped = _number(rule.dampening, like, complement=True)
        of_u = None if of_p is None else -lr * of_p
        through_u = momentum * of_u if call.nesterov and of_u is not None else of_u
        of_v = _sum(of_v, through_u)
        of_d = _sum(undamped * of_v, of_u if call.nesterov else None)
        if asked.by_rows[0][i]:
            by_rows[0][i] = _sum(of_p, weight_decay * of_d if _is_on(rule.weight_decay) else None)
        if asked.by_rows[1][i]:
            by_rows[1][i] = -of_d if call.maximize else of_d
        if asked.by_rows[2][i]:
            by_rows[2][i] = momentum * of_v

        d = None
        if g is not None:
            d = -g if call.maximize else g
            d = d + weight_decay * p if _is_on(rule.weight_decay) else d
        wants = by_numbers.wanted[rule_of[i]]
        if wants[0] and of_p is not None:
            u = d if rule.plain else d + momentum * new_v if call.nesterov else new_v
            by_numbers.add(rule_of[i], 0, -of_p * u)
        if wants[1] and v is not None:
            by_numbers.add(rule_of[i], 1, of_v * v)
        if wants[1] and call.nesterov and of_u is not None:
            by_numbers.add(rule_of[i], 1, of_u * new_v)
        if wants[2]:
            by_numbers.add(rule_of[i], 2, of_d * p)
        if wants[3]:
            by_numbers.add(rule_of[i], 3, -of_v * d)
    return by_rows, by_numbers.all()


def _ema_backward_by_torch(call: _Call, asked: _Asked, streams: list[Any]) -> Any:
    by_rows: list[list[Any]] = [[None] * call.rows for _ in asked.by_rows]
    by_numbers = _NumberSums(call, asked)
    rule_of = call.of_rows(list(range(len(call.rules))))
    for i, (incoming, s, p) in enumerate(zip(*streams, strict=True)):
        of_s, decay = _dense(incoming), call.rules[rule_of[i]].lr
        if asked.by_rows[0][i]:
            by_rows[0][i] = _number(decay, of_s) * of_s
        if asked.by_rows[1][i]:
            by_rows[1][i] = _number(decay, of_s, complement=True) * of_s
        if by_numbers.wanted[rule_of[i]][0]:
            by_numbers.add(rule_of[i], 0, of_s * (s - p))
    return by_rows, by_numbers.all()


class _NumberSums:
    """The derivatives by the numbers of all rules, from what each row adds."""

    def __init__(self, call: _Call, asked: _Asked) -> None:
        self.wanted = asked.numbers(call)
        self._call = call
        self._sums: dict[tuple[int, int], Tensor] = {}

    def add(self, rule: int, number: int, parts: Tensor) -> None:
        key = (rule, number)
        self._sums[key] = _sum(self._sums.get(key), parts.sum())

    def all(self) -> list[Tensor | None]:
        """For each tensor of the call; None where no row adds to one."""
        return [
            _alike(self._sums[r, k], number) if (r, k) in self._sums else None
            for r, k, number in self._call.tensors
        ]


def _sum(one: Any, other: Any) -> Any:
    """Of what is there."""
    return other if one is None else one if other is None else one + other


def _new(
    like: Sequence[Any], out: Tensors | None, wanted: Iterable[bool] | None = None
) -> list[Any]:
    """Tensors to write to: those of ``out`` if any, and only where wanted."""
    if out is not None:
        return [torch.empty_like(t) if o is None else o for t, o in zip(like, out, strict=True)]
    if wanted is None:
        return list(map(torch.empty_like, like))
    return [torch.empty_like(t) if w else None for t, w in zip(like, wanted, strict=True)]


def _kept(call: _Call, stream: Sequence[Any], needed: list[bool]) -> Sequence[Any]:
    """The tensors of a stream whose rules need them, and None for the others."""
    if all(needed):
        return stream
    if not any(needed):
        return [None] * call.rows
    return [t if n else None for t, n in zip(stream, call.of_rows(needed), strict=True)]


# --- From plain torch operations, for every kind of tensor and every transform


def _stepped_by_torch(
    rows: _SgdRows, out: tuple[Tensors, Tensors] | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    for i, param, grad, buffer in zip(rows.places, *rows[1:4], strict=True):
        _check_row(i, {"params": param, "grads": grad, "momentum_buffers": buffer})
    if out is not None:
        numbers = (n for hyper in rows.hypers for n in _entries(hyper))
        _check_no_graph((*rows.params, *rows.grads, *rows.buffers, *numbers))
    found = [
        _sgd_formula(row, rows.nesterov, rows.maximize)
        for row in map(_SgdRow, *rows[1:4], *(_by_row(h, len(rows.params)) for h in rows.hypers))
    ]
    new_params, new_buffers = [p for p, _ in found], [v for _, v in found]
    if out is not None:
        return _written(out[0], new_params), _written(out[1], new_buffers)
    return new_params, new_buffers


def _updated_by_torch(
    shadows: list[Tensor], params: list[Tensor], decay: Hyper, out: Tensors | None
) -> list[Tensor]:
    for i, (shadow, param) in enumerate(zip(shadows, params, strict=True)):
        _check_row(i, {"shadows": shadow, "params": param})
    if out is not None:
        _check_no_graph((*shadows, *params, *_entries(decay)))
    new = list(map(_ema_formula, shadows, params, _by_row(decay, len(shadows))))
    return new if out is None else _written(out, new)


class _SgdRow(NamedTuple):
    param: Tensor
    grad: Tensor
    buffer: Tensor | None
    lr: Number
    momentum: Number
    weight_decay: Number
    dampening: Number


def _sgd_formula(row: _SgdRow, nesterov: bool, maximize: bool) -> tuple[Tensor, Tensor | None]:
    """The equations of ``csrc/rules/sgd.h``, in their order."""
    dtype = _compute_dtype(row.param)
    p, g = _dense(row.param).to(dtype), _dense(row.grad).to(dtype)
    lr, momentum, weight_decay = (
        _number(value, p) for value in (row.lr, row.momentum, row.weight_decay)
    )
    d = -g if maximize else g
    if _is_on(row.weight_decay):
        d = d + weight_decay * p
    if not _is_on(row.momentum):
        return (p - lr * d).to(row.param.dtype), None
    if row.buffer is None:
        v, buffer_dtype = d.clone() if d is row.grad else d, row.param.dtype
    else:
        damped = d
        if _is_on(row.dampening):
            damped = _number(row.dampening, p, complement=True) * d
        v, buffer_dtype = momentum * _dense(row.buffer).to(dtype) + damped, row.buffer.dtype
    u = d + momentum * v if nesterov else v
    return (p - lr * u).to(row.param.dtype), v.to(buffer_dtype)


def _ema_formula(shadow: Tensor, param: Tensor, decay: Number) -> Tensor:
    """The equation of ``csrc/rules/ema.h``."""
    dtype = _compute_dtype(shadow)
    s, p = _dense(shadow).to(dtype), _dense(param).to(dtype)
    weight = _number(decay, s, complement=True)
    if isinstance(weight, Tensor):
        weight = weight.to(dtype)
    return torch.lerp(s, p, weight).to(shadow.dtype)


def _is_on(value: Number) -> bool:
    """Whether a hyper-parameter has a term of its own: a tensor always, whatever it holds."""
    return isinstance(value, Tensor) or value != 0


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in HALF_DTYPES else tensor.dtype


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _number(value: Number, like: Tensor, complement: bool = False) -> Any:
    """A hyper-parameter (or 1 minus it) to compute with, in the dtype of a tensor."""
    if not isinstance(value, Tensor):
        return 1 - value if complement else value
    dtype = like.real.dtype if like.is_complex() else like.dtype
    # One element broadcasts, as long as it has no more dimensions.
    scalar = (value if value.dim() <= like.dim() else value.reshape(())).to(like.device)
    if complement:
        scalar = 1 - scalar.to(torch.promote_types(scalar.dtype, dtype))
    return scalar.to(dtype)


@torch.no_grad()
def _written(out: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Moves results to the tensors that are there for them."""
    return [n if o is None or n is None else o.copy_(n) for o, n in zip(out, new, strict=True)]


# --- Lists and checks


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else (value,)


def _entry(value: Any, i: int) -> Any:
    """The hyper-parameter of row i."""
    return value[i] if isinstance(value, list) else value


def _by_row(value: Any, rows: int) -> Sequence[Any]:
    return value if isinstance(value, list) else [value] * rows


def _taken(values: Sequence[Any], indices: list[int]) -> list[Any]:
    return [values[i] for i in indices]


def _placed(some: Sequence[Any], indices: list[int], count: int) -> list[Any]:
    """The opposite of :func:`_taken`: None stands for the others."""
    placed = [None] * count
    for i, value in zip(indices, some, strict=True):
        placed[i] = value
    return placed


def _check_no_out(out: Any) -> None:
    if out is not None:
        raise ValueError("out: expected no input that requires a gradient, or no_grad")


def _check_no_graph(inputs: Iterable[Any]) -> None:
    """The same, where there is something to write to."""
    if _wants_graph(t for t in inputs if isinstance(t, Tensor)):
        _check_no_out(inputs)


def _check_length(name: str, found: Sequence[Any], expected: int) -> None:
    if len(found) != expected:
        raise ValueError(
            f"{name}: expected {expected} entries, one per parameter, got {len(found)}"
        )


def _checked_hyper(name: str, value: Any, count: int) -> Any:
    """A hyper-parameter as a number or a tensor, or a list of them."""
    if _is_number(name, value):
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name}: expected a number, a tensor of one element, or a list with one of these per "
            f"parameter, got {type(value).__name__}"
        )
    entries = list(value)
    _check_length(name, entries, count)
    for i, entry in enumerate(entries):
        if not _is_number(f"{name}[{i}]", entry):
            raise TypeError(
                f"{name}[{i}]: expected a number or a tensor of one element, got "
                f"{type(entry).__name__}"
            )
    return entries


def _is_number(name: str, value: Any) -> bool:
    """Whether it is one, or a tensor; that has to be of one real element then."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            as_scalar(value, name)  # which raises
        return True
    return isinstance(value, (float, int, Real))


def _check_nesterov(hypers: SgdHypers) -> None:
    """As in ``torch.optim.SGD``, but for tensors, which are not looked at."""
    has_momentum = all(isinstance(m, Tensor) or m > 0 for m in _entries(hypers.momentum))
    undamped = all(isinstance(d, Tensor) or d == 0 for d in _entries(hypers.dampening))
    if not (has_momentum and undamped):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def _check_row(i: int, tensors: dict[str, Any]) -> None:
    """Checks that tensors fit the first of them."""
    name, first = next(iter(tensors.items()))
    for of, tensor in tensors.items():
        if of == "momentum_buffers" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{of}[{i}]: expected a torch.Tensor, got {type(tensor).__name__}")
        expected, found = (first.device, tuple(first.shape)), (tensor.device, tuple(tensor.shape))
        for what, a, b in zip(("device", "shape"), expected, found, strict=True):
            if a != b:
                raise ValueError(f"{of}[{i}]: expected {what} {a} like {name}[{i}], got {b}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{of}[{i}]: expected a floating-point or complex dtype, got {tensor.dtype}"
            )
