"""A report: titled sections of prose, tables and figures, as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusekit import __version__
from fusekit.errors import MissingExtraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Table:
    """Rows of text below a head; columns after the first are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure with its title and what to look for in it."""

    title: str
    figure: Figure
    caption: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence in a box: `tone` is `stop`, `warning`, `note` or `advice`."""

    tone: str
    text: str
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of a report; `content` in order, neighbouring plots side by side where there is
    room."""

    title: str
    content: Sequence[Table | Plot | Note | str]


@dataclass(frozen=True)
class Report:
    """A page."""

    title: str
    lead: str
    sections: Sequence[Section]

    @property
    def plots(self) -> list[Plot]:
        return [item for part in self.sections for item in part.content if isinstance(item, Plot)]

    def to_html(self) -> str:
        """The page with styles, Plotly and data inside: nothing is loaded from elsewhere."""
        import jinja2
        from plotly.offline import get_plotlyjs

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html.j2").render(
            report=self,
            sections=[
                (part.title, [_cell(item) for item in part.content]) for part in self.sections
            ],
            plotly=get_plotlyjs(),
            version=__version__,
        )

    def save_figures(self, folder: Path, suffix: str = "svg") -> list[Path]:
        """Every figure as an image file (`svg`, `png` or `pdf`), named after its title.

        Raises:
            MissingExtraError: kaleido, which draws images, is not installed.
        """
        try:
            import kaleido  # noqa: F401
        except ModuleNotFoundError:
            raise MissingExtraError(f"writing figures as {suffix} files", "report") from None
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for number, plot in enumerate(self.plots, 1):
            slug = re.sub(r"\W+", "-", plot.title.lower()).strip("-")
            path = folder / f"{number:02}-{slug}.{suffix}"
            figure = plot.figure.__class__(plot.figure)
            figure.update_layout(paper_bgcolor="white", title=plot.title, margin={"t": 60})
            figure.write_image(path, width=900)
            written.append(path)
        return written


def _cell(item: Table | Plot | Note | str) -> tuple[str, Any]:
    """The template's name for an item, and the item; figures as JSON that cannot end a script."""
    if isinstance(item, Plot):
        data = item.figure.to_json().replace("<", "\\u003c")
        return "plot", {"title": item.title, "caption": item.caption, "json": data}
    return {Table: "table", Note: "note", str: "text"}[type(item)], item
