"""The files beside an output's weights: config, tokenizer, templates."""

from __future__ import annotations

import json
from typing import Any

from fusekit.engine.plan import Plan


def companions(plan: Plan) -> dict[str, bytes]:
    """Config, tokenizer and whatever else makes the weights a usable model, by name."""
    files: dict[str, bytes | None] = {}
    if plan.config_from is not None:
        model = plan.checkpoints[plan.config_from]
        files = {
            path.relative_to(model.folder).as_posix(): path.read_bytes()
            for path in model.companions()
            if model.folder is not None
        }
    files.update(plan.files)
    if plan.config is not None:
        files["config.json"] = as_json(plan.config)
    return {name: content for name, content in files.items() if content is not None}


def as_json(content: Any) -> bytes:
    """JSON as it is written beside weights."""
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a path whose bytes are no UTF-8
        return (json.dumps(content, indent=2) + "\n").encode()
