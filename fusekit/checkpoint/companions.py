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


def is_companion(name: str) -> bool:
    """Whether a file is a config, a part of a tokenizer, a template, code, or terms of use.

    >>> [is_companion(name) for name in ("tokenizer.json", "LICENSE", "model.safetensors")]
    [True, True, False]
    """
    file = PurePosixPath(name).name
    if file == MANIFEST or file.endswith(".index.json"):
        return False
    return PurePosixPath(file).suffix in _SUFFIXES or _TERMS.fullmatch(file) is not None
