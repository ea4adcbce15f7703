"""Reading the documentation as data: pages, code blocks, headings, links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def label(page: Path) -> str:
    """A page's path from the root, for test names."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return [code for name, code in _FENCE.findall(page.read_text()) if name == language]


def links(page: Path) -> list[str]:
    """Targets of all links outside code."""
    prose = _FENCE.sub("", page.read_text())
    return _LINK.findall(re.sub(r"`[^`]*`", "", prose))


def includes(page: Path) -> list[str]:
    """Files that a page includes, from the root."""
    return _INCLUDE.findall(page.read_text())


def anchors(page: Path) -> set[str]:
    """The ids that headings get."""
    prose = _FENCE.sub("", page.read_text())
    return {_slug(heading) for heading in _HEADING.findall(prose)}


def _slug(heading: str) -> str:
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "").strip().lower())
    return re.sub(r"[\s-]+", "-", plain)
