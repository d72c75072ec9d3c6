"""`python -m benchmarks plot`: bandwidth by size, ratios per model, host time by tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .ops import OPS
from .providers import OURS
from .report import by_case, ours_in
from .roof import ROOF
from .rows import Row

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e7ec"
OUR_COLOUR = "#0b7a75"
ROOF_COLOUR = "#9aa5b1"
PEER_COLOURS = {  # muted, so that the line that matters stands out
    "torch-fused": "#c8553d",
    "torch-foreach": "#d9a441",
    "torch-compile": "#6c5b7b",
    "torch-averaged-model": "#88a09e",
    "torch-ema": "#8d6e63",
    "ema-pytorch": "#5b8db8",
    "timm": "#a26769",
    "apex": "#7a9e3f",
    "torch-forloop": "#b0a8b9",
}
OP_SHADES = {"sgd": "#9cc9c5", "sgd+ema": "#3f9c96", "clip+sgd+ema": "#0b5f5b"}
WIDTH, HEIGHT, DPI = 8.0, 4.3, 160  # inches; at 800 pixels text is as large as that of a page
STYLE: Any = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "svg.hashsalt": "fused_opt",  # the same rows give the same file
}


def draw(rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """Draws what the rows have data for, and returns the files.

    Args:
        rows: Of one run.
        folder: Where the files go.
        stem: What their names begin with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, plot in {"bandwidth": bandwidth, "ratio": ratios, "host": host_times}.items():
        with mpl.rc_context(STYLE):
            figure = plot(rows)
            if figure is None:
                continue
            for kind in ("png", "svg"):
                path = folder / f"{stem}-{name}.{kind}"
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(path, dpi=DPI, metadata=metadata, facecolor="white")
                if kind == "svg":  # matplotlib ends lines with blanks
                    lines = path.read_text().splitlines()
                    path.write_text("".join(f"{line.rstrip()}\n" for line in lines))
                files.append(path)
    return files


# ---- Parts ---------------------------------------------------------------------------------------


def new_figure(rows: list[Row], title: str, subtitle: str) -> tuple[Figure, Axes]:
    """Returns axes under a title, and over a caption that says where the numbers come from."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0.085, 0.195, 0.885, 0.62))
    figure.text(0.02, 0.94, title, fontsize=13.5, fontweight="bold")
    figure.text(0.02, 0.88, subtitle, fontsize=10, color=MUTED)
    figure.text(0.02, 0.025, caption(rows), fontsize=8, color=MUTED)
    return figure, axes


def caption(rows: list[Row]) -> str:
    """Says which machine, versions and commit the rows are of."""
    row = rows[0]
    where = row.machine.replace("(R)", "").replace("(TM)", "")
    threads = f"{row.threads} thread{'s' * (row.threads > 1)}"
    isa = f"{row.cpu_isa}, {threads}" if row.device == "cpu" else f"driver {row.driver}"
    commits = ", ".join(dict.fromkeys(each.commit[:10] for each in rows))
    changed = " with changes" if any(each.dirty == "true" for each in rows) else ""
    version = f"torch {row.torch} · fused_opt {row.fused_opt}, commit {commits}{changed}"
    return f"{where} ({isa}) · {version}"


def colour(peer: str) -> str:
    """Returns the colour of a contestant."""
    return OUR_COLOUR if peer == OURS else PEER_COLOURS.get(peer, MUTED)


def human(number: float) -> str:
    """Returns a number of elements as people say it."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def lines_of(rows: Iterable[Row], what: str) -> dict[str, list[Row]]:
    """Returns the rows of each provider that have a number, those of fused_opt last."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.peer != ROOF and getattr(row, what) is not None:
            lines.setdefault(row.provider, []).append(row)
    return dict(sorted(lines.items(), key=lambda line: line[1][0].peer == OURS))


def draw_lines(
    axes: Axes, lines: dict[str, list[Row]], x: str, y: Callable[[Row], float]
) -> list[tuple[float, str, str]]:
    """Draws a line for each provider; returns where each ends, its name and its colour."""
    ends = []
    for name, rows in lines.items():
        rows = sorted(rows, key=lambda row: float(getattr(row, x)))
        ours = rows[0].peer == OURS
        values = [y(row) for row in rows]
        axes.plot(
            [getattr(row, x) for row in rows],
            values,
            color=colour(rows[0].peer),
            linewidth=2.8 if ours else 1.5,
            marker="o",
            markersize=4.5 if ours else 3,
            zorder=3 if ours else 2,
        )
        ends.append((values[-1], name, colour(rows[0].peer)))
    return ends


def label_ends(axes: Axes, ends: list[tuple[float, str, str]], x: float, gap: float) -> None:
    """Writes names beside the ends of lines, moved apart where they would overlap.

    Args:
        axes: The axes.
        ends: Value, name and colour of each line's end.
        x: Where the lines end.
        gap: The least distance between two names, in parts of the axes' height.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = sorted((float(to_axes.transform((x, y))[1]), y, name, hue) for y, name, hue in ends)
    places = [place for place, *_ in wanted]
    for _ in range(20 * len(places)):  # neighbours push each other apart
        for i in range(len(places) - 1):
            push = max(0.0, gap - (places[i + 1] - places[i])) / 2
            places[i], places[i + 1] = places[i] - push, places[i + 1] + push
    right = float(to_axes.transform((x, ends[0][0]))[0])
    for place, (_, _, name, hue) in zip(places, wanted, strict=True):
        bold = "bold" if name == OURS else "normal"
        axes.text(
            right + 0.015,
            place,
            name,
            color=hue,
            fontweight=bold,
            fontsize=9.5,
            va="center",
            transform=axes.transAxes,
        )


