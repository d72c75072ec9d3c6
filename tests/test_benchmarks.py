"""The benchmark tool, by its commands: what it measures, refuses, keeps, compares and draws."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "benchmarks" if (ROOT / "benchmarks").is_dir() else "fused_opt.benchmarks"


def module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


cli, machine, native, plan, providers, rows_module, shapes, suite, timing = map(
    module,
    (
        "cli",
        "machine",
        "native",
        "plan",
        "providers",
        "rows",
        "shapes",
        "suite",
        "timing",
    ),
)
compare, ops, roof = module("compare"), module("ops"), module("roof")
Row = rows_module.Row

#: All peers that need no compilation, which takes seconds for each case.
UNCOMPILED = ",".join(name for name in providers.PEERS if name != "torch-compile")


@pytest.fixture(autouse=True)
def small_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roof on a megabyte is nonsense, and found in no time."""
    monkeypatch.setattr(suite, "ROOF_BYTES", (1 << 20, 1 << 20))
    suite.roof_probe.cache_clear()


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def words(result: Any) -> str:
    """What a command says, without the frames and line breaks of the terminal."""
    return " ".join(result.output.replace("│", " ").split())


def run_tiny(out: Path, *arguments: str) -> list[Any]:
    """Runs the tool for one round on a tiny list, and returns the rows that it wrote."""
    result = invoke("--shapes", "tiny", "--repeat", "1", "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    return rows_module.load(out / "cpu.csv")


# ---- Shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "params"),
    [
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
        ("llama-7b", 291, 6_738_415_616),
        ("small-500", 500, 128_000),
        ("one-2^31", 1, 2_147_483_648),
        ("size-2^14", 1, 16_384),
        ("count-100", 100, 100),
    ],
)
def test_shapes_have_the_counts_of_the_published_model(name, tensors, params):
    listed = shapes.load(name)
    assert (len(listed), shapes.count(listed)) == (tensors, params)


def test_the_mixture_of_experts_is_a_32nd_of_the_published_model():
    listed = shapes.load("moe-10k")
    experts = [shape for shape in listed if shape in ((24, 2560), (80, 768))]
    assert (len(listed), len(experts)) == (10_351, 52 * 64 * 3)
    assert 32 * shapes.count(listed) == 21_506_562_560


# ---- Running -------------------------------------------------------------------------------------


def test_every_op_is_checked_timed_and_kept(tmp_path):
    chosen = ("--dtype", "fp32,bf16", "--ops", ",".join(ops.OPS), "--against", UNCOMPILED)
    rows = run_tiny(tmp_path, *chosen)
    cases = {(row.op, row.dtype) for row in rows}
    halves = {(op, "bf16") for op in ops.OPS}
    assert cases == halves | {(op, "fp32") for op in ops.OPS if "master" not in op}
    for case in cases:
        of_case = [row for row in rows if (row.op, row.dtype) == case]
        assert {"fused_opt", "roof"} < {row.peer for row in of_case if row.median_ms}
        assert all(bool(row.note) == (row.median_ms is None) for row in of_case)
        best = min(row.median_ms for row in of_case if row.ratio and row.peer != "fused_opt")
        ours = next(row for row in of_case if row.peer == "fused_opt")
        assert ours.ratio == pytest.approx(best / ours.median_ms, rel=1e-4)
        assert ours.host_us > 0
        assert ours.bytes == ours.params * ops.OPS[ours.op].moved_bytes(ops.DTYPES[ours.dtype])
        assert ours.gbps == pytest.approx(ours.bytes / ours.median_ms / 1e6, rel=1e-4)
        assert ours.roof_share == pytest.approx(ours.gbps / ours.roof_gbps, rel=1e-4)


@pytest.mark.parametrize(
    ("op", "dtype", "expected"),
    [
        ("sgd", "fp32", 20),  # p, v both ways; g
        ("ema", "fp32", 12),
        ("sgd+ema", "fp32", 28),
        ("sgd+3ema", "fp32", 44),
        ("clip+sgd+ema", "fp32", 36),  # the gradient is read twice and written
        ("sgd+ema", "bf16", 18),  # a shadow of float32
        ("sgd+ema+master", "bf16", 28),  # p written, g read; v, master and shadow both ways
    ],
)
def test_bytes_are_those_of_one_pass(op, dtype, expected):
    assert ops.OPS[op].moved_bytes(ops.DTYPES[dtype]) == expected


