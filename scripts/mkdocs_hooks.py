"""The navigation lists whatever method pages there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Put all pages of docs/methods under the navigation's `Methods`."""
    folder = Path(config["docs_dir"]) / "methods"
    names = sorted(page.stem for page in folder.glob("*.md") if page.stem != "index")
    for entry in config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *({n: f"methods/{n}.md"} for n in names)]
    return config
