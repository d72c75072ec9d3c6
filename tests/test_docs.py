"""docs/building.md quotes messages: each is one that the code really gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "building.md"
SPEAKERS = (
    "_cuda_advice.py",
    "_doctor_findings.py",
    "_native.py",
    "_plan.py",
    "_toolchain.py",
    "doctor.py",
)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def spoken() -> str:
    """Returns every text in the code, an f-string's parts joined by … as on the page."""
    texts = [(ROOT / "CMakeLists.txt").read_text(encoding="utf-8")]
    for name in SPEAKERS:
        tree = ast.parse((ROOT / "fused_opt" / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return squeezed("\n".join(texts))


@pytest.mark.skipif(not PAGE.is_file(), reason="there are no documents beside the tests")
def test_quoted_messages_are_those_of_the_code() -> None:
    quotes = re.findall(r"^> (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(quotes) > 15
    known = spoken()
    pieces = [piece.strip() for quote in quotes for piece in quote.split("…")]
    assert [piece for piece in pieces if squeezed(piece) not in known] == []
