"""What a vocabulary leaves in config.json and generation_config.json: sizes and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ID_KEYS = ("_token_id", "_token_ids", "_token_index")
_TOWERS = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")


def config_vocab_size(config: Mapping[str, Any] | None) -> int | None:
    """`vocab_size` of a config, or of its language tower; None where none is stated."""
    if config is None:
        return None
    if type(config.get("vocab_size")) is int:
        return int(config["vocab_size"])
    for tower in _TOWERS:
        if isinstance(config.get(tower), Mapping):
            found = config_vocab_size(config[tower])
            if found is not None:
                return found
    return None


def with_vocab_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config with `vocab_size` changed wherever it states that of the text vocabulary."""
    old = config_vocab_size(config)
    changed = dict(config)
    if old is None or changed.get("vocab_size") == old:
        changed["vocab_size"] = size
    for tower in _TOWERS:
        if isinstance(config.get(tower), Mapping) and config_vocab_size(config[tower]) == old:
            changed[tower] = with_vocab_size(config[tower], size)
    return changed


def remapped_config(
    config: Mapping[str, Any], new_ids: NDArray[np.int64], kept: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """A config (or generation config) with every `*_token_id` moved to an output vocabulary.

    Nested configs are included; ids without a counterpart become None (lists lose them).

    Args:
        config: the parsed JSON.
        new_ids: output id of each old id, -1 for none (`Alignment.new_ids`).
        kept: keys to leave as they are.
    """

    def moved(number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(new_ids):
            return number
        return int(new_ids[number]) if new_ids[number] >= 0 else None

    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result[key] = remapped_config(value, new_ids, kept)
        elif key in kept or not key.endswith(_ID_KEYS):
            result[key] = value
        elif isinstance(value, list):
            result[key] = [new for old in value if (new := moved(old)) is not None]
        else:
            result[key] = moved(value)
    return result
