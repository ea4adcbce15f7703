"""The small files beside weights that make them a usable model, and one that others may use."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from fusekit.checkpoint.layout import MANIFEST

TEMPLATES_FOLDER = "additional_chat_templates"
"""Where transformers keeps the chat templates that are not the default one."""

_SUFFIXES = frozenset(
    {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm", ".bpe"}
)
_TERMS = re.compile(r"(licen[cs]e|notice|copying|use_policy)([-_.].*)?(\.md|\.txt|\.pdf)?", re.I)


def describes_model(name: str) -> bool:
    """Whether a file is a companion, an index of weights or a manifest: all that is not weights.

    >>> [describes_model(name) for name in ("model.safetensors.index.json", "model.safetensors")]
    [True, False]
    """
    file = PurePosixPath(name)
    return file.suffix in _SUFFIXES or _TERMS.fullmatch(file.name) is not None


def is_companion(name: str) -> bool:
    """Whether a file is a config, a part of a tokenizer, a template, code, or terms of use.

    Not so an index or a manifest, which are about one output's weights and made anew.

    >>> [is_companion(name) for name in ("tokenizer.json", "LICENSE", "model.safetensors")]
    [True, True, False]
    """
    is_made = name.endswith(".index.json") or PurePosixPath(name).name == MANIFEST
    return describes_model(name) and not is_made
