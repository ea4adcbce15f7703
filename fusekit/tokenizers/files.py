"""Tokenizer files of an output vocabulary: another folder's, with tokens dropped and appended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from fusekit.tokenizers.vocabulary import (
    TOKENIZER_FILES,
    AddedToken,
    Vocabulary,
    model_type,
    read_json,
)


def tokenizer_files(
    vocabulary: Vocabulary,
    dropped: AbstractSet[str] = frozenset(),
    appended: Sequence[AddedToken] = (),
) -> dict[str, bytes]:
    """`{file name: content}` of a tokenizer with some tokens gone and others on top.

    Without changes the files are copied byte for byte. A BPE loses the merges that make or use a
    dropped token. Empty for a vocabulary that was not read from a folder.
    """
    folder = vocabulary.folder
    if folder is None:
        return {}
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in present}
    if not dropped and not appended:
        return files
    if "tokenizer.json" in files:
        document = _rewritten(read_json(folder / "tokenizer.json"), dropped, appended)
        files["tokenizer.json"] = _encode(document)
    else:
        listed = read_json(folder / "added_tokens.json") if "added_tokens.json" in files else {}
        listed = {token: number for token, number in listed.items() if token not in dropped}
        files["added_tokens.json"] = _encode(
            listed | {entry.content: entry.id for entry in appended}
        )
        files |= _without(vocabulary, dropped, files)
    settings = (
        read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    )
    if "added_tokens_decoder" in settings or "tokenizer.json" not in files:
        decoder = {
            number: entry
            for number, entry in settings.get("added_tokens_decoder", {}).items()
            if entry["content"] not in dropped
        }
        for entry in appended:
            decoder[str(entry.id)] = {k: v for k, v in entry.to_json().items() if k != "id"}
        files["tokenizer_config.json"] = _encode(settings | {"added_tokens_decoder": decoder})
    return files


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _rewritten(
    document: dict[str, Any], dropped: AbstractSet[str], appended: Sequence[AddedToken]
) -> dict[str, Any]:
    model = dict(document["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [piece for piece in vocab if piece[0] not in dropped]
        ids = {piece[0]: index for index, piece in enumerate(model["vocab"])}
    else:
        ids = {token: number for token, number in vocab.items() if token not in dropped}
    if dropped and model_type(document) == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge for merge in model.get("merges", []) if _survives(merge, prefix, dropped)
        ]
    added = [e for e in document.get("added_tokens") or [] if e["content"] not in dropped]
    if not isinstance(vocab, list):
        # The tokenizers library numbers added tokens from the count of tokens upwards, so with
        # holes in the ids only the model's own vocabulary can carry a token's id.
        taken = set(ids.values()) | {entry["id"] for entry in added}
        if appended and len(taken) != appended[0].id:
            ids = ids | {entry.content: entry.id for entry in appended}
        model["vocab"] = ids
    added += [entry.to_json() for entry in appended]
    return document | {"model": model, "added_tokens": added}


def _survives(merge: Any, prefix: str, dropped: AbstractSet[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    made = left + right.removeprefix(prefix)
    return not {left, right, made} & dropped


def _without(
    vocabulary: Vocabulary, dropped: AbstractSet[str], files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """`vocab.json` + `merges.txt`, or `vocab.txt`, without the dropped tokens."""
    if not dropped:
        return {}
    if "vocab.json" not in files:
        tokens = files["vocab.txt"].decode().splitlines()
        return {"vocab.txt": "".join(f"{t}\n" for t in tokens if t not in dropped).encode()}
    ids = json.loads(files["vocab.json"])
    kept = {token: number for token, number in ids.items() if token not in dropped}
    changed = {"vocab.json": json.dumps(kept, ensure_ascii=False).encode()}
    if "merges.txt" in files:
        lines = files["merges.txt"].decode().splitlines()
        changed["merges.txt"] = "".join(
            f"{line}\n"
            for line in lines
            if line.startswith("#version") or not line or _survives(line, "", dropped)
        ).encode()
    return changed