def test_rows_say_where_they_come_from(tmp_path):
    row = run_tiny(tmp_path, "--ops", "sgd", "--against", "torch-fused", "--threads", "2")[0]
    assert row.schema == rows_module.SCHEMA
    assert row.torch == torch.__version__
    assert (row.device, row.threads, row.cache, row.repeats) == ("cpu", 2, "cold", 1)
    assert row.machine
    assert row.dirty in ("true", "false", "unknown")


def test_csv_and_json_hold_the_same_rows(tmp_path):
    rows = run_tiny(tmp_path, "--ops", "sgd,ema", "--against", "torch-foreach,apex")
    assert rows_module.load(tmp_path / "cpu.json") == rows
    rows_module.save(rows, tmp_path / "again", "cpu")
    for name in ("cpu.csv", "cpu.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_run_may_be_named_and_writes_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--shapes", "tiny", "--repeat", "1", "--ops", "sgd", "--against", "torch-fused")
    assert invoke("run", *options).exit_code == 0
    written = [path.name for path in tmp_path.glob("benchmark-results/*/*")]
    assert sorted(written) == ["cpu.csv", "cpu.json"]


def test_a_compiled_step_takes_part(tmp_path):
    rows = run_tiny(tmp_path, "--ops", "clip+sgd+ema", "--against", "torch-compile")
    (row,) = (row for row in rows if row.peer == "torch-compile")
    assert row.median_ms or "C++ compiler" in row.note


def test_long_lists_and_quick_runs_are_not_compiled():
    place = providers.Place(ops.OPS["sgd"], torch.device("cpu"), torch.float32, tensors=161)
    assert "161 tensors" in providers.absence("torch-compile", place)
    short = dataclasses.replace(place, tensors=1)
    assert "C++ compiler" in (providers.absence("torch-compile", short) or "C++ compiler")
    quick = dataclasses.replace(short, compiles=False)
    assert "quick" in providers.absence("torch-compile", quick)


def test_absent_peers_are_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(providers.MODULES, "torch-ema", "no_such_module")
    monkeypatch.setitem(providers.MODULES, "apex", "no_such_module")
    arguments = ("--shapes", "tiny", "--repeat", "1", "--out", tmp_path, "--ops", "sgd+ema")
    result = invoke(*arguments, "--against", "torch-ema,apex,torch-fused")
    assert "torch-fused+torch-ema: absent, not installed" in result.output
    assert "apex+lerp: absent, not installed, and needs CUDA" in result.output
    rows = {row.peer: row for row in rows_module.load(tmp_path / "cpu.csv")}
    assert rows["torch-ema"].note == "absent, not installed"
    assert rows["torch-ema"].median_ms is rows["torch-ema"].ratio is None
    assert rows["torch-fused"].median_ms is not None