# ---- Plots ---------------------------------------------------------------------------------------


def bandwidth(rows: list[Row]) -> Figure | None:
    """GB/s against the size of one tensor, under the roof."""
    swept = [row for row in rows if row.shapes.startswith("size-")]
    roofs = [row.gbps for row in swept if row.peer == ROOF and row.gbps]
    lines = lines_of(swept, "gbps")
    if not lines or not roofs:
        return None
    op, roof = swept[0].op, max(roofs)
    figure, axes = new_figure(
        rows,
        f"Bandwidth of {op} against size",
        f"GB/s of the bytes that one pass must move; one {swept[0].dtype} tensor, caches cold",
    )
    axes.set_xscale("log", base=2)
    ends = draw_lines(axes, lines, "params", lambda row: row.gbps or 0.0)
    sizes = sorted({row.params for row in swept})
    axes.axhline(roof, color=ROOF_COLOUR, linestyle=(0, (5, 3)), linewidth=1.4, zorder=1)
    axes.text(sizes[0], roof * 1.015, f"measured roof, {roof:.1f} GB/s", color=MUTED, fontsize=9.5)
    axes.set_ylim(0, roof * 1.12)
    axes.set_xlim(sizes[0] * 0.85, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.42)
    axes.set_xticks(sizes, [human(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set_xlabel("elements")
    axes.grid(axis="y")
    label_ends(axes, ends, sizes[-1], gap=0.062)
    return figure


def ratios(rows: list[Row]) -> Figure | None:
    """How many times as fast as the best peer, a group of bars per model."""
    models: dict[str, dict[str, float]] = {}
    for case in by_case(rows):
        ours = ours_in(case)
        if ours is None or ours.ratio is None or ours.shapes.startswith(("size-", "count-")):
            continue
        if ours.dtype == "fp32" and ours.op in OP_SHADES:
            models.setdefault(ours.shapes, {})[ours.op] = ours.ratio
    if not models:
        return None
    figure, axes = new_figure(
        rows,
        "How many times as fast as the best peer",
        "Time of the fastest peer over that of fused_opt, fp32; 1 is as fast",
    )
    width, top = 0.26, max(max(ops.values()) for ops in models.values())
    for i, ops in enumerate(models.values()):
        for j, (op, ratio) in enumerate(ops.items()):
            x = i + (j - (len(ops) - 1) / 2) * (width + 0.02)
            axes.bar(x, ratio, width, color=OP_SHADES[op], zorder=2)
            axes.text(x, ratio + top * 0.015, f"{ratio:.2f}", ha="center", fontsize=9.5)
    axes.axhline(1, color=INK, linewidth=1, zorder=3)
    axes.set_xticks(range(len(models)), models, color=INK)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, top * 1.18)
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.set_yticks([])  # the bars have their numbers
    axes.spines["left"].set_visible(False)
    shown = [op for op in OPS if any(op in ops for ops in models.values())]
    handles = [Patch(color=OP_SHADES[op], label=op) for op in shown]
    place = {"loc": "upper right", "bbox_to_anchor": (0.985, 0.86), "ncols": len(shown)}
    figure.legend(handles=handles, frameon=False, handlelength=0.9, fontsize=10, **place)
    return figure


def host_times(rows: list[Row]) -> Figure | None:
    """Host time of a step against the number of tensors."""
    swept = [row for row in rows if row.shapes.startswith("count-")]
    lines = lines_of(swept, "host_us")
    if not lines:
        return None
    figure, axes = new_figure(
        rows,
        f"Host time of {swept[0].op} against the number of tensors",
        "Microseconds until a step returns, caches warm; tensors of one element",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = draw_lines(axes, lines, "tensors", lambda row: row.host_us or 1.0)
    counts = sorted({row.tensors for row in swept})
    axes.set_xlim(counts[0] * 0.85, counts[-1] * max(counts[-1] / counts[0], 10) ** 0.42)
    axes.set_xticks(counts, [human(number) for number in counts])
    axes.yaxis.set_major_locator(LogLocator(base=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** floor(log10(low)), 10 ** ceil(log10(high)))  # whole decades
    axes.minorticks_off()
    axes.set_xlabel("tensors")
    axes.grid(axis="y")
    label_ends(axes, ends, counts[-1], gap=0.062)
    return figure
