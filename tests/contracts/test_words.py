"""Words of docstrings, messages and pages: docstrings open with the field's noun, and all keep to plain English."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("open_lm", "scripts", "examples", "eval", "datapreprocess")
OPENING = re.compile(r"\W*(what|where|how|which|who|whose|when|why)\b", re.IGNORECASE)
TRANSLATED = re.compile(
    r"\b(passed over|oftener|is said|are said|the \w+ of now|anew|at hand|none of both|(?<!-)lanes?)\b", re.IGNORECASE
)
"""Turns that readers stumbled over: skipped, more often, logged, current, again, available, neither, stripe."""


def docstrings(source: str) -> list[str]:
    """The docstrings of a file, and the texts under its constants."""
    found = [node.value.value for node in ast.walk(ast.parse(source)) if is_text(node)]
    return [" ".join(text.split()) for text in found]


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def texts(source: str) -> list[str]:
    """Every text of words in a file, messages and help among them; of an f-string its constant parts."""
    found = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [" ".join(text.split()) for text in found if isinstance(text, str) and " " in text.strip()]


def faults(source: str) -> list[str]:
    opened = [text for text in docstrings(source) if OPENING.match(text)]
    return opened + [text for text in texts(source) if TRANSLATED.search(text)]


def test_docstrings_open_with_a_noun_and_use_no_translated_turns():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 350
    assert {str(path): found for path in files if (found := faults(path.read_text()))} == {}


def test_pages_use_no_translated_turns():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert len(pages) > 15
    found = {page.name: [m[0] for m in TRANSLATED.finditer(" ".join(page.read_text().split()))] for page in pages}
    assert {name: turns for name, turns in found.items() if turns} == {}


def test_a_fault_in_a_message_or_on_a_page_is_seen():
    assert faults('raise ValueError(f"{name}: not at hand, give it anew.")')
    assert TRANSLATED.search("a hash of seed, lane and draw") and not TRANSLATED.search("a plane")


@pytest.mark.parametrize(
    "text",
    [
        "What a rank holds.",
        "`Where` it lies.",
        "How\n    often",
        "Blocks that are passed over.",
        "It is computed anew.",
    ],
)
def test_a_fault_is_seen(text):
    assert faults(f'def f():\n    """{text}"""') and faults(f'class C:\n    """{text}"""') and faults(f'"""{text}"""')
    assert not faults('def f():\n    """Whether it fits, whatever the width."""\n    return "What?"')