def test_a_peer_that_breaks_down_is_listed_and_the_others_are_timed(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ImportError("its library is of another version\nand more")

    monkeypatch.setitem(providers.PACKAGES, "torch-averaged-model", ("AveragedModel", broken))
    rows = {row.peer: row for row in run_tiny(tmp_path, "--ops", "ema", "--against", UNCOMPILED)}
    note = rows["torch-averaged-model"].note
    assert note == "failed, ImportError: its library is of another version"
    assert rows["torch-foreach"].median_ms is not None


def test_the_fused_step_of_torch_is_refused_where_it_is_wrong(tmp_path):
    rows = run_tiny(tmp_path, "--ops", "sgd", "--dtype", "bf16", "--against", "torch-fused")
    assert "191763" in next(row.note for row in rows if row.peer == "torch-fused")


def test_what_does_not_fit_is_skipped_with_the_memory_that_it_needs(tmp_path, monkeypatch):
    arguments = ("--shapes", "llama-7b", "--ops", "sgd", "--repeat", "1", "--out", tmp_path)
    monkeypatch.setattr(suite, "free_bytes", lambda _: 8 << 30)
    result = invoke(*arguments, "--against", "torch-fused")
    assert result.exit_code == 0, result.output
    rows = rows_module.load(tmp_path / "cpu.csv")
    assert {row.note for row in rows} == {"skipped, needs more than 80.9 GB of memory"}


def test_who_runs_out_of_memory_is_listed_and_the_others_are_timed(tmp_path, monkeypatch):
    def hungry(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setitem(providers.PACKAGES, "torch-averaged-model", ("AveragedModel", hungry))
    monkeypatch.setattr(suite.Case, "fits", lambda _, contestants: contestants == 1)
    rows = {row.peer: row for row in run_tiny(tmp_path, "--ops", "ema", "--against", UNCOMPILED)}
    assert rows["torch-averaged-model"].note == "out of memory"
    assert rows["torch-foreach"].median_ms is not None


def test_what_does_not_fit_side_by_side_is_timed_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.Case, "fits", lambda _, contestants: contestants == 1)
    rows = run_tiny(tmp_path, "--ops", "clip+sgd+ema", "--against", "torch-fused,torch-foreach")
    assert len([row for row in rows if row.median_ms]) == 5
    assert all("one after the other" in row.note for row in rows)


@pytest.mark.parametrize(
    ("option", "known"),
    [("--shapes", "resnet50"), ("--ops", "clip+sgd+ema"), ("--against", "apex"),
     ("--dtype", "bf16")],
)  # fmt: skip
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(option, known):
    result = invoke(option, "nothing", "--quick")
    assert result.exit_code == 2
    assert "nothing" in words(result)
    assert known in words(result)


def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("--device", "cuda", "--quick")
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


@pytest.mark.cuda
def test_a_gpu_reports_launches_and_host_time(tmp_path):
    result = invoke("--device", "cuda", "--quick", "--shapes", "tiny", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    ours = [row for row in rows_module.load(tmp_path / "cuda.csv") if row.peer == "fused_opt"]
    assert len(ours) == 3
    for row in ours:
        assert row.launches
        assert row.launches >= 1
        assert row.host_us > 0
        assert row.driver


def test_a_missing_package_is_named_in_one_sentence():
    code = f"import runpy, sys; sys.modules['typer'] = None; runpy.run_module({PACKAGE!r}, "
    code += "run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("The benchmarks need the package typer")
    assert "Traceback" not in result.stderr


# ---- Checking ------------------------------------------------------------------------------------

Spoil = Callable[[Any], None]


@pytest.mark.parametrize(
    ("op", "spoil", "said"),
    [
        ("sgd", lambda step: step.params[3].mul_(1 + 1e-5), "parameter"),
        ("sgd", lambda step: step.params[4][-1:].add_(1e-4), "parameter"),  # the tail alone
        ("sgd", lambda step: step.momentum()[0].mul_(1.001), "momentum"),
        ("sgd", lambda step: step.params[1].fill_(torch.nan), "momentum"),  # of the second step
        ("sgd+ema", lambda step: step.averages[0][1].mul_(1 + 1e-5), "shadow 0"),
        ("3ema", lambda step: step.averages[2][1].mul_(1 + 1e-5), "shadow 2"),
        ("clip+sgd+ema", lambda step: step.grads[0].add_(1), "reset"),
        ("clip+sgd+ema", lambda step: step.averages[0][1].mul_(1 + 1e-5), "shadow 0"),
    ],
)
def test_a_wrong_result_is_never_timed(tmp_path, monkeypatch, op, spoil: Spoil, said):
    right = providers.fused_opt_step

    def wrong(*arguments: Any, **options: Any) -> Any:
        step = right(*arguments, **options)

        def run() -> None:
            step.run()
            with torch.no_grad():
                spoil(step)

        return dataclasses.replace(step, run=run)

    monkeypatch.setattr(providers, "fused_opt_step", wrong)
    result = invoke("--shapes", "tiny", "--repeat", "1", "--out", tmp_path, "--ops", op)
    assert result.exit_code == 1
    assert f"fused_opt on tiny: {said}" in words(result)
    assert "Nothing is timed on a wrong result" in result.output
    assert not list(tmp_path.iterdir())


def test_a_wrong_norm_is_an_error():
    reference = module("reference")
    step = providers.Step(print, [], [torch.zeros(3)], None, grad_norm=lambda: torch.tensor(1.01))
    assert reference.check_clip(step, exact=1.01) == pytest.approx(1 / 1.01, rel=1e-5)
    with pytest.raises(reference.WrongResultError, match="norm"):
        reference.check_clip(step, exact=1.0)


# ---- Timing --------------------------------------------------------------------------------------


def test_each_round_runs_everyone_once_in_changing_order():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = timing.interleave(runs, timing.Rounds.exactly(20), timing.wall_clock)
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]  # after the warm-up
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(rounds) == 20
    assert len(set(rounds)) > 3
    assert {each.rounds for each in timings.values()} == {20}


def test_rounds_fill_the_time_within_their_limits():
    rounds = timing.Rounds(least=5, most=100, seconds=2.0)
    assert [rounds.number(seconds) for seconds in (1.0, 0.1, 0.001)] == [5, 20, 100]


def test_percentiles_are_those_of_the_samples():
    found = timing.Timing.of([float(i) for i in range(11)])
    assert (found.low, found.seconds, found.high) == (2.0, 5.0, 8.0)


def test_evicted_tensors_are_cold():
    if native.library() is None:
        pytest.skip("there is no C++ compiler")
    torch.set_num_threads(1)
    tensor = torch.ones(1 << 14)  # 64 KiB, which a second-level cache holds
    evict = native.eviction([tensor])
    warm = min(timing.wall_clock(tensor.sum) for _ in range(200))
    cold = timing.cold_cpu_clock({tensor.sum: evict})
    assert min(cold(tensor.sum) for _ in range(200)) > 1.5 * warm


def test_code_is_warm_where_tensors_are_cold():
    calls: list[str] = []

    def run() -> None:
        calls.append("run")

    timing.cold_cpu_clock({run: lambda: calls.append("evict")})(run)
    assert calls == ["run", "evict", "run"]
    timing.cold_cpu_clock({run: None})(run)  # large tensors, which evict themselves
    assert calls[3:] == ["run"]


def test_without_a_compiler_the_roof_and_cold_caches_do_without(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(roof, "library", lambda: None)
    monkeypatch.setattr(native, "last_cache_bytes", lambda: 1 << 20)
    native.walk.cache_clear()
    native.eviction([torch.ones(4)])()
    native.walk.cache_clear()
    probe = roof.best_probe(ops.OPS["sgd"], torch.ones(1 << 10), 1, timing.wall_clock)
    assert probe.name == "roof: mul_"


def test_a_gpu_is_held_until_the_step_is_queued_and_its_cache_is_written_over(monkeypatch):
    calls: list[str] = []

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, _: Event) -> float:
            return 2.0

    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda n: (held.append(n), calls.append("hold")))
    monkeypatch.setattr(timing, "last_cache_bytes", lambda _: 64)
    flushed = torch.ones(128)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: flushed)

    clock = timing.cold_cuda_clock(torch.device("cpu"))
    calls.clear()

    def run() -> None:
        calls.append("run" if not flushed.any() else "run without a flush")
        time.sleep(0.02)

    assert clock(run) == 2e-3
    assert calls == ["synchronize", "hold", "event", "run", "event"]
    clock(run)  # its host time is known now: 20 ms at 5e9 cycles per second, and as much again
    assert held[-1] >= 2 * 0.02 * 5e9
    assert held[-1] > 3 * held[-2]


