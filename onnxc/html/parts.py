"""What a page is made of: sections of parts, which the template knows by their kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Bar:
    """A cell with a bar under its text. share: length in 0..1; tone: a, b, good or bad."""

    text: str
    share: float
    tone: str = "b"


Cell = str | Bar


@dataclass(frozen=True)
class Prose:
    """A paragraph. tone: empty, good, bad or dim."""

    kind: ClassVar[str] = "prose"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headings. names: how many columns at the left are text, not figures."""

    kind: ClassVar[str] = "table"
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1


@dataclass(frozen=True)
class Picture:
    """An inline drawing, with what it shows in words."""

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Small pictures side by side."""

    kind: ClassVar[str] = "gallery"
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Strip:
    """A row of small cells (tone, name), one for each node."""

    kind: ClassVar[str] = "strip"
    cells: tuple[tuple[str, str], ...]
    caption: str


@dataclass(frozen=True)
class Group:
    """What is said of some nodes, and their names."""

    kind: ClassVar[str] = "group"
    count: int
    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Notes:
    """Sentences, one a line."""

    kind: ClassVar[str] = "notes"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Fold:
    """Parts that are shown on demand."""

    kind: ClassVar[str] = "fold"
    title: str
    parts: tuple[Part, ...]


Part = Prose | Table | Picture | Gallery | Strip | Group | Notes | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading with its parts. key: the anchor on the page."""

    key: str
    title: str
    parts: tuple[Part, ...]
