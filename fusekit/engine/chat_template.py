"""Chat templates of the inputs, and where that of the output goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.recipe.chat_templates import chosen_template

_FILE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"


def with_chat_template(
    setting: str,
    checkpoints: Sequence[Checkpoint],
    reference: Checkpoint,
    files: Mapping[str, bytes | None],
) -> dict[str, bytes | None]:
    """The output's files with the chosen template in them.

    It goes into chat_template.jinja where the output has one, else into tokenizer_config.json,
    which every version of transformers reads.
    """
    template = chosen_template(
        setting, [_template(checkpoint.folder) for checkpoint in checkpoints]
    )
    if template is None:
        return dict(files)
    settings = json.loads(_content(_SETTINGS, files, reference) or b"{}")
    settings.pop("chat_template", None)
    changed = dict(files)
    if _content(_FILE, files, reference) is not None:
        changed[_FILE] = template.encode()
    else:
        settings["chat_template"] = template
    changed[_SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def _content(name: str, files: Mapping[str, bytes | None], reference: Checkpoint) -> bytes | None:
    if name in files:
        return files[name]
    path = None if reference.folder is None else reference.folder / name
    return path.read_bytes() if path is not None and path.is_file() else None


def _template(folder: Path | None) -> str | None:
    """A model's chat template; of several named ones the default."""
    if folder is None:
        return None
    if (folder / _FILE).is_file():
        return (folder / _FILE).read_text(encoding="utf-8")
    if not (folder / _SETTINGS).is_file():
        return None
    settings: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None
