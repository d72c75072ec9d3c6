"""The doctor's report: its facts and findings as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from fused_opt._doctor_facts import Build, Compiler, Facts, Gpu, Step, capability, code
from fused_opt._doctor_findings import Finding


@dataclass(frozen=True)
class Report:
    """The facts and what follows from them."""

    facts: Facts
    findings: Sequence[Finding]

    @property
    def problems(self) -> list[Finding]:
        """What keeps fused_opt from working here."""
        return [finding for finding in self.findings if finding.level == "problem"]

    @property
    def warnings(self) -> list[Finding]:
        """What may do so one day, or wastes something."""
        return [finding for finding in self.findings if finding.level == "warning"]

    @property
    def advice(self) -> str:
        """The line in which the text ends: healthy, or what to do."""
        problems = self.problems
        if not problems:
            return f"Healthy: {where_it_runs(self.facts)}"
        count = "1 problem." if len(problems) == 1 else f"{len(problems)} problems. To begin with:"
        return f"{count} {problems[0].cure}"

    def to_json(self) -> str:
        """Returns one JSON object that has all that the text shows, and more."""
        facts = dataclasses.asdict(self.facts)
        for fact, step in zip(facts["steps"], self.facts.steps):  # noqa: B905 (Python 3.9)
            fact["passed"] = step.passed
        content = {
            "healthy": not self.problems,
            "advice": self.advice,
            "problems": [dataclasses.asdict(finding) for finding in self.problems],
            "warnings": [dataclasses.asdict(finding) for finding in self.warnings],
        }
        return json.dumps({**content, **facts}, indent=2)

    def level(self, subject: str, otherwise: str = "ok") -> str:
        """Returns the worst that was found about a subject."""
        levels = {finding.level for finding in self.findings if finding.subject == subject}
        return next((level for level in ("problem", "warning") if level in levels), otherwise)


def where_it_runs(facts: Facts) -> str:
    """Returns the sentence for a machine where all is well."""
    isa = f" ({facts.module.cpu_isa})" if facts.module else ""
    gpus = [step.device for step in facts.steps if step.passed and step.device != "cpu"]
    places = " and ".join([f"this CPU{isa}", *([", ".join(gpus)] if gpus else [])])
    without = "" if gpus else "; torch uses no GPU here" if facts.gpus else "; there is no GPU here"
    return f"fused_opt runs on {places}{without}"


# ---- Text ----------------------------------------------------------------------------------------

COLOURS = {"ok": "32", "warning": "33", "problem": "31", "title": "1", "grey": "2"}
SIGNS = {"ok": "✓", "warning": "!", "problem": "✗", "plain": "·"}
ASCII_SIGNS = {"ok": "+", "warning": "!", "problem": "X", "plain": "-"}


@dataclass(frozen=True)
class Style:
    """What a terminal can show."""

    width: int = 100
    colour: bool = False
    unicode: bool = True

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str]) -> Style:
        """Returns what suits a stream: colour only for a terminal, and unless NO_COLOR is set."""
        plain = bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb"
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
        try:
            "".join(SIGNS.values()).encode(stream.encoding or "ascii")
        except UnicodeError:
            return cls(width, stream.isatty() and not plain, unicode=False)
        return cls(width, stream.isatty() and not plain)

    def paint(self, text: str, look: str) -> str:
        """Returns the text in a colour, if there is any."""
        return f"\x1b[{COLOURS[look]}m{text}\x1b[0m" if self.colour and look in COLOURS else text

    def sign(self, mark: str) -> str:
        """Returns the sign of a row."""
        return self.paint((SIGNS if self.unicode else ASCII_SIGNS)[mark], mark)

    def wrap(self, text: str, indent: int) -> str:
        """Returns the text in lines that fit, all but the first one indented."""
        blank = " " * indent
        lines = textwrap.wrap(
            text, self.width - indent, break_long_words=False, break_on_hyphens=False
        )
        return f"\n{blank}".join(lines)


@dataclass(frozen=True)
class Row:
    """A line of the text."""

    mark: str
    """"ok", "warning", "problem" or "plain"."""
    label: str
    text: str
    details: Sequence[str] = ()
    """Further lines, in grey."""


def render(report: Report, style: Style) -> str:
    """Returns the report as text."""
    sections = {
        f"fused_opt {report.facts.package.version or 'of unknown version'}": package_rows(report),
        "To build it": build_rows(report),
        "What is built": module_rows(report),
        "Where it runs": machine_rows(report),
    }
    labels = max(len(row.label) for rows in sections.values() for row in rows)
    text: list[str] = []
    for title, rows in sections.items():
        text += [
            style.paint(title, "title"),
            *(_render_row(row, labels, style) for row in rows),
            "",
        ]
    for title, findings in (("Problems", report.problems), ("Good to know", report.warnings)):
        if findings:
            # The last line of all says how to cure a single problem.
            alone = title == "Problems" and len(findings) == 1
            shown = [_render_finding(finding, style, cure=not alone) for finding in findings]
            text += [style.paint(title, "title"), *shown, ""]
    mark = "problem" if report.problems else "ok"
    return "\n".join([*text, f"{style.sign(mark)} {style.paint(report.advice, mark)}"])


def _render_row(row: Row, labels: int, style: Style) -> str:
    indent = labels + 6
    lines = [f"  {style.sign(row.mark)} {row.label:<{labels}}  {style.wrap(row.text, indent)}"]
    for detail in row.details:
        lines.append(" " * indent + style.paint(style.wrap(detail, indent), "grey"))
    return "\n".join(lines)


def _render_finding(finding: Finding, style: Style, cure: bool) -> str:
    lines = [style.wrap(line, 4) for line in finding.message.splitlines()]
    if cure:
        lines.append(f"{'→' if style.unicode else '->'} {finding.cure}")
    return f"  {style.sign(finding.level)} " + "\n    ".join(lines)


def package_rows(report: Report) -> list[Row]:
    """The package, the interpreter and the variables that are set."""
    facts = report.facts
    python = f"{facts.python.version}, {facts.python.executable} ({facts.python.platform})"
    rows = [
        Row("plain", "folder", facts.package.folder),
        Row(report.level("python"), "Python", python),
    ]
    rows += [Row("plain", name, value) for name, value in facts.environment.items()]
    return rows


def build_rows(report: Report) -> list[Row]:
    """Every nvcc, what a build takes, and its other programs."""
    facts = report.facts
    rows = [_compiler_row(report, compiler) for compiler in facts.compilers]
    if not rows:
        rows.append(Row(report.level("nvcc", "plain"), "nvcc", "none"))
    if facts.build is not None:
        rows.append(_choice_row(report, facts.build))
    for program in facts.programs:
        missing = "none; pip brings one" if program.name in ("cmake", "ninja") else "none"
        seen = f"{program.version or 'of unknown version'}, {program.path}"
        mark = report.level(program.name, "ok" if program.path else "plain")
        rows.append(Row(mark, program.name, seen if program.path else missing))
    return rows


def _compiler_row(report: Report, compiler: Compiler) -> Row:
    versions: dict[str, list[str]] = {}
    for tool in compiler.tools:
        versions.setdefault(tool.version or "of no known release", []).append(tool.name)
    tools = ", ".join(f"{' '.join(names)} {version}" for version, names in versions.items())
    arch = f"sm_{compiler.default_arch} by default" if compiler.default_arch else ""
    host = f"calls {compiler.host_compiler}" if compiler.host_compiler else ""
    known = "; ".join(filter(None, [tools, arch, host]))
    details = [*filter(None, [known, compiler.problem]), *compiler.warnings]
    mark = "warning" if compiler.warnings else "ok"
    if compiler.problem:  # Red only where it keeps something from being built.
        mark = report.level("nvcc", "warning")
    release = compiler.release or "?"
    return Row(mark, f"nvcc {release}", f"{compiler.path} (from {compiler.source})", details)


def _choice_row(report: Report, build: Build) -> Row:
    mark = report.level("nvcc", "plain")
    if build.refusal:
        return Row(mark, "a build", "would be refused; the reason is given below")
    told = [
        remark
        for compiler in report.facts.compilers
        for remark in (compiler.problem, *compiler.warnings)
        if remark
    ]
    notes = [note for note in build.notes if not any(remark in note for remark in told)]
    text = "would have no CUDA kernels"
    if build.nvcc is not None:
        text = f"would take {build.nvcc}: {code(build.cubins, build.ptx)}"
    return Row(mark, "a build", text, notes)


def module_rows(report: Report) -> list[Row]:
    """The compiled module."""
    module = report.facts.module
    if module is None or module.error:
        why = module.error if module else _fault(report, "module")
        return [Row("problem", "fused_opt._C", (module and module.path) or "none", [str(why)])]
    kernels = "none, a CPU-only module"
    if module.cuda_version is not None:
        kernels = f"CUDA {module.cuda_version}: {code(module.cubins, module.ptx)}"
    others = ", ".join(level for level in module.cpu_isas if level != module.cpu_isa)
    return [
        Row(report.level("module"), "fused_opt._C", f"{module.version}, {module.path}"),
        Row("plain", "CUDA kernels", kernels),
        Row(
            "plain",
            "CPU loops",
            f"{module.cpu_isa}" + (f" (rather than {others})" if others else ""),
        ),
    ]


def machine_rows(report: Report) -> list[Row]:
    """torch, the driver, the GPUs, and a step on each device."""
    facts = report.facts
    rows = [_torch_row(report), _driver_row(report)]
    if not facts.gpus:
        rows.append(Row(report.level("gpus", "plain"), "GPU", "none"))
    rows += [_gpu_row(report, gpu) for gpu in facts.gpus]
    rows += [_step_row(step) for step in facts.steps]
    return rows


def _fault(report: Report, section: str) -> str:
    faults = (fault.reason for fault in report.facts.faults if fault.section == section)
    return next(faults, "unknown, since a fault came before")


def _torch_row(report: Report) -> Row:
    torch = report.facts.torch
    if torch is None or torch.version is None:
        return Row("problem", "torch", str(torch.error if torch else _fault(report, "torch")))
    cuda = "built without CUDA"
    if torch.cuda_version:
        cuda = f"built for CUDA {torch.cuda_version}, can use {torch.gpus} GPU"
        cuda += "s" if torch.gpus != 1 else ""
    return Row(report.level("torch"), "torch", f"{torch.version}, {cuda}")


def _driver_row(report: Report) -> Row:
    driver, module = report.facts.driver, report.facts.module
    text = f"for CUDA {driver.release}" if driver and driver.release else "none"
    if module and module.oldest_driver:
        branch = f"{module.oldest_driver_branch}, " if module.oldest_driver_branch else ""
        text += f"; the oldest one for this module is {branch}for CUDA {module.oldest_driver}"
    mark = report.level("driver", "ok" if driver and driver.release else "plain")
    return Row(mark, "driver", text, [driver.error] if driver and driver.error else [])


def _gpu_row(report: Report, gpu: Gpu) -> Row:
    runs = {"cubin": "runs native machine code", "ptx": "runs PTX that the driver compiles"}
    verdict = runs.get(gpu.code or "", f"runs nothing, for {gpu.why_none}")
    text = f"{gpu.name}, compute capability {capability(gpu.capability)}: {verdict}"
    return Row(report.level(gpu.device, "ok" if gpu.code else "problem"), gpu.device, text)


def _step_row(step: Step) -> Row:
    text = "SGD with momentum and EMA on one element: exactly the expected numbers"
    if step.error:
        text = f"fails: {step.error}"
    elif not step.passed:
        text = f"wrong: gives {step.found} in place of {step.expected}"
    return Row("ok" if step.passed else "problem", f"step on {step.device}", text)