def test_launches_are_what_a_step_puts_on_the_gpu(monkeypatch):
    def event(kind: str, annotation: bool = False) -> SimpleNamespace:
        kind_of = SimpleNamespace(name=kind)
        return SimpleNamespace(name="", device_type=kind_of, is_user_annotation=annotation)

    events = [event("CUDA"), event("CPU"), event("CUDA"), event("CUDA", annotation=True)]
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    step = providers.Step(list, [], [], None)
    assert suite.launches_of(step, torch.device("cuda")) == 2
    assert suite.launches_of(step, torch.device("cpu")) is None


def test_a_gpu_says_its_driver_clocks_and_power(monkeypatch):
    answer = "580.65.06, 345 MHz, 1980 MHz, 2619 MHz, 69.21 W, 700.00 W"
    monkeypatch.setattr(machine, "output_of", lambda *_: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    assert machine.gpu_state(torch.device("cuda")) == {
        "driver": "580.65.06",
        "clocks": "SM 345 MHz of 1980 MHz, memory 2619 MHz",
        "power": "69.21 W of 700.00 W",
    }
    monkeypatch.setattr(machine, "output_of", lambda *_: None)
    assert set(machine.gpu_state(torch.device("cuda")).values()) == {""}


# ---- Plans ---------------------------------------------------------------------------------------


def test_a_quick_run_has_what_each_plot_needs():
    cases = plan.cases(None, None, None, quick=True, device="cpu")
    names = [name for name, *_ in cases]
    assert sum(name.startswith("size-") for name in names) >= 3
    assert sum(name.startswith("count-") for name in names) >= 3
    assert {"resnet50", "small-500"} <= set(names)
    assert len(cases) == len(set(cases)) < 15


def test_options_replace_their_part_of_the_plan():
    cases = plan.cases(
        "gpt2,small-500", "sgd,sgd+ema+master", "fp32,bf16", quick=False, device="cpu"
    )
    assert cases == [
        ("gpt2", "sgd", "fp32"),
        ("gpt2", "sgd", "bf16"),
        ("gpt2", "sgd+ema+master", "bf16"),
        ("small-500", "sgd", "fp32"),
        ("small-500", "sgd", "bf16"),
        ("small-500", "sgd+ema+master", "bf16"),
    ]
    swept = plan.cases("sweep-count", "sgd", None, quick=False, device="cpu")
    assert [name for name, *_ in swept] == shapes.SWEEPS["sweep-count"]
    assert {op for _, op, _ in plan.cases(None, "ema", None, quick=True, device="cpu")} == {"ema"}


# ---- Rows made by hand ---------------------------------------------------------------------------


def made_row(**changes: Any) -> Any:
    values: dict[str, Any] = {name: "" for name, kind in rows_module.TYPES.items() if kind is str}
    values |= {"schema": rows_module.SCHEMA, "commit": "c" * 40, "machine": "Some CPU"}
    values |= {"device": "cpu", "threads": 1, "op": "sgd+ema", "dtype": "fp32", "tensors": 161}
    values |= {"shapes": "resnet50", "params": 25_557_032, "peer": "fused_opt"}
    return Row(**(values | changes))


def made_run(
    ours: float = 10.0,
    peer: float = 15.0,
    machine_speed: float = 1.0,
    spread: float = 0.02,
    host: float = 80.0,
    **changes: Any,
) -> list[Any]:
    """A case with fused_opt, a peer and the roof; times in ms on a machine of that speed."""

    def timed(name: str, peer_name: str, ms: float, host_us: float | None) -> Any:
        ms /= machine_speed
        values = {
            "median_ms": ms,
            "p20_ms": ms * (1 - spread / 2),
            "p80_ms": ms * (1 + spread / 2),
            "gbps": 715.6 / ms,
            "roof_gbps": 75.0 * machine_speed,
            "roof_share": 715.6 / ms / 75.0 / machine_speed,
            "ratio": peer / machine_speed / ms,
        }
        if host_us:
            host_us /= machine_speed
            values |= {"host_us": host_us, "host_p20_us": host_us, "host_p80_us": host_us}
        return made_row(provider=name, peer=peer_name, **(values | changes))

    return [
        timed("fused_opt", "fused_opt", ours, host),
        timed("torch-fused+lerp", "torch-fused", peer, 160.0),
        timed("roof: mul_", "roof", 9.5, None),
    ]


def compared(tmp_path: Path, before: list[Any], after: list[Any]) -> Any:
    for name, rows in (("a", before), ("b", after)):
        rows_module.save(rows, tmp_path / name, "cpu")
    return invoke("compare", tmp_path / "a", tmp_path / "b" / "cpu.json")


def verdicts(result: Any) -> list[str]:
    return [line.split()[-1] for line in result.output.splitlines() if " · cpu " in line]


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        ({}, 0, ["same", "same"]),
        ({"ours": 11.0}, 1, ["same", "slower"]),  # 10 % beyond 3 % and the spreads of 2 %
        ({"ours": 10.4}, 0, ["same", "same"]),
        ({"ours": 9.0}, 0, ["faster", "same"]),
        ({"ours": 11.0, "spread": 0.2}, 0, ["same", "same"]),  # within the noise of the samples
        ({"machine_speed": 0.5}, 0, ["same", "same"]),  # everyone is slower, the roof too
        ({"peer": 12.0}, 0, ["same", "same"]),  # the peer became faster
        ({"ours": 11.0, "machine_speed": 2.0}, 0, ["same", "same"]),  # ours not as much as others
        ({"host": 100.0}, 1, ["same", "slower"]),
    ],
)
def test_compare_flags_what_every_view_calls_slower(tmp_path, change, code, expected):
    result = compared(tmp_path, made_run(), made_run(**change))
    assert result.exit_code == code, result.output
    assert verdicts(result) == expected
    assert f"{code} of 2 times are slower" in result.output


