"""Which tokens of two tokenizers mean the same, whatever alphabet each writes them in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError
from fusekit.tokenizers.vocabulary import Vocabulary, read_json

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Meaning = bytes | int
"""The text of a token as UTF-8 (a leading space is a space), or the value of a `<0xNN>` token."""


@dataclass(frozen=True)
class Matching:
    """Donor tokens by what the model knows of them; all by ascending donor id.

    `shared_donor[i]` and `shared_model[i]` are the ids of one token; `missing` are donor ids of
    tokens the model lacks, `meanings` theirs.
    """

    shared_donor: NDArray[np.int64]
    shared_model: NDArray[np.int64]
    missing: NDArray[np.int64]
    meanings: tuple[Meaning, ...]


@cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(0x100 + len(table) - len(printable))
    return table


@cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in byte_alphabet().items()}


def meaning(vocabulary: Vocabulary, token: str) -> Meaning:
    """What a token stands for, independent of its tokenizer's alphabet."""
    if token in vocabulary.special:
        return token.encode()
    if vocabulary.alphabet == "byte-level":
        table = _byte_of_character()
        if all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode()
    if vocabulary.alphabet == "metaspace":
        byte = _BYTE_TOKEN.fullmatch(token)
        return int(byte[1], 16) if byte else token.replace("\u2581", " ").encode()
    if vocabulary.alphabet == "wordpiece":
        return token[2:].encode() if token.startswith("##") else b" " + token.encode()
    return token.encode()


def meanings(vocabulary: Vocabulary, rows: int) -> dict[Meaning, int]:
    """Meaning -> id for the tokens with ids below `rows`; of several the lowest id."""
    found: dict[Meaning, int] = {}
    for token, number in vocabulary.ordered():
        if number < rows:
            found.setdefault(meaning(vocabulary, token), number)
    return found


def match_tokens(
    model: Vocabulary, donor: Vocabulary, model_rows: int, donor_rows: int
) -> Matching:
    """Match the donor's tokens to the model's by meaning, special tokens also by their role.

    Ids beyond a matrix (`model_rows`, `donor_rows`) are ignored.
    """
    known = meanings(model, model_rows)
    roles = {
        role: model.ids[token]
        for role, token in model.roles.items()
        if model.ids[token] < model_rows
    }
    by_role = {
        token: roles[role] for role, token in reversed([*donor.roles.items()]) if role in roles
    }
    shared: list[tuple[int, int]] = []
    missing: list[tuple[int, Meaning]] = []
    for token, number in donor.ordered():
        if number >= donor_rows:
            continue
        key = meaning(donor, token)
        found = known.get(key, by_role.get(token))
        if found is None:
            missing.append((number, key))
        else:
            shared.append((number, found))
    pairs = np.array(shared, np.int64).reshape(-1, 2)
    return Matching(
        pairs[:, 0],
        pairs[:, 1],
        np.array([number for number, _ in missing], np.int64),
        tuple(key for _, key in missing),
    )


def byte_matches(missing: Sequence[Meaning], known: Mapping[Meaning, int]) -> NDArray[np.int64]:
    """For each missing token of one byte the id of that byte in its other spelling, or -1."""
    return np.array([known.get(_other_form(key), -1) for key in missing], np.int64)


def prefix_matches(missing: Sequence[Meaning], known: Mapping[Meaning, int]) -> NDArray[np.int64]:
    """For each missing token the model's id of its longest proper prefix, or -1."""
    found = np.full(len(missing), -1, np.int64)
    for position, key in enumerate(missing):
        if isinstance(key, bytes):
            for end in range(len(key) - 1, 0, -1):
                if key[:end] in known:
                    found[position] = known[key[:end]]
                    break
    return found


def pieces(missing: Sequence[Meaning], model: Vocabulary, rows: int) -> list[list[int]]:
    """The model's ids of each missing token's text, split by the model's own tokenizer model.

    The text goes to the tokenizer's subword model directly, as its pre-tokenizer would put a word
    start in front of it. Pieces without a row and unknown-token pieces are left out.
    """
    splitter = _subword_model(model)
    known = meanings(model, rows)
    unknown = model.ids.get(model.roles.get("unk_token", ""), -1)
    split = []
    for key in missing:
        raw = bytes([key]) if isinstance(key, int) else key
        text = _spelled(raw, model)
        if text is None:
            ids = [known[byte] for byte in raw if byte in known]
        else:
            ids = [piece.id for piece in splitter.tokenize(text)] if text else []
        split.append([number for number in ids if number < rows and number != unknown])
    return split


def digit_tokens(matching: Matching, donor: Vocabulary) -> tuple[int, int]:
    """How many donor tokens are digits only, and how many of them the model shares."""
    shared = set(matching.shared_donor.tolist())
    digits = []
    for token, number in donor.ids.items():
        key = meaning(donor, token)
        if isinstance(key, bytes) and key.strip().isdigit():
            digits.append(number)
    return len(digits), sum(number in shared for number in digits)


def _other_form(key: Meaning) -> Meaning:
    if isinstance(key, int):
        return bytes([key])
    return key[0] if len(key) == 1 else -1


def _spelled(raw: bytes, vocabulary: Vocabulary) -> str | None:
    """Bytes in the vocabulary's alphabet; None where it can only write them byte by byte."""
    if vocabulary.alphabet == "byte-level":
        table = byte_alphabet()
        return "".join(table[byte] for byte in raw)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    if vocabulary.alphabet == "metaspace":
        return text.replace(" ", "\u2581")
    return text.strip() if vocabulary.alphabet == "wordpiece" else text


def _subword_model(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, models

    folder = vocabulary.folder
    if folder is None:
        raise FusekitError(
            f"{vocabulary.label}: no tokenizer files, and splitting tokens into pieces needs them"
        )
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json")).model
    if (folder / "merges.txt").is_file():
        return models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if (folder / "vocab.txt").is_file():
        return models.WordPiece.from_file(str(folder / "vocab.txt"))
    return models.WordLevel(read_json(folder / "vocab.json"))
