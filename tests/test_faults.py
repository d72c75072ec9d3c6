"""Whole processes that go wrong: killed, out of memory, forked, interrupted, or at their exit."""

import collections
import copy
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import random_tensor
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fused_opt
from fused_opt import EMA, SGD, _offload

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

#: A process that takes longer hangs. Starting Python with torch takes 3 s on a busy machine.
TIMEOUT_S = 120

PREAMBLE = f"""
import sys, threading, time
sys.path[:0] = [{str(Path(fused_opt.__file__).parents[1])!r}]
import torch
torch.set_num_threads(2)
import fused_opt

def make(numel=100, **options):
    params = [torch.nn.Parameter(torch.ones(numel)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    ema = fused_opt.EMA(params, 0.9)
    return params, fused_opt.SGD(params, lr=0.1, momentum=0.9, ema=ema, **options), ema
"""


def start(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True, **options)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the process has printed, once it has ended well."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a fork of it holds the pipes, too
        pytest.fail(f"the process hangs: {process.communicate()}")
    assert process.returncode == 0, (process.returncode, out, err)
    return out, err


# --- snapshots ------------------------------------------------------------------------------------


def held(what: Any) -> Any:
    """A copy of tensors, numbers and containers, to be compared bit for bit."""
    if isinstance(what, Tensor):
        bits = what.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return what.dtype, tuple(what.shape), bits
    if isinstance(what, dict):
        return {k: held(v) for k, v in what.items()}
    if isinstance(what, (list, tuple)):
        return [held(v) for v in what]
    return copy.deepcopy(what)


def everything(params: list[Tensor], optimizer: SGD | None, ema: EMA | None) -> Any:
    """All that a step, or what changes an optimizer, may change."""
    found: dict[str, Any] = {"params": params, "grads": [p.grad for p in params]}
    if optimizer is not None:
        found["state"] = [dict(optimizer.state.get(p, {})) for p in params]
        found["groups"] = [
            {k: len(v) if k == "params" else v for k, v in group.items()}
            for group in optimizer.param_groups
        ]
    if ema is not None:
        found["ema"] = [ema.averages, ema._kept.copied, ema.num_steps]
    return held(found)


def make_params(dtype: torch.dtype) -> list[Tensor]:
    return [
        Parameter(random_tensor((40, 3), dtype, seed=1)),
        Parameter(random_tensor((7,), dtype, seed=2)),
        Parameter(random_tensor((6, 8), dtype, seed=3)[:, ::2]),  # with gaps
    ]