def test_compare_names_cases_that_only_one_run_has(tmp_path):
    before = made_run() + made_run(shapes="gpt2")
    result = compared(tmp_path, before, made_run() + made_run(op="sgd"))
    assert result.exit_code == 0
    assert "only in the first run: sgd+ema · gpt2 · fp32 · cpu" in result.output
    assert "only in the second run: sgd · resnet50 · fp32 · cpu" in result.output
    assert len(verdicts(result)) == 2


def test_compare_without_a_common_case_is_an_error(tmp_path):
    result = compared(tmp_path, made_run(), made_run(shapes="gpt2"))
    assert result.exit_code == 2
    assert "no case in common" in result.output


def test_compare_warns_of_another_machine(tmp_path):
    result = compared(tmp_path, made_run(), made_run(machine="Another CPU"))
    assert "the runs differ in machine: Some CPU against Another CPU" in result.output


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_another_schema_is_an_error(tmp_path, kind):
    rows_module.save([made_row(schema=1)], tmp_path, "cpu")
    path = tmp_path / f"cpu.{kind}"
    if kind == "json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    result = invoke("table", path)
    assert result.exit_code == 2
    assert f"no results of schema {rows_module.SCHEMA}" in words(result)


@pytest.mark.parametrize("name", ["missing.csv", "empty.csv", "empty"])
def test_files_without_results_are_errors(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text(",".join(rows_module.COLUMNS) + "\n")
    for command in ("table", "plot"):
        assert invoke(command, tmp_path / name).exit_code == 2


def test_the_table_of_the_readme_has_the_numbers_of_the_rows(tmp_path):
    swept = made_run(shapes="size-2^14")
    rows_module.save(made_run() + swept, tmp_path, "cpu")
    lines = invoke("table", tmp_path).output.splitlines()
    assert lines[2:] == [
        "| sgd+ema | resnet50, fp32 | torch-fused+lerp | 15.00 | **10.00** | 1.50x | 95% | 80.00 |"
    ]


def swept_runs() -> list[Any]:
    rows = made_run() + made_run(op="clip+sgd+ema", ours=9.0)
    for power in (12, 16, 20):
        rows += made_run(shapes=f"size-2^{power}", tensors=1, params=2**power)
    for number in (10, 1000):
        rows += made_run(shapes=f"count-{number}", tensors=number, host=float(number))
    return rows


def test_plot_draws_each_plot_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    rows_module.save(swept_runs(), tmp_path, "cpu")
    out = tmp_path / "plots"
    result = invoke("plot", tmp_path / "cpu.csv", "--out", out)
    assert result.exit_code == 0, result.output
    for name in ("bandwidth", "ratio", "host"):
        assert (out / f"cpu-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"cpu-{name}.svg").read_text()
    assert len(list(out.iterdir())) == 6


def test_plots_tell_machine_commit_and_numbers(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    plots = module("plot")
    with plots.mpl.rc_context({"svg.fonttype": "none"}):  # text as text
        plots.draw(swept_runs(), tmp_path, "cpu")
    for name in ("bandwidth", "ratio", "host"):
        text = (tmp_path / f"cpu-{name}.svg").read_text()
        assert "Some CPU" in text
        assert "commit cccccccccc" in text
    assert "measured roof, 75.3 GB/s" in (tmp_path / "cpu-bandwidth.svg").read_text()
    ratio = (tmp_path / "cpu-ratio.svg").read_text()
    assert ">1.50<" in ratio
    assert ">1.67<" in ratio


def test_plots_without_data_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    rows_module.save(made_run(), tmp_path, "cpu")
    assert invoke("plot", tmp_path, "--out", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["cpu-ratio.svg"]
