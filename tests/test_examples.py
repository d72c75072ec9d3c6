"""The examples run, for a few steps each."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; what it needs may not be there."""
    for package in ("matplotlib", "rich", "sklearn", "typer"):
        pytest.importorskip(package)
    if not EXAMPLES.exists():
        pytest.skip("the tests run outside a checkout")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture
def byol(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("byol", monkeypatch)


def table_of(byol: ModuleType, output: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs the example for 40 steps, and returns the rows that it prints."""
    byol.main(epochs=8, batch_size=256, lr=0.3, base_decay=0.97, labels=5, seed=0, output=output)
    return [line for line in capsys.readouterr().out.splitlines() if "%" in line and "│" in line]


def test_byol_learns_features_and_draws_them(byol, tmp_path, capsys):
    output = tmp_path / "new" / "byol.png"
    _pixels, start, first, *_, last = (row.split("│") for row in table_of(byol, output, capsys))
    assert output.read_bytes().startswith(b"\x89PNG")
    assert float(last[2].split()[0]) > float(start[2].split()[0]) + 4  # accuracy in percent
    assert float(last[3]) < 0.9 * float(first[3])  # loss
    assert float(last[4]) == 1  # the target's decay at the end


def test_byol_is_the_same_for_the_same_seed(byol, tmp_path, capsys):
    first, second = (table_of(byol, tmp_path / "byol.png", capsys) for _ in range(2))
    assert first == second


def test_byol_has_no_batch_of_one_image(byol, tmp_path):
    byol.main(
        epochs=1,
        batch_size=3,
        lr=0.01,
        base_decay=0.97,
        labels=5,
        seed=0,
        output=tmp_path / "byol.png",
    )


def rows_of(output: str) -> list[list[str]]:
    """The rows of a printed table."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_maml_adapts_better_than_what_was_not_learned(monkeypatch, tmp_path, capsys):
    maml, output = example("maml", monkeypatch), tmp_path / "new" / "maml.png"
    maml.main(outer_steps=400, tasks=4, inner_steps=2, seed=0, output=output)
    learned, unlearned = rows_of(capsys.readouterr().out)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert float(learned[-1]) < 0.85 * float(unlearned[-1])
    assert float(learned[-1]) < 0.85 * float(learned[1])


def test_toy_prints_derivatives_beside_their_differences(monkeypatch, capsys):
    example("meta_learning_toy", monkeypatch).main()
    output = capsys.readouterr().out
    assert "0.011927987982895929" in output
    rows = rows_of(output)
    assert len(rows) == 3
    for _, _, derivative, difference in rows:
        assert float(derivative) == pytest.approx(float(difference), rel=1e-4)
    assert [row[2] for row in rows] == ["-1.6294974", "-0.9496140", "-0.0053114"]