def set_grads(params: list[Tensor], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = random_tensor(p.shape, p.dtype, seed=10 * seed + i)


Scene = tuple[list[Tensor], SGD | None, EMA | None]


def make_scene(options: dict[str, Any], dtype: torch.dtype = F32, steps: int = 0) -> Scene:
    params = make_params(dtype)
    ema = EMA(params, 0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, **options)
    for seed in range(steps):
        set_grads(params, seed)
        optimizer.step()
    set_grads(params, 50)
    return params, optimizer, ema


# --- killed ---------------------------------------------------------------------------------------

TRAINER = """
import os, random, signal

def train(folder, steps):
    mine, theirs = os.path.join(folder, "last.pt"), os.path.join(folder, "next.pt")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 64)
    )
    model[2].to(torch.bfloat16)
    data = torch.randn(50, 8, 16)
    rounded, split = list(model[:2].parameters()), list(model[2].parameters())
    ema = fused_opt.EMA(model, fused_opt.schedules.tf_warmup(0.99))
    groups = [
        {"params": [rounded[0]], "state_dtype": torch.bfloat16, "stochastic_rounding": True},
        {"params": rounded[1:]},
        {"params": split, "master_weights": "split"},
    ]
    opt = fused_opt.SGD(groups, lr=0.01, momentum=0.9, ema=ema, max_grad_norm=1.0)
    first = 0
    if os.path.exists(mine):
        saved = torch.load(mine, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        ema.load_state_dict(saved["ema"])
        first = saved["step"]
    begin = time.monotonic()
    for step in range(first, steps):
        opt.zero_grad()
        hidden = model[1](model[0](data[step % 50])).to(torch.bfloat16)
        model[2](hidden).float().square().mean().backward()
        opt.step()
        if step % 3 == 2:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "ema": ema.state_dict()}
            torch.save({**state, "step": step + 1}, theirs)
            os.replace(theirs, mine)
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "ema": ema.state_dict()}
    torch.save(state, os.path.join(folder, "end.pt"))
    return time.monotonic() - begin

def killed(folder, steps, seconds):
    # Whether the kill came before the end; a fork, since importing torch takes longer than this.
    pid = os.fork()
    if pid == 0:
        train(folder, steps)
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

torch.set_num_threads(1)
whole, cut, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
seconds = train(whole, steps)
random.seed(7)
print(sum(killed(cut, steps, random.uniform(0, seconds / 3)) for _ in range(9)))
print(torch.load(os.path.join(cut, "last.pt"))["step"])
train(cut, steps)
"""


def test_a_killed_training_resumes_to_the_same_bits(tmp_path):
    """Killed at random times: in steps, while a checkpoint is written, before there is one."""
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    kills, last = finish(start(TRAINER, *map(str, folders), "200"))[0].split()
    assert int(kills) > 0
    assert int(last) > 0, "no process has lived to write a checkpoint"
    expected, found = (torch.load(folder / "end.pt") for folder in folders)
    assert held(found) == held(expected)


def test_a_state_dict_refers_to_tensors_that_steps_change():
    """As torch's does: numbers are as they were, tensors are the optimizer's own."""
    params, optimizer, ema = make_scene({"stochastic_rounding": True}, BF16, steps=2)
    saved, averages = optimizer.state_dict(), ema.state_dict()
    copied = copy.deepcopy(saved)
    optimizer.step()
    assert saved["state"][0]["momentum_buffer"] is optimizer.state[params[0]]["momentum_buffer"]
    assert held(saved["state"]) != held(copied["state"])
    assert saved["param_groups"] == copied["param_groups"]
    assert saved["param_groups"][0]["rounding_steps"] == 2
    assert averages["num_steps"] == 2
    assert averages["averages"][0]["0"] is ema.shadows["0"]


# --- out of memory --------------------------------------------------------------------------------


class OutOfMemory(TorchDispatchMode):
    """Lets the allocation of a number fail, and counts all that come before."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in returned):
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("planted")
        return func(*args, **(kwargs or {}))


def fail_at_every_allocation(build: Callable[[], Scene], act: Callable[[Any], Any]) -> int:
    """Asserts that whatever fails changes nothing, and that trying again is as if it never had.

    Returns how many allocations there are.
    """
    scene = build()
    act(scene)
    expected = everything(*scene)
    for number in range(1000):
        scene = build()
        before = everything(*scene)
        try:
            with OutOfMemory(number):
                act(scene)
        except torch.OutOfMemoryError:
            assert everything(*scene) == before, f"allocation {number}"
            act(scene)
            assert everything(*scene) == expected, f"after allocation {number}"
        else:
            assert everything(*scene) == expected
            return number
    raise AssertionError("the allocations do not end")


STEPS = {
    "plain": (F32, {}),
    "clipped": (F32, {"max_grad_norm": 1.0}),
    "reset": (F32, {"reset_grads": True}),
    "sutskever": (F32, {"formulation": "sutskever"}),
    "masters": (BF16, {"master_weights": "fp32"}),
    "split": (BF16, {"master_weights": "split"}),
    "kahan": (F16, {"master_weights": "kahan"}),
    "rounded": (BF16, {"stochastic_rounding": True}),
    "capturable": (BF16, {"capturable": True, "master_weights": "fp32", "max_grad_norm": 1.0}),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_that_runs_out_of_memory_has_changed_nothing(name, steps):
    dtype, options = STEPS[name]
    count = fail_at_every_allocation(
        lambda: make_scene(options, dtype, steps), lambda scene: scene[1].step()
    )
    assert count >= 3  # at least the dense copies of the parameter with gaps, and what it has


def scaled_step(scene: Scene) -> None:
    """As under a GradScaler."""
    optimizer = scene[1]
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(2.0)
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale


@pytest.mark.parametrize(
    "options", [{}, {"capturable": True, "stochastic_rounding": True}], ids=str
)
def test_a_scaled_step_that_runs_out_of_memory_has_changed_nothing(options):
    assert fail_at_every_allocation(lambda: make_scene(options, BF16, 1), scaled_step) > 0


LOADED = {
    "wide": {"state_dtype": F32},
    "masters": {"master_weights": "fp32"},
    "capturable": {"capturable": True},
    "capturable masters": {"capturable": True, "master_weights": "fp32"},
}


@pytest.mark.parametrize("options", LOADED.values(), ids=LOADED.keys())
@pytest.mark.parametrize("of_torch", [False, True])
def test_a_checkpoint_that_runs_out_of_memory_is_not_loaded(options, of_torch):
    saved = copy.deepcopy(make_scene({} if of_torch else options, BF16, 4)[1].state_dict())
    if of_torch:
        saved = copy.deepcopy(saved)
        for group in saved["param_groups"]:
            for key in group.keys() - torch.optim.SGD([Parameter(torch.ones(1))]).param_groups[0]:
                del group[key]
    count = fail_at_every_allocation(
        lambda: make_scene(options, BF16, 2), lambda scene: scene[1].load_state_dict(saved)
    )
    assert count > 0 or (of_torch and options == LOADED["masters"])


@pytest.mark.parametrize("options", LOADED.values(), ids=LOADED.keys())
def test_a_group_that_runs_out_of_memory_is_not_added(options):
    added = Parameter(random_tensor((5,), BF16))

    def act(scene: Scene) -> None:
        scene[1].add_param_group({"params": [added]})

    count = fail_at_every_allocation(lambda: make_scene(options, BF16, 1), act)
    assert (count > 0) == bool(options.get("capturable"))


def test_an_optimizer_that_runs_out_of_memory_leaves_its_ema_free():
    params = make_params(BF16)
    ema = EMA(params, 0.9)
    options = {"lr": 0.1, "momentum": 0.9, "capturable": True, "master_weights": "fp32"}
    for number in range(100):
        try:
            with OutOfMemory(number):
                optimizer = SGD(params, ema=ema, **options)
            break
        except torch.OutOfMemoryError:
            assert ema.optimizer is None
    assert number > 0
    assert ema.optimizer is optimizer


def build_averaged(buffers: str) -> Scene:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).to(BF16))
    ema = EMA(model, [0.9, 0.5], buffers=buffers)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    return list(model.parameters()), None, ema


AVERAGES: dict[str, Callable[[EMA], Any]] = {
    "update": EMA.update,
    "to": lambda ema: ema.to(BF16),
    "apply": EMA.apply_shadow,
    "register": EMA.register,
    "load": lambda ema: ema.load_state_dict(SAVED_AVERAGES),
    "export": lambda ema: ema.export_state_dict("timm"),
}
SAVED_AVERAGES = copy.deepcopy(build_averaged("average")[2].state_dict())


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_that_runs_out_of_memory_has_changed_nothing(name):
    act = AVERAGES[name]
    fail_at_every_allocation(lambda: build_averaged("average"), lambda scene: act(scene[2]))


def test_memory_that_is_really_out_leaves_the_optimizer_usable():
    code = """
    import resource
    params, opt, ema = make(4_000_000)
    twins, twin, _ = make(4_000_000)
    twin.step()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 24_000_000, resource.RLIM_INFINITY))
    try:
        opt.step()
    except (RuntimeError, MemoryError) as error:
        print("refused:", "memory" in str(error))
    print(len(opt.state), ema.num_steps, all(bool((p == 1).all()) for p in params))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    opt.step()
    print(all(torch.equal(p, q) for p, q in zip(params, twins)), ema.num_steps)
    """
    assert finish(start(code))[0] == "refused: True\n0 0 True\nTrue 1\n"


# --- forks ----------------------------------------------------------------------------------------


def test_a_forked_process_steps_with_several_threads():
    """libgomp waits for the parent's threads for ever; torch's own step hangs in the same place."""
    code = """
    import os
    params, opt, ema = make(200_000)
    opt.step()
    twins, twin, _ = make(200_000)
    for _ in range(4):
        twin.step()
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            for _ in range(3):
                opt.step()
            # torch.equal would wait for threads that are not there.
            same = all(p.tolist() == q.tolist() for p, q in zip(params, twins))
            if os.fork() == 0:  # and a fork of a fork
                opt.step()
                os._exit(3)
            os._exit(0 if same and os.waitstatus_to_exitcode(os.wait()[1]) == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for _ in range(3):
        opt.step()
    print(all(torch.equal(p, q) for p, q in zip(params, twins)))
    """
    assert finish(start(code))[0] == "True\n"


def test_workers_of_a_data_loader_do_no_harm():
    """Forked while the optimizer and its threads are there; each takes steps of its own, too."""
    code = """
    params, opt, ema = make(200_000)
    twins, twin, _ = make(200_000)
    opt.step(), twin.step()

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 6
        def __getitem__(self, i):
            opt.step()
            ema.state_dict()
            return torch.full((), float(i))

    loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
    for batch in loader:
        for p, q in zip(params, twins):
            p.grad.fill_(batch.item())
            q.grad.fill_(batch.item())
        opt.step(), twin.step()
    print(ema.num_steps, all(torch.equal(p, q) for p, q in zip(params, twins)))
    """
    assert finish(start(code))[0] == "7 True\n"


def test_averages_on_the_cpu_go_quietly_in_a_fork(monkeypatch):
    """The streams of CUDA that they would wait for can only be used by the process that began."""
    waited = []

    class Streams:
        def __init__(self, home: torch.device) -> None: ...
        def wait(self) -> None:
            waited.append(os.getpid())

    monkeypatch.setattr(_offload, "SideStreams", Streams)
    offload = _offload.Offload(torch.device("cpu"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del offload
    gc.collect()
    assert waited == []
    monkeypatch.undo()
    monkeypatch.setattr(_offload, "SideStreams", Streams)
    offload = _offload.Offload(torch.device("cpu"))
    del offload
    gc.collect()
    assert waited == [os.getpid()]


# --- threads --------------------------------------------------------------------------------------


def train_alone(seed: int, steps: int) -> Any:
    """Some training, of every kind that keeps state; the same for the same seed."""
    params = [Parameter(random_tensor((60_000,), BF16, seed=seed)) for _ in range(2)]
    ema = EMA(params, 0.9)
    options = {"master_weights": "split", "max_grad_norm": 1.0}
    if seed % 2:
        options = {"stochastic_rounding": True, "reset_grads": True}
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema if seed % 3 else None, **options)
    for step in range(steps):
        for p in params:
            p.grad = p.detach() * 0.5
        optimizer.step()
        if ema.optimizer is None:
            ema.update()
        if step % 10 == 0:
            optimizer.load_state_dict(optimizer.state_dict())
            SGD([Parameter(torch.ones(10))], lr=0.1)  # comes and goes
    return held([params, optimizer.state_dict(), ema.state_dict()])


def test_threads_step_optimizers_of_their_own_to_the_same_bits():
    steps, seeds = 60, range(4)
    expected = [train_alone(seed, steps) for seed in seeds]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: train_alone(s, steps)}))
        for seed in seeds
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        gc.collect()
        time.sleep(0.01)
    assert [found.get(seed) for seed in seeds] == expected


def test_two_threads_in_one_optimizer_get_an_error():
    """Rather than change the tensors of each other's step; torch has no check."""
    params = [Parameter(torch.ones(300_000)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = SGD(params, lr=1e-6, momentum=0.9)
    optimizer.step()
    outcomes: collections.Counter[str] = collections.Counter()

    def steps() -> None:
        for _ in range(150):
            try:
                optimizer.step()
                outcomes["taken"] += 1
            except RuntimeError as error:
                outcomes[str(error)] += 1

    threads = [threading.Thread(target=steps) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = "expected one step at a time, and another thread is in this one"
    assert outcomes.keys() == {"taken", refused}


# --- the interpreter's exit -----------------------------------------------------------------------

EXITS = {
    "objects": """
        import atexit, gc
        gc.disable()
        alive = make(); alive[1].step()
        cycle = make(); cycle[1].step(); cycle[1].me = cycle[2].me = cycle[1]; del cycle
        last = make()
        atexit.register(lambda: (last[1].step(), print("atexit", last[2].num_steps)))

        class Holder:
            def __init__(self): self.all = make()
            def __del__(self): self.all[1].step(); print("del", self.all[2].num_steps)

        holder = Holder(); del holder
        waited = make(100_000)
        def loop():
            time.sleep(0.1)
            for _ in range(50): waited[1].step()
            print("thread", waited[2].num_steps)
        threading.Thread(target=loop).start()
    """,
    "daemon in a step": """
        params, opt, ema = make(2_000_000)
        opt.step()  # whose operations of torch, which make the state, may not be left so
        def loop():
            while True: opt.step()
        threading.Thread(target=loop, daemon=True).start(); time.sleep(0.2)
    """,
}
PRINTED = {"objects": "del 1\nthread 50\natexit 1\n", "daemon in a step": ""}


@pytest.mark.parametrize("name", EXITS)
def test_the_interpreter_exits_quietly(name):
    assert finish(start(EXITS[name])) == (PRINTED[name], "")


# --- Ctrl-C ---------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at a number of lines of our code after a call, as Ctrl-C may."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> None:
        self.folder = str(Path(fused_opt.__file__).parent)
        self.before = sys.gettrace()  # coverage's
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self.trace


def interrupted(build: Callable[[], Scene], act: Callable[[Scene], object]) -> list[bool]:
    """Whether something was done as a whole when interrupted, and not begun else, by the line."""
    scene = build()
    before = everything(*scene)
    act(scene)
    after = everything(*scene)
    seen = []
    for number in itertools.count():
        scene = build()
        try:
            with Interrupt(number):
                act(scene)
            break
        except KeyboardInterrupt:
            now = everything(*scene)
            assert now in (before, after), f"line {number}"
            seen.append(now == after)
    assert set(seen) == {False, True}
    return seen


@pytest.mark.parametrize(
    ("dtype", "options", "steps"),
    [
        (F32, {"dampening": 0.5, "max_grad_norm": 1.0}, 0),
        (BF16, {"master_weights": "split", "reset_grads": True}, 0),
        (BF16, {"stochastic_rounding": True}, 1),
        (BF16, {"capturable": True, "stochastic_rounding": True}, 1),
    ],
    ids=["fresh", "split", "rounded", "capturable"],
)
def test_ctrl_c_in_a_step_leaves_it_done_or_not_begun(dtype, options, steps):
    """At every line of ours that runs in one."""
    seen = interrupted(lambda: make_scene(options, dtype, steps), lambda scene: scene[1].step())
    assert seen == sorted(seen), "a step that was done is undone"


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_ctrl_c_in_an_update_leaves_it_done_or_not_begun(buffers):
    def build() -> Scene:
        scene = build_averaged(buffers)
        scene[2]._source[1].num_batches_tracked.add_(5)
        return scene

    interrupted(build, lambda scene: scene[2].update())


def test_ctrl_c_from_outside_stops_training_in_a_state_that_resumes():
    """Real signals, at random times of real steps, against the count of steps that were taken."""
    code = """
    import os, random, signal
    random.seed(int(sys.argv[1]))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    params, opt, ema = make(2000, dampening=0.5)
    twins, twin, twin_ema = make(2000, dampening=0.5)
    for _ in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 3e-3))
            while True:
                opt.step()
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
        while twin_ema.num_steps < ema.num_steps:
            twin.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins)), ema.num_steps
        for p, q in zip(params, twins):
            assert opt.state.keys() == set(params) or ema.num_steps == 0
            if p in opt.state:
                mine, other = opt.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"]
                assert torch.equal(mine, other)
    print("resumed", ema.num_steps > 60)
    """
    # coverage.py keeps its lock where Ctrl-C interrupts it, and hangs at the next line.
    untraced = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_PROCESS")}
    assert finish(start(code, "1", env=untraced))[0] == "resumed True\n"


# --- a model that changes -------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["weight", "bias", "both"])
def test_an_update_names_the_parameters_that_the_model_has_lost(lost):
    model = nn.Linear(2, 2)
    ema = EMA(model)
    names = ["weight", "bias"] if lost == "both" else [lost]
    for name in names:
        del model._parameters[name]
    with pytest.raises(
        RuntimeError, match=rf"lost {names}".replace("[", r"\[").replace("]", r"\]")
    ):
        ema.update()
