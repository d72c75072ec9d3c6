"""The exponential moving average of a model's weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fused_opt import _ema_formats
from fused_opt._averages import Averages, Shadow
from fused_opt._counter import Counter, is_capturing
from fused_opt._decay_rules import DecayRule, decay_at, rules_of
from fused_opt._ema_formats import Format
from fused_opt._ema_names import (
    Filter,
    ModelOrParams,
    Names,
    check_match,
    named,
    named_as,
    pairs,
)
from fused_opt._ema_state import Held, Origin, Progress, Saved, write_own
from fused_opt._hyper import check_decay
from fused_opt._plan import Gate, Plan, Refinement
from fused_opt._shadows import Shadows, copy_all, fits, memory_like
from fused_opt.post_hoc import Snapshot
from fused_opt.schedules import Schedule, power_function

if TYPE_CHECKING:
    from fused_opt.sgd import SGD

Buffers = Literal["copy", "average", "ignore"]


class EMA:
    r"""Keeps a shadow of every parameter, its exponential moving average.

    .. math:: s \leftarrow s + (1 - \beta)(p - s)

    with the decay β. One call updates all shadows in one pass; handed to ``fused_opt.SGD(ema=...)``
    they are updated inside the optimizer's own pass instead, which spares reading the parameters
    once more, and the results are the same bits. Several decays keep several averages, in the same
    pass.

    Steps are counted from 0: one is a call of :meth:`update`, or a step of the optimizer that is
    not skipped. Step t is due if ``update_every`` divides it. A due step copies the parameters if
    t < ``update_after_step``, and averages them otherwise, where a schedule of the decay gets the
    number k = 0, 1, ... of averages before this one, :attr:`num_updates`. A step that is not due
    only counts.

    Shadows have the parameter's dtype, and float32 for bfloat16 and float16, in which an average
    with a decay near 1 stops moving. Parameters that share storage have one shadow. Parameters of
    integers have one too, which copies them, and so does that of a parameter that is frozen as it
    is registered, for as long as it stays so; one that trains then is averaged also while it is
    frozen.

    Tensors are known by their names in the module, without the parts that ``torch.compile``,
    ``DistributedDataParallel`` and torch's other wrappers put into them.

    Args:
        model_or_params: a module, whose parameters are known by name; or an iterable of tensors,
            which are then named "0", "1" and so on, or of (name, tensor) pairs.
        decay: β, in [0, 1]; a number, a schedule from ``fused_opt.schedules``, any other function
            of k, or a list of these, for an average each. A one-element tensor may be changed in
            place between updates, and on the parameters' GPU it is read there.
        dtype: of the shadows of real parameters.
        device: of the shadows, which is that of their parameters; or ``"cpu"`` for a model on GPUs,
            which spares their memory. Then a due step copies the parameters to pinned memory, at
            their bytes over the bus, and the CPU updates the shadows while training goes on. No
            step waits for it on the host, nor does anything change a parameter before it is copied.
            :attr:`averages`, :meth:`apply_shadow` and whatever else looks at shadows waits, so ask
            for them anew rather than keep them. CUDA graphs cannot hold such updates.
        buffers: of a module, all of them: ``"copy"`` keeps one exact copy as of the last due step,
            ``"average"`` averages those of real and complex numbers and copies the others, and
            ``"ignore"`` leaves them to the model.
        update_every: how many steps to take for an update.
        update_after_step: how many steps only copy.
        filter: tracks the parameters for which ``filter(name, param)`` is true.

    Raises:
        ValueError: decay outside [0, 1], no parameters, a name that occurs twice, shadows of a
            dtype that no kernel takes beside their parameter or on another device,
            ``update_every`` below 1, ``update_after_step`` below 0, or an unknown ``buffers``.
        TypeError: something in the iterable is no tensor.

    Example:
        >>> import torch
        >>> from fused_opt import EMA
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ema = EMA(model, decay=[0.9, 0.5])
        >>> start = model.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> ema.update()
        >>> torch.allclose(ema.shadows["weight"], start + 0.1)
        True
        >>> with ema.average_parameters(1):
        ...     torch.allclose(model.weight, start + 0.5)
        True
    """

    def __init__(
        self,
        model_or_params: ModelOrParams,
        decay: DecayRule | Sequence[DecayRule] = 0.999,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        buffers: Buffers = "copy",
        update_every: int = 1,
        update_after_step: int = 0,
        filter: Filter | None = None,  # noqa: A002
    ) -> None:
        if buffers not in get_args(Buffers):
            raise ValueError(f"buffers: expected one of {get_args(Buffers)}, got {buffers!r}")
        self._decays = rules_of(decay)
        self._dtype = dtype
        self._device = _full_device(device)
        self._buffers = buffers
        self._filter = filter
        self._update_every = _checked_count("update_every", update_every, at_least=1)
        self._update_after_step = _checked_count("update_after_step", update_after_step)
        self._updates = Counter("num_updates of the EMA")
        self._gpu_counts = False  # from the first step on that one has counted
        # An iterable can be walked only once, a module gains and loses parameters.
        self._source: nn.Module | list[tuple[str, Tensor]] = (
            model_or_params if isinstance(model_or_params, nn.Module) else pairs(model_or_params)
        )
        self._kept = self._new_shadows(Names({}, {}, {}, [], []), dtype, self._device)
        self._backup: dict[str, Tensor] = {}  # where weights are kept while an average is applied
        self._applied: int | None = None  # which
        self._origin = Origin()
        self._optimizer: weakref.ref[SGD] | None = None
        self._plan = Plan(keeps_memory=True)
        self.register()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the optimizer, which attaches its copy of the EMA itself."""
        state = self.__dict__.copy()
        del state["_plan"]
        return {**state, "_updates": self.num_steps, "_gpu_counts": False, "_optimizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._updates = Counter("num_updates of the EMA", state["_updates"])
        self._plan = Plan(keeps_memory=True)

    def __repr__(self) -> str:
        return f"EMA({len(self._kept.names.params)} parameters, decay={self.decay})"

    @property
    def decay(self) -> DecayRule | list[DecayRule]:
        """β or what gives it, a list for several averages; may be changed between updates.

        A tensor may also be changed in place.
        """
        return self._decays[0] if len(self._decays) == 1 else list(self._decays)

    @decay.setter
    def decay(self, decay: DecayRule | Sequence[DecayRule]) -> None:
        rules = rules_of(decay)
        if len(rules) != len(self._decays):
            raise ValueError(
                f"decay: expected one for each of {len(self._decays)} averages, got {len(rules)}"
            )
        self._decays = rules

    @property
    def num_steps(self) -> int:
        """How many steps were taken.

        Steps that were replayed in a CUDA graph, or that a GPU could have skipped, are counted
        there, and asking for them waits for the GPU.
        """
        return int(self._updates)

    @num_steps.setter
    def num_steps(self, count: int) -> None:
        self._updates.set(_checked_count("num_steps", count))

    @property
    def num_updates(self) -> int:
        """How many steps have averaged: k of the next. Waits where :attr:`num_steps` does."""
        return self._progress.num_updates

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        checked = _checked_count("num_updates", count)
        self.num_steps = self._progress.after_updates(checked).num_steps

    @property
    def _progress(self) -> Progress:
        return Progress(self.num_steps, self._update_every, self._update_after_step)

    @property
    def averages(self) -> list[dict[str, Tensor]]:
        """The shadows of each average by name: the tensors themselves, in new dicts.

        Averaged buffers are among them.
        """
        return [self._kept.average(i) for i in range(len(self._decays))]

    @property
    def shadows(self) -> dict[str, Tensor]:
        """The shadows of the first average."""
        return self._kept.average(0)

    # --- what is tracked --------------------------------------------------------------------------

    @torch.no_grad()
    def register(self) -> None:
        """Starts over from the weights as they are now.

        Shadows that exist are overwritten in place. Parameters that the module has gained get a
        shadow, and those it has lost are forgotten.

        Raises:
            RuntimeError: the shadows are applied.
            ValueError: there is nothing to track, or a shadow cannot be as the constructor was told
                to make it.
        """
        self._require_not_applied("register")
        names = self._tracked(named(self._source))
        if not names.params:
            raise ValueError("model_or_params: expected at least one parameter, got none")
        kept = self._new_shadows(names, self._dtype, self._device, self._kept)
        kept.follow(names.tensors)
        self._kept = kept
        self.num_steps = 0

    def to(self, *args: Any, **kwargs: Any) -> EMA:
        """Moves the shadows to a device or converts them to a dtype, as ``Module.to`` does.

        Shadows of complex numbers, and copies, keep their dtype. Returns the EMA itself.

        Raises:
            ValueError: as the constructor. Nothing has changed.
            RuntimeError: the averages are the parameters of a ``TargetNetwork``.
        """
        to_device, to_dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = _full_device(to_device) or self._device, to_dtype or self._dtype
        if self._kept.is_kept_in_module:
            raise RuntimeError("to: these averages are a module's parameters; convert the module")
        moved = self._new_shadows(self._kept.names, dtype, device, self._kept)
        for new, old in zip(moved.tensors, self._kept.tensors, strict=True):
            new.copy_(old)
        self._kept, self._device, self._dtype = moved, device, dtype
        return self

    def _keep_in(self, module: nn.Module) -> None:
        """Makes the tensors of a module like the model the shadows and copies, now and later."""
        self._kept.keep_in(module)
        self._kept.find(self._kept.names)

    def _new_shadows(
        self,
        names: Names,
        dtype: torch.dtype | None,
        device: torch.device | None,
        old: Shadows | None = None,
    ) -> Shadows:
        averages_buffers = self._buffers == "average"
        return Shadows(names, len(self._decays), dtype, device, averages_buffers, old)

    def _tracked(self, found: Names) -> Names:
        """What of a model is averaged or copied."""
        params = {
            name: slot
            for name, slot in found.params.items()
            if self._filter is None or self._filter(name, slot.holder[slot.key])
        }
        buffers = {} if self._buffers == "ignore" else found.buffers
        return found._replace(params=params, buffers=buffers)

    def _follow_model(self, what: str) -> None:
        """Follows what the model now has under the names that are tracked.

        A parameter that it has gained would silently not be averaged.
        """
        now, known = named(self._source), self._kept.names
        gained = [name for name in now.params if name not in known.layout]
        lost = [name for name in known.slots if name not in now.slots]
        if gained or lost:
            raise RuntimeError(
                f"{what}: the model has other parameters than the EMA tracks; gained {gained}, "
                f"lost {lost}; call register()"
            )
        params = {name: now.params[name] for name in known.params}
        buffers = {name: now.buffers[name] for name in known.buffers}
        self._kept.find(now._replace(params=params, buffers=buffers))

    # --- the update -------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def update(self) -> None:
        """Takes a step: moves every shadow towards its parameter, if the step is due.

        Raises:
            RuntimeError: the shadows are applied, or the EMA is attached to an optimizer, whose
                steps update it. Nothing has changed.
            ValueError: the decay is not in [0, 1]. Nothing has changed.
        """
        self._require_not_applied("update")
        if self.optimizer is not None:
            raise RuntimeError(
                "update: this EMA is attached to an optimizer, whose every step updates it; "
                "detach it with `optimizer.ema = None` to update it yourself"
            )
        gate = self._gate()
        averages = self._averages(left_to_device=gate is not None)
        self._run(averages, gate, self._subject)

    def _run(
        self, averages: Averages | None, gate: Gate | None, subject: Callable[[str, Tensor], str]
    ) -> None:
        """Updates all that is kept, if it is due, and counts the step, apart from an optimizer."""
        rest = [] if averages is None else [self._planned_besides(averages, gate, subject)]
        if gate is None:
            rest.append(self._updates.next())

        def settle() -> None:
            for part in rest:
                part()

        in_pass = self._in_pass(averages)
        if in_pass is not None:
            self._plan.run_ema(in_pass, subject, gate, settle)
        else:
            settle()

    def _in_pass(self, averages: Averages | None) -> Averages | None:
        """What of an update is done where the parameters are, in the pass of the step."""
        return None if self._kept.is_offloaded else averages

    def _planned_besides(
        self,
        averages: Averages,
        gate: Gate | None,
        subject: Callable[[str, Tensor], str],
        refinements: Callable[[], Refinement | None] = lambda: None,
        stochastic: bool = False,
    ) -> Callable[[], object]:
        """Plans the rest of an update, and returns what does it, to be called after the pass.

        Called again, it changes nothing more.
        """
        if self._kept.is_offloaded:
            return self._kept.planned_on_host(averages, gate, subject, refinements(), stochastic)
        return partial(self._kept.copy_exactly, self._copies_where(gate))

    def _averages(self, left_to_device: bool) -> Averages | None:
        """What the next step does to the shadows; None if the host knows that it is not due.

        Args:
            left_to_device: a device counts the step, where it finds it taken or repeats it.
        """
        if self._kept.has_changed():
            self._follow_model("update")
        rows, home = self._kept.rows, self._home()
        self._updates.move_to(home)
        if home.type == "cuda" and (left_to_device or self._gpu_counts):
            return self._averages_by_gpu(rows, home)
        progress = Progress(self._updates.on_host, self._update_every, self._update_after_step)
        if progress.num_steps % self._update_every:
            return None
        if progress.num_steps < self._update_after_step:
            return Averages(rows, (0.0,) * len(self._decays))
        k = progress.num_updates
        decays = tuple(decay_at(rule, k) for rule in self._decays)
        return Averages(rows, decays, frozen=self._kept.frozen)

    def _averages_by_gpu(self, rows: dict[Tensor, Shadow], home: torch.device) -> Averages:
        """The same, for a GPU to evaluate at the count of steps that it alone knows."""
        rules: list[float | Tensor | Schedule] = []
        for rule in self._decays:
            if not isinstance(rule, (float, Tensor, Schedule)):
                raise RuntimeError(
                    f"decay: expected a number or one of fused_opt.schedules, got {rule!r}: only "
                    "the GPU knows how many steps were taken, and it cannot call a function"
                )
            if isinstance(rule, Tensor):
                check_decay(rule)
            rules.append(rule)
        every, after = self._update_every, self._update_after_step
        self._gpu_counts = True
        averages = Averages(rows, tuple(rules), frozen=self._kept.frozen)
        if (every, after) == (1, 0) and not any(map(callable, rules)):
            return averages
        steps, on_gpu = self._updates.on_host, self._updates.on(home)
        return averages._replace(steps=steps, on_device=on_gpu, every=every, after=after)

    def _copies_where(self, gate: Gate | None) -> Tensor | None:
        """Whether to copy what is not averaged, in a step that is due as far as the host knows.

        To be asked before the step is counted. None is yes, and otherwise the device knows.
        """
        where = None
        if gate is not None and gate.found_inf is not None:
            where = gate.found_inf == 0
        if self._gpu_counts and self._updates.on_gpu is not None and self._update_every > 1:
            is_due = (self._updates.on_gpu + self._updates.on_host) % self._update_every == 0
            where = is_due if where is None else where.to(is_due.device) & is_due
        return where

    def _gate(self) -> Gate | None:
        """Counts a captured update where it is replayed."""
        home = self._home()
        if home.type != "cuda":
            return None
        self._updates.on(home)  # which a capture would come too late to make
        return Gate(None, [self._updates.counted_on(home)], home) if is_capturing(home) else None

    def _subject(self, stream: str, param: Tensor) -> str:
        """Names a tensor at fault by its parameter's name."""
        tensors = self._kept.names.tensors
        return f"{stream}[{next(name for name in tensors if tensors[name] is param)!r}]"

    # --- averages in the place of the weights -----------------------------------------------------

    @torch.no_grad()
    def apply_shadow(self, average: int = 0) -> None:
        """Puts an average in the place of the weights, in place, and keeps the weights aside.

        Buffers that are averaged or copied are swapped with them. Only the first call takes memory,
        as much as the weights.

        Raises:
            RuntimeError: the shadows are already applied, or the model has gained or lost
                parameters. Nothing has changed.
            ValueError: a weight no longer has its shadow's shape. Nothing has changed.
            IndexError: there is no such average.
        """
        self._require_not_applied("apply_shadow")
        self._follow_model("apply_shadow")
        weights, shadows = self._kept.names.tensors, self._kept.everything(self._index(average))
        check_match("apply_shadow", weights, shadows)
        self._keep_aside(weights)
        self._applied = average
        copy_all(weights.values(), [shadows[name] for name in weights])

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back that :meth:`apply_shadow` has kept, in place.

        Raises:
            RuntimeError: the shadows are not applied.
        """
        if self._applied is None:
            raise RuntimeError("restore: the shadows are not applied")
        weights = self._kept.names.tensors
        copy_all(weights.values(), [self._backup[name] for name in weights])
        self._applied = None

    def swap(self, average: int = 0) -> None:
        """Applies an average, or restores the weights if one is applied.

        The shadows stay as they are, so that two swaps change nothing, in any dtype.

        Raises:
            RuntimeError, ValueError, IndexError: as :meth:`apply_shadow`.
        """
        if self._applied is None:
            self.apply_shadow(average)
        else:
            self.restore()

    @contextmanager
    def average_parameters(self, average: int = 0) -> Iterator[None]:
        """Applies an average inside a ``with`` block and restores the weights after it.

        Example:
            >>> import torch
            >>> from fused_opt import EMA
            >>> model = torch.nn.Linear(2, 1)
            >>> ema = EMA(model)
            >>> with ema.average_parameters():
            ...     prediction = model(torch.ones(1, 2))
        """
        self.apply_shadow(average)
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def copy_to(self, model_or_params: ModelOrParams | None = None, average: int = 0) -> None:
        """Copies an average into weights, for good; from module to module its buffers too.

        Args:
            model_or_params: what receives it, matched by name; the model that is tracked if None.
            average: which.

        Raises:
            ValueError: names or shapes differ. Nothing has changed.
            RuntimeError: the shadows are applied, and :meth:`restore` would undo the copy; or the
                model has gained or lost parameters.
            IndexError: there is no such average.
        """
        if model_or_params is None:
            self._require_not_applied("copy_to")
            self._follow_model("copy_to")
            model_or_params = self._source
        shadows, targets = self._kept.everything(self._index(average)), named(model_or_params)
        targets = self._tracked(targets)
        if not (isinstance(model_or_params, nn.Module) and isinstance(self._source, nn.Module)):
            shadows = {name: shadows[name] for name in self._kept.names.params}
            targets = targets._replace(buffers={})
        found = targets.under_every_name(targets.tensors)
        expected = self._kept.names.under_every_name(shadows)
        found = named_as(found, expected)
        check_match("model_or_params", found, expected)
        copy_all(found.values(), [expected[name] for name in found])

    def _index(self, average: int) -> int:
        """Checks the number of an average."""
        if not 0 <= average < len(self._decays):
            raise IndexError(
                f"average: expected a number from 0 to {len(self._decays) - 1}, got {average}"
            )
        return average

    def _keep_aside(self, weights: dict[str, Tensor]) -> None:
        """Copies weights into memory that is kept from one time to the next, where it fits."""
        backup = dict(self._backup)
        for name, weight in weights.items():
            if not fits(backup.get(name), weight, weight.dtype, self._device):
                backup[name] = memory_like(weight, weight.dtype, self._device)
        # All memory is there before anything is overwritten: running out of it changes nothing.
        self._backup = {name: backup[name] for name in weights}
        copy_all(self._backup.values(), weights.values())

    def _require_not_applied(self, what: str) -> None:
        if self._applied is not None:
            raise RuntimeError(
                f"{what}: the shadows are applied in the place of the weights; call restore() first"
            )

    # --- states -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is needed to go on, without copying tensors.

        The keys are ``decay`` (of each average a number or the dict of a schedule, and None for a
        function of one's own, which cannot be saved), ``num_steps``, ``update_every``,
        ``update_after_step``, ``averages`` (a dict of tensors for each), ``buffers`` (the exact
        copies) and, while an average is applied, ``applied``, which one, and ``weights``, those
        that are kept aside. ``torch.load(weights_only=True)`` loads it.

        Raises:
            RuntimeError: the model has gained or lost parameters.
        """
        return write_own(self._held("state_dict"))

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, or the state of another package's average.

        Tensors keep their place and their dtype. Decay, counter, ``update_every`` and
        ``update_after_step`` become the state's, but for a decay that it could not hold. If an
        average was applied when it was saved, so it is then: the weights become the average, and
        :meth:`restore` gives those that were saved beside it.

        States of other packages are known by their keys. Parameters are matched by their order in
        ``parameters()``, or by name, where torch's wrappers may stand.

        - torch_ema: ``num_updates`` is taken over; it makes the decay
          ``schedules.tf_warmup(decay, offset=1)``, and is None for a constant one. No step only
          copies. ``collected_params`` are kept to be exported.
        - diffusers: each key that is there. Without ``use_ema_warmup`` the decay is
          ``schedules.tf_warmup(decay, min_decay, offset=1)``, with it an ``inverse_power``.
        - AveragedModel: ``n_averaged`` counts the steps that were due. Its first update copies, as
          here with ``update_after_step=1``.
        - timm: a module's names, or a file that has them under ``state_dict_ema``. It has no
          counter; steps that only copy are then taken to be over.
        - ema_pytorch: ``step`` counts all steps. ``online_model`` is left to the model's own
          checkpoint.

        What a format does not say stays the constructor's, and buffers that it does not hold are
        copied from the model.

        Raises:
            ValueError: the state is in no format that is known; a key or a tensor is missing,
                unknown, or of another shape or kind, and all such are listed; a number is not what
                it may be. Nothing has changed.
            RuntimeError: the shadows are applied, or the model has gained or lost parameters.
        """
        self._require_not_applied("load_state_dict")
        self._take(_ema_formats.read(state_dict, self._held("load_state_dict")))

    def export_state_dict(self, format: Format, average: int = 0) -> dict[str, Any]:  # noqa: A002
        """Returns an average as another package would have saved it.

        What was loaded in a format is written back in it as it was. Otherwise tensors have the
        dtype of their parameters, as in those packages, and are not copied where the shadows have
        that too.

        Args:
            format: ``"torch_ema"``, ``"diffusers"``, ``"averaged_model"``, ``"timm"`` or
                ``"ema_pytorch"``.
            average: which.

        Raises:
            ValueError: there is no such format, or it cannot keep the decay.
            RuntimeError: the model has gained or lost parameters.
            IndexError: there is no such average.
        """
        return _ema_formats.write(format, self._held("export_state_dict"), self._index(average))

    def snapshot(self) -> list[Snapshot]:
        """Returns copies of the averages that ``post_hoc.synthesize`` makes others of.

        These are all whose decay is a ``schedules.power_function``.

        Raises:
            ValueError: there is none, or there was no update yet.
        """
        count = self.num_updates
        found = [
            Snapshot(count, rule.sigma_rel, {name: t.clone() for name, t in average.items()})
            for rule, average in zip(self._decays, self.averages, strict=True)
            if isinstance(rule, power_function)
        ]
        if not found:
            raise ValueError("snapshot: expected a decay that is a schedules.power_function")
        return found

    def _held(self, what: str) -> Held:
        """Everything that a state can say."""
        self._follow_model(what)
        kept, names = self._kept, named(self._source)
        weights = {name: tensor.detach() for name, tensor in names.tensors.items()}
        if self._applied is not None:
            weights |= self._backup
        return Held(
            names=names,
            averages=self.averages,
            copied={n: copy for n, copy in kept.copied.items() if n not in kept.names.params},
            decays=self._decays,
            progress=self._progress,
            weights=weights,
            collected=self._backup,
            applied=self._applied,
            origin=self._origin,
        )

    def _take(self, saved: Saved) -> None:
        """Becomes what a state says, which fits in every point."""
        kept, weights = self._kept, self._kept.names.tensors
        if saved.collected:
            self._keep_aside(weights)
            copy_all((self._backup[name] for name in saved.collected), saved.collected.values())
        for i, average in enumerate(saved.averages):
            shadows = kept.everything(i)
            for name, tensor in {**average, **saved.copied}.items():
                shadows[name].copy_(tensor)
        if saved.averages[0]:
            kept.follow(weights.keys() - saved.averages[0].keys() - saved.copied.keys())
        for i, rule in enumerate(saved.decays):
            known = self._decays[i]
            if isinstance(known, Tensor) and known.is_floating_point() and isinstance(rule, float):
                known.fill_(rule)
            elif rule is not None:
                self._decays[i] = rule
        self.num_steps, self._update_every, self._update_after_step = saved.progress
        self._origin = saved.origin
        if saved.applied is not None:
            self._applied = saved.applied
            shadows = kept.everything(saved.applied)
            copy_all(weights.values(), [shadows[name] for name in weights])

    # --- the optimizer ----------------------------------------------------------------------------

    @property
    def optimizer(self) -> SGD | None:
        """The optimizer whose steps update this EMA, or None."""
        return self._optimizer() if self._optimizer is not None else None

    def _home(self) -> torch.device:
        """The device that counts steps where the host cannot."""
        home = None if self.optimizer is None else self.optimizer._home()
        return self._kept.home if home is None else home

    def _attach(self, optimizer: SGD) -> None:
        if self.optimizer not in (None, optimizer):
            raise ValueError(
                "ema: this EMA is attached to another optimizer; one EMA rides in one optimizer"
            )
        self._optimizer = weakref.ref(optimizer)

    def _detach(self) -> None:
        self._optimizer = None


def _full_device(device: torch.device | str | int | None) -> torch.device | None:
    """A device with its index, as tensors have it."""
    return None if device is None else torch.empty(0, device=device).device


def _checked_count(name: str, value: int, at_least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}: expected an integer of at least {at_least}, got {value!r}")
    return value
