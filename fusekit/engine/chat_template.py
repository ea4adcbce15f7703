"""Chat templates of the inputs, and where that of the output goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.errors import CheckpointError
from fusekit.recipe.chat_templates import chosen_template
from fusekit.tokenizers.vocabulary import read_json

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
        setting,
        [template_in(each.adapter) or template_in(each.folder) for each in checkpoints],
    )
    if template is None:
        return dict(files)
    settings = _settings(files, reference)
    settings.pop("chat_template", None)
    changed = dict(files)
    if files[_FILE] is not None if _FILE in files else _has(reference.folder, _FILE):
        changed[_FILE] = template.encode()
    else:
        settings["chat_template"] = template
    changed[_SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def _settings(files: Mapping[str, bytes | None], reference: Checkpoint) -> dict[str, Any]:
    """The output's tokenizer_config.json so far."""
    if _SETTINGS in files:
        made: dict[str, Any] = json.loads(files[_SETTINGS] or b"{}")
        return made
    if reference.folder is None or not _has(reference.folder, _SETTINGS):
        return {}
    return read_json(reference.folder / _SETTINGS)


def _has(folder: Path | None, name: str) -> bool:
    return folder is not None and (folder / name).is_file()


def template_in(folder: Path | None) -> str | None:
    """A model's chat template; of several named ones the default.

    Raises:
        CheckpointError: a file that should hold it cannot be read.
    """
    if folder is None:
        return None
    if _has(folder, _FILE):
        try:
            return (folder / _FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder / _FILE}: not UTF-8 text") from None
    if not _has(folder, _SETTINGS):
        return None
    found = read_json(folder / _SETTINGS).get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return found if isinstance(found, str) else None
