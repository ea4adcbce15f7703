"""Reading a model folder's tokenizer into a plain vocabulary, without loading the tokenizer.

Understands `tokenizer.json`, `vocab.json` + `merges.txt` and `vocab.txt`, with the tokens that
`added_tokens.json` and `tokenizer_config.json` put on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fusekit.errors import CheckpointError

MAX_TOKEN_ID = 1 << 24
"""Ids from here on are refused: arrays over ids would grow with a number found in a file."""

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""Files that hold a chat template; it may be in tokenizer_config.json instead."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    *TEMPLATE_FILES,
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that make up a tokenizer beside a model's weights."""

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special roles a tokenizer gives to tokens."""

Alphabet = Literal["byte-level", "metaspace", "wordpiece", "plain"]
"""How token strings spell text: GPT-2's byte alphabet (`Ġ`), U+2581 for spaces, `##`, or as is."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched as a whole string before the tokenizer's model sees the text."""

    content: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @property
    def flags(self) -> tuple[bool, ...]:
        return (self.special, self.single_word, self.lstrip, self.rstrip, self.normalized)

    def to_json(self) -> dict[str, Any]:
        """The entry of `added_tokens` in a tokenizer.json."""
        return {
            "id": self.id,
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer: `ids` maps every token, added ones included, to its id."""

    label: str
    ids: Mapping[str, int]
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    alphabet: Alphabet = "plain"
    folder: Path | None = None

    @cached_property
    def size(self) -> int:
        """Rows an embedding needs for these tokens: the largest id plus one."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def special(self) -> frozenset[str]:
        """Tokens flagged special or holding a role."""
        flagged = {token for token, entry in self.added.items() if entry.special}
        return frozenset(flagged | set(self.roles.values()))

    def ordered(self) -> list[tuple[str, int]]:
        """`(token, id)` by ascending id, then by token."""
        return sorted(self.ids.items(), key=lambda item: (item[1], item[0]))


def is_tokenizer_file(name: str) -> bool:
    """Whether a file beside a model's weights is a part of its tokenizer.

    >>> [is_tokenizer_file(name) for name in ("tokenizer.json", "qwen.tiktoken", "config.json")]
    [True, True, False]
    """
    return name in TOKENIZER_FILES or name.endswith((".model", ".tiktoken", ".vocab"))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that `read_vocabulary` reads."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the tokenizer of a model folder.

    >>> read_vocabulary(Path("Llama-3-8B")).ids["<|begin_of_text|>"]    # doctest: +SKIP
    128000

    Raises:
        CheckpointError: no tokenizer files, only a sentencepiece binary, malformed JSON, or ids
            that are not small non-negative integers.
    """
    if (folder / "tokenizer.json").is_file():
        ids, added, alphabet = _fast_tokenizer(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file():
        ids, added = _ids(read_json(folder / "vocab.json"), folder / "vocab.json"), {}
        alphabet = _alphabet_of_tokens(ids)
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        ids, added = {token: index for index, token in enumerate(lines)}, {}
        alphabet = _alphabet_of_tokens(ids)
    else:
        raise CheckpointError(_nothing_readable(folder))
    settings = _optional_json(folder / "tokenizer_config.json")
    for name, entry in _extra_tokens(folder, settings).items():
        if name not in added:
            added[name] = entry
            ids.setdefault(name, entry.id)
    roles = _roles(folder, settings, ids)
    return Vocabulary(str(folder), ids, added, roles, alphabet, folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is not JSON or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def model_type(document: Mapping[str, Any]) -> str:
    """`BPE`, `Unigram`, `WordPiece` or `WordLevel` of a tokenizer.json; old files do not say."""
    model = document["model"]
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _nothing_readable(folder: Path) -> str:
    binaries = sorted(path.name for path in folder.glob("*.model")) if folder.is_dir() else []
    if binaries:
        return (
            f"{folder}: the tokenizer is only there as the sentencepiece file {binaries[0]!r}, "
            "expected tokenizer.json (transformers writes one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    return f"{folder}: no tokenizer found, expected tokenizer.json, vocab.json or vocab.txt"


def _fast_tokenizer(path: Path) -> tuple[dict[str, int], dict[str, AddedToken], Alphabet]:
    document = read_json(path)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise CheckpointError(f"{path}: expected a 'model' object with a 'vocab'")
    vocab = model["vocab"]
    if isinstance(vocab, list):
        ids: dict[str, int] = {}
        for index, piece in enumerate(vocab):
            if not isinstance(piece, list) or not piece or not isinstance(piece[0], str):
                raise CheckpointError(
                    f"{path}: entry {index} of the vocab is {piece!r}, expected [piece, score]"
                )
            ids.setdefault(piece[0], index)
    else:
        ids = _ids(vocab, path)
    added: dict[str, AddedToken] = {}
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: added_tokens is {entries!r}, expected a list")
    for entry in entries:
        token = _added_token(entry, None, path)
        added[token.content] = token
        ids[token.content] = token.id
    return ids, added, _alphabet(document, ids)


def _ids(vocab: Mapping[str, Any], path: Path) -> dict[str, int]:
    for token, number in vocab.items():
        _check_id(token, number, path)
    return dict(vocab)


def _check_id(token: str, number: Any, path: Path) -> int:
    if type(number) is not int or not 0 <= number < MAX_TOKEN_ID:
        raise CheckpointError(
            f"{path}: token {token!r} has id {number!r}, expected an integer from 0 to "
            f"{MAX_TOKEN_ID - 1}"
        )
    return number


def _added_token(entry: Any, number: Any, path: Path) -> AddedToken:
    """From an entry of `added_tokens` (which holds its id) or of `added_tokens_decoder`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise CheckpointError(f"{path}: added token {entry!r}: expected an object with 'content'")
    content = entry["content"]
    return AddedToken(
        content,
        _check_id(content, entry.get("id") if number is None else number, path),
        special=bool(entry.get("special", False)),
        single_word=bool(entry.get("single_word", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", False)),
    )


def _extra_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Tokens of tokenizer_config.json's `added_tokens_decoder` and of added_tokens.json."""
    found: dict[str, AddedToken] = {}
    place = folder / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{place}: added_tokens_decoder is {decoder!r}, expected an object")
    for key, entry in decoder.items():
        if not key.isdecimal():
            raise CheckpointError(f"{place}: added_tokens_decoder has the key {key!r}, not an id")
        token = _added_token(entry, int(key), place)
        found[token.content] = token
    place = folder / "added_tokens.json"
    for content, number in _optional_json(place).items():
        if content not in found:
            found[content] = AddedToken(content, _check_id(content, number, place))
    return found


def _alphabet(document: Mapping[str, Any], ids: Mapping[str, int]) -> Alphabet:
    parts = [document.get(part) for part in ("pre_tokenizer", "decoder", "normalizer")]
    named = json.dumps(parts, ensure_ascii=False)
    if '"ByteLevel"' in named:
        return "byte-level"
    if model_type(document) == "WordPiece":
        return "wordpiece"
    if '"Metaspace"' in named or "\u2581" in named:
        return "metaspace"
    return _alphabet_of_tokens(ids)


def _alphabet_of_tokens(ids: Iterable[str]) -> Alphabet:
    """A guess from how many tokens start with each marker, for files that do not say."""
    counts: dict[Alphabet, int] = {"byte-level": 0, "metaspace": 0, "wordpiece": 0}
    for token in ids:
        if token.startswith("\u0120"):
            counts["byte-level"] += 1
        elif token.startswith("\u2581"):
            counts["metaspace"] += 1
        elif token.startswith("##"):
            counts["wordpiece"] += 1
    best = max(counts, key=lambda alphabet: counts[alphabet])
    return best if counts[best] else "plain"


def _roles(folder: Path, settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}` from the tokenizer's settings, else from config.json's ids."""
    special_map = _optional_json(folder / "special_tokens_map.json")
    config = _optional_json(folder / "config.json")
    tokens = {number: token for token, number in ids.items()}
    roles: dict[str, str] = {}
    for role in ROLES:
        value = settings.get(role) or special_map.get(role)
        if isinstance(value, dict):
            value = value.get("content")
        if not isinstance(value, str):
            number = config.get(f"{role}_id")
            value = tokens.get(number) if type(number) is int else None
        if isinstance(value, str) and value in ids:
            roles[role] = value
    return roles
