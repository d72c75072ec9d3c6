"""A row of results, and the files that keep rows: tidy CSV, and JSON with the same columns."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

DEVICES = ("cpu", "cuda")  # a run writes the file that is named after its device
SCHEMA = 2  # of the columns below; raised when one of them changes its meaning


class BadResultsError(ValueError):
    """A file holds no results, or those of another schema."""


@dataclass(frozen=True)
class Row:
    """One contestant in one case. What could not be measured is None, and `note` says why.

    Bandwidth counts the same bytes for every contestant, those that must move in one pass, and GB
    are 10^9 bytes: whoever passes over memory more often shows less bandwidth, as it should.
    """

    schema: int
    date: str
    commit: str
    dirty: str
    machine: str
    device: str
    driver: str
    clocks: str
    power: str
    python: str
    torch: str
    fused_opt: str
    cuda: str  # that torch is built with
    module_cuda: str  # that the kernels were built with
    cpu_isa: str
    peers: str  # versions of their packages
    threads: int
    cache: str  # cold or warm, for the times; host times are always warm

    op: str
    shapes: str
    tensors: int
    params: int
    dtype: str
    provider: str
    peer: str  # as --against has it; or fused_opt, or roof
    repeats: int | None = None
    bytes: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gbps: float | None = None
    roof_gbps: float | None = None
    roof_share: float | None = None
    ratio: float | None = None  # the time of the best peer over this one: above 1 is faster
    launches: int | None = None  # kernels, copies and fills of a step on a GPU
    host_us: float | None = None
    host_p20_us: float | None = None
    host_p80_us: float | None = None
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What all contestants of one table have in common."""
        return self.device, str(self.threads), self.cache, self.op, self.shapes, self.dtype


COLUMNS = [each.name for each in fields(Row)]
TYPES = get_type_hints(Row)


def written(value: object) -> str:
    """Returns a value as the CSV has it."""
    if value is None:
        return ""
    return format(value, ".6g") if isinstance(value, float) else str(value)


def read(name: str, text: str) -> Any:
    """Returns the value of a column from the text that the CSV has."""
    kind = TYPES[name]
    if kind is str:
        return text
    if text == "":
        return None
    return int(text) if kind in (int, int | None) else float(text)


def save(rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """Writes rows to `folder/stem.csv` and `folder/stem.json`, in place of what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    table, tree = folder / f"{stem}.csv", folder / f"{stem}.json"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([written(value) for value in asdict(row).values()] for row in rows)
    # The JSON has the digits of the CSV: whichever of them is read, the numbers are the same.
    records = [
        {name: read(name, written(value)) for name, value in asdict(row).items()} for row in rows
    ]
    tree.write_text(json.dumps({"schema": SCHEMA, "rows": records}, indent=1) + "\n")
    return [table, tree]


def load(path: Path) -> list[Row]:
    """Reads a file that `save` wrote, CSV or JSON.

    Raises:
        BadResultsError: It is not there, or has another schema or no rows.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise BadResultsError(f"{path}: {error.strerror}") from None
    try:
        records = records_of_json(text) if path.suffix == ".json" else records_of_csv(text)
        rows = [Row(**record) for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise BadResultsError(f"{path}: no results of schema {SCHEMA} ({error})") from None
    if not rows:
        raise BadResultsError(f"{path}: no rows")
    return rows


def records_of_json(text: str) -> list[dict[str, Any]]:
    """The rows of a JSON file."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        raise ValueError("the file has another schema")
    return list(tree["rows"])


def records_of_csv(text: str) -> list[dict[str, Any]]:
    """The rows of a CSV file."""
    records = list(csv.DictReader(text.splitlines()))
    for record in records:
        if list(record) != COLUMNS or record["schema"] != str(SCHEMA):
            raise ValueError("the columns are others")
    return [{name: read(name, value) for name, value in record.items()} for record in records]


def find(paths: list[Path]) -> list[Path]:
    """Returns the files that are meant: of a folder, the CSV files of a run in it."""
    found: list[Path] = []
    for path in paths:
        files = [path / f"{device}.csv" for device in DEVICES]
        found += [each for each in files if each.exists()] if path.is_dir() else [path]
    if not found:
        raise BadResultsError(f"{', '.join(map(str, paths))}: no CSV files of results")
    return found
