"""Calibration data: documents from files or iterables, and batches of tokens made of them."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.errors import FusekitError, MissingExtraError, did_you_mean

ARROW = frozenset({".parquet", ".arrow", ".feather"})


@dataclass(frozen=True)
class Document:
    """One text, and its class where there is one."""

    text: str
    label: int | None = None


def read_documents(
    path: str | Path, *, text: str = "text", label: str = "label"
) -> Iterator[Document]:
    """The documents of a file, in order.

    `.txt` holds one document per line; `.jsonl` one object per line and `.parquet`, `.arrow`,
    `.feather` one row per document, with the text in a field called `text` and, if there is one, a
    class index in `label`.

    Args:
        path: the file.
        text, label: names of the fields.

    Raises:
        FusekitError: an unreadable file, another format, a missing field.
    """
    file = Path(path)
    if file.suffix in ARROW:
        rows = _arrow_rows(file, text, label)
    elif file.suffix == ".jsonl":
        rows = _json_rows(file)
    elif file.suffix == ".txt":
        rows = ((place, {text: line}) for place, line in _lines(file))
    else:
        raise FusekitError(
            f"{file}: documents are read from .txt, .jsonl, .parquet, .arrow and .feather, token "
            f"ids from {TOKENS}, found {file.suffix or 'no suffix'!r}"
        )
    for place, row in rows:
        if not isinstance(row.get(text), str):
            found = type(row.get(text)).__name__ if text in row else f"fields {sorted(row)}"
            raise FusekitError(f"{file}, {place}: expected a text in {text!r}, found {found}")
        found_label = row.get(label)
        if found_label is not None and not isinstance(found_label, int):
            raise FusekitError(
                f"{file}, {place}: expected a class index in {label!r}, found {found_label!r}"
            )
        if row[text].strip():
            yield Document(row[text], found_label)


TOKENS = ".safetensors"
"""Suffix of files that hold token ids instead of texts."""


def read_token_ids(
    path: str | Path, *, samples: int = 128, length: int = 2048, batch: int = 1
) -> list[dict[str, Any]]:
    """Batches of a safetensors file of token ids, as torch tensors.

    It holds `input_ids` (sequences, positions) and, of the same shape, `attention_mask` if there is
    padding; `labels` (sequences,) are classes.

    Args:
        path: the file.
        samples: how many sequences at most.
        length: how many positions of each at most.
        batch: sequences per batch.

    Raises:
        FusekitError: an unreadable file, tensors that are missing, unknown, or of another shape or
            type.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FusekitError(f"{path}: cannot be read: {error}") from None
    if "input_ids" not in tensors or tensors["input_ids"].dim() != 2:
        found = {name: list(x.shape) for name, x in tensors.items()}
        raise FusekitError(
            f"{path}: expected token ids as 'input_ids' of shape [sequences, positions], found "
            f"{found}"
        )
    shape = list(tensors["input_ids"].shape)
    expected = {"input_ids": shape, "attention_mask": shape, "labels": shape[:1]}
    for name, values in tensors.items():
        if name not in expected:
            raise FusekitError(f"{path}: unknown tensor {name!r}{did_you_mean(name, expected)}")
        if list(values.shape) != expected[name] or values.is_floating_point():
            raise FusekitError(
                f"{path}: {name!r} is {values.dtype} of shape {list(values.shape)}, expected "
                f"integers of shape {expected[name]}"
            )
    tensors.setdefault("attention_mask", tensors["input_ids"] * 0 + 1)
    count = min(samples, shape[0])
    if not count or not shape[1]:
        raise FusekitError(f"{path}: holds no token ids, expected at least one sequence")
    cut = {name: x[:count, :length] if x.dim() == 2 else x[:count] for name, x in tensors.items()}
    return [
        {name: values[start : start + batch].long() for name, values in cut.items()}
        for start in range(0, count, batch)
    ]


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield f"line {number}", line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise FusekitError(f"{file}: cannot be read: {reason}") from None


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FusekitError(f"{file}, {place}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise FusekitError(f"{file}, {place}: expected a JSON object")
        yield place, row


def _arrow_rows(file: Path, text: str, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
    except ModuleNotFoundError:
        raise MissingExtraError(f"reading {file.suffix} files", "arrow") from None
    number = itertools.count(1)
    try:
        with contextlib.closing(pyarrow.memory_map(str(file))) as source:
            for batch in _record_batches(source, file.suffix == ".parquet", (text, label)):
                names = _chosen(batch.schema.names, (text, label))
                for row in batch.select(names).to_pylist():
                    yield f"row {next(number)}", row
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise FusekitError(f"{file}: cannot be read: {reason}") from None


def _chosen(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns to read: those wanted, or all where the first of them is missing."""
    return [name for name in names if name in wanted] if wanted[0] in names else list(names)


def _record_batches(source: Any, is_parquet: bool, wanted: Sequence[str]) -> Iterator[Any]:
    """Parquet row groups, or the batches of an Arrow file or stream (as datasets are cached)."""
    if is_parquet:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        table = parquet.ParquetFile(source)
        yield from table.iter_batches(columns=_chosen(table.schema_arrow.names, wanted))
        return
    pyarrow: Any = importlib.import_module("pyarrow")
    ipc: Any = importlib.import_module("pyarrow.ipc")
    try:
        file = ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        yield from ipc.open_stream(source)
        return
    yield from map(file.get_batch, range(file.num_record_batches))


def token_batches(
    documents: Iterable[Document | str],
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 2048,
    batch: int = 1,
    pack: bool = True,
) -> list[dict[str, Any]]:
    """Batches of token ids for a transformers model, as torch tensors.

    Args:
        documents: texts, or documents with classes.
        tokenizer: a transformers tokenizer.
        samples: how many sequences at most.
        length: tokens per sequence.
        batch: sequences per batch.
        pack: join documents, each ended by the end-of-text token, and cut them into full sequences
            (language models); otherwise one document is one sequence, cut and padded (classifiers).

    Raises:
        FusekitError: nothing to measure on.
    """
    given = (Document(item) if isinstance(item, str) else item for item in documents)
    if pack:
        rows = list(itertools.islice(_packed(given, tokenizer, length), samples))
        examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    else:
        examples = [
            _single(document, tokenizer, length) for document in itertools.islice(given, samples)
        ]
    if not examples:
        raise FusekitError("calibration data: found no documents, expected at least one")
    return [
        _collated(examples[start : start + batch], tokenizer)
        for start in range(0, len(examples), batch)
    ]


def _packed(documents: Iterable[Document], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Full sequences of joined documents; a last one that is not full comes as it is."""
    buffer: list[int] = []
    for document in documents:
        buffer += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            buffer.append(tokenizer.eos_token_id)
        while len(buffer) >= length:
            yield buffer[:length]
            buffer = buffer[length:]
    if buffer:
        yield buffer


def _single(document: Document, tokenizer: Any, length: int) -> dict[str, Any]:
    encoded = tokenizer(document.text, truncation=True, max_length=length)
    example = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    if document.label is not None:
        example["labels"] = document.label
    return example


def _collated(examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
    import torch

    width = max(len(example["input_ids"]) for example in examples)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collated = {
        key: torch.tensor(
            [row[key] + [pad] * (width - len(row[key])) for row in examples], dtype=torch.long
        )
        for key, pad in (("input_ids", filler), ("attention_mask", 0))
    }
    if all("labels" in example for example in examples):
        collated["labels"] = torch.tensor([example["labels"] for example in examples])
    return collated
