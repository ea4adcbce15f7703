"""Training the `lm` suite: a tiny Llama on a mix of texts, then one expert per domain.

Four domains get an expert: plays, names, worked solutions of arithmetic problems, and programs. A
fifth, prose (the problems and the programs' descriptions), is in the base's mix only and tells what
a merge forgot. A model fine-tuned on all four domains, for as many steps as the experts together,
shows what merging is to be compared with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError
from fusekit.evaluate.building import MULTITASK, once, write_suite
from fusekit.evaluate.lm import scores
from fusekit.evaluate.pretrained import (
    load_pretrained,
    one_thread,
    quiet,
    require_transformers,
)
from fusekit.evaluate.settings import whole_numbers
from fusekit.evaluate.suite import CALIBRATION_EXAMPLES, Settings

DOMAINS = ("plays", "names", "solutions", "programs")
"""What experts are trained on."""

HELD_BACK = "prose"
"""What the base has seen and no expert is trained on."""

FILES = ("tinyshakespeare.txt", "names.txt", "gsm8k_train.jsonl", "mbpp.jsonl")
"""What the folder of the data must hold."""

DEFAULTS = {
    "hidden_size": 128,
    "layers": 4,
    "vocabulary": 1024,
    "pretraining_steps": 500,
    "fine_tuning_steps": 120,
}
"""Settings: the model's size and the length of training."""

WINDOW = 128
"""Tokens of an example."""

MOST_WINDOWS = 64
"""Examples per domain of the validation and of the test split."""

BATCH = 16
PRETRAINING_RATE = 3e-3
FINE_TUNING_RATE = 3e-4
NAMES_PER_DOCUMENT = 64
PLAY_DOCUMENT = 2000
"""Characters, about, of a document cut from the plays."""

END = "<|end|>"
"""The token between documents."""

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Tokenized domains: of `train` streams `[tokens]`, of other splits `[windows, WINDOW]`."""

    train: Mapping[str, Tokens]
    validation: Mapping[str, Tokens]
    test: Mapping[str, Tokens]


def build(
    out: Path,
    *,
    data: Path | None,
    seed: int,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> None:
    """The `Builder` of the suite; settings are those of `DEFAULTS`.

    Raises:
        MissingExtraError: torch or transformers is absent.
        FusekitError: wrong settings, or data that is absent, unreadable or too little.
    """
    require_transformers("building the lm suite")
    size = whole_numbers(settings, DEFAULTS)
    documents = split_documents(read_documents(data), seed)
    about: dict[str, Any] = {"seed": seed, **size}
    tokenizer = out / "tokenizer"
    once(tokenizer, about, lambda folder: _train_tokenizer(folder, documents["train"], size))
    corpus = tokenize(documents, tokenizer)

    def train(name: str, domains: Sequence[str], start: Path | None) -> None:
        def make(folder: Path) -> None:
            model = _fresh(size, seed) if start is None else load_pretrained(_KIND, start)
            rate = PRETRAINING_RATE if start is None else FINE_TUNING_RATE
            steps = size["pretraining_steps"]
            if start is not None:
                steps = size["fine_tuning_steps"] * len(domains)
            with one_thread(), quiet():
                fit(model, [corpus.train[domain] for domain in domains], steps, rate, seed)
                model.save_pretrained(folder)
            for path in tokenizer.glob("tokenizer*.json"):
                shutil.copy(path, folder)
            on_progress(f"{name}: {_perplexities(model, corpus.validation)}")

        once(out / name, about, make)

    train("base", (*DOMAINS, HELD_BACK), None)
    for domain in DOMAINS:
        train(domain, [domain], out / "base")
    train(MULTITASK, DOMAINS, out / "base")
    _write_windows(out / "windows.safetensors", corpus)
    write_suite(
        out,
        {
            "name": "lm",
            "evaluator": "lm",
            "base": "base",
            "experts": {domain: domain for domain in DOMAINS},
            "references": {MULTITASK: MULTITASK},
            "forgetting": [HELD_BACK],
            "average": "geometric",
            "settings": {"windows": "windows.safetensors"},
        },
    )


_KIND = "AutoModelForCausalLM"


def read_documents(data: Path | None) -> dict[str, list[str]]:
    """The documents of every domain.

    Raises:
        FusekitError: no folder was given, or one of `FILES` is absent or malformed.
    """
    if data is None:
        raise FusekitError(f"the lm suite needs data: --data with a folder of {', '.join(FILES)}")
    for name in FILES:
        if not (data / name).is_file():
            raise FusekitError(
                f"{data / name}: no such file; the lm suite reads {', '.join(FILES)}"
            )
    plays, names, problems, programs = (data / name for name in FILES)
    solved = _records(problems, ("question", "answer"))
    written = _records(programs, ("text", "code"))
    lines = _text(names).split()
    return {
        "plays": _pieces(_text(plays).split("\n\n")),
        "names": [
            "\n".join(lines[start : start + NAMES_PER_DOCUMENT])
            for start in range(0, len(lines), NAMES_PER_DOCUMENT)
        ],
        "solutions": [record["answer"] for record in solved],
        "programs": [record["code"].replace("\r\n", "\n") for record in written],
        HELD_BACK: [*(each["question"] for each in solved), *(each["text"] for each in written)],
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FusekitError(f"{path}: not UTF-8 text: {error.reason} at {error.start}") from None


def _records(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    records = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in keys):
            expected = " and ".join(repr(key) for key in keys)
            raise FusekitError(f"{path}, line {number}: expected a JSON object with {expected}")
        records.append(record)
    return records


def _pieces(paragraphs: Iterable[str]) -> list[str]:
    """Paragraphs joined to documents of about `PLAY_DOCUMENT` characters."""
    documents, parts, length = [], [], 0
    for paragraph in paragraphs:
        parts.append(paragraph)
        length += len(paragraph)
        if length >= PLAY_DOCUMENT:
            documents.append("\n\n".join(parts))
            parts, length = [], 0
    return [*documents, "\n\n".join(parts)] if parts else documents


def split_documents(
    documents: Mapping[str, Sequence[str]], seed: int
) -> dict[str, dict[str, list[str]]]:
    """split -> domain -> documents: a tenth each for validation and test.

    Raises:
        FusekitError: a domain with fewer than ten documents.
    """
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}, "test": {}}
    for number, (domain, own) in enumerate(documents.items()):
        if len(own) < 10:
            raise FusekitError(f"{domain}: found {len(own)} documents, expected at least 10")
        order = np.random.default_rng([seed, number]).permutation(len(own))
        tenth = len(own) // 10
        parts = np.split(order, [len(own) - 2 * tenth, len(own) - tenth])
        for split, part in zip(splits, parts, strict=True):
            splits[split][domain] = [own[i] for i in part]
    return splits


def _train_tokenizer(
    folder: Path, documents: Mapping[str, Sequence[str]], size: Mapping[str, int]
) -> None:
    """A byte-level BPE, to which every domain contributes about as many characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = min(sum(map(len, own)) for own in documents.values())
    chosen = []
    for own in documents.values():
        length = 0
        for document in own:
            if length > 2 * least:
                break
            chosen.append(document)
            length += len(document)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size["vocabulary"], 257),
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chosen, trainer)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END
    )
    wrapped.save_pretrained(folder)


def tokenize(documents: Mapping[str, Mapping[str, Sequence[str]]], tokenizer: Path) -> Corpus:
    """Every split as token numbers; a domain's windows follow one another without overlap.

    Raises:
        FusekitError: a domain too small for one window.
    """
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = encoder.token_to_id(END)

    def stream(own: Sequence[str]) -> Tokens:
        encoded = encoder.encode_batch(list(own))
        return np.array([token for each in encoded for token in (*each.ids, end)], np.int64)

    def windows(domain: str, own: Sequence[str]) -> Tokens:
        tokens = stream(own)
        if len(tokens) < WINDOW:
            raise FusekitError(
                f"{domain}: {len(tokens)} tokens to evaluate on, expected at least {WINDOW}"
            )
        return _windows(tokens, MOST_WINDOWS)

    return Corpus(
        {domain: stream(own) for domain, own in documents["train"].items()},
        {domain: windows(domain, own) for domain, own in documents["validation"].items()},
        {domain: windows(domain, own) for domain, own in documents["test"].items()},
    )


def _windows(stream: Tokens, most: int) -> Tokens:
    """The first windows of a stream, without overlap: `[windows, WINDOW]`."""
    count = min(len(stream) // WINDOW, most)
    return stream[: count * WINDOW].reshape(count, WINDOW)


def _fresh(size: Mapping[str, int], seed: int) -> Any:
    """A Llama with random weights, embedding and head tied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    hidden = size["hidden_size"]
    heads = max(1, hidden // 32)
    if hidden % (2 * heads):
        raise FusekitError(f"setting 'hidden_size': found {hidden}, expected a multiple of 32")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(size["vocabulary"], 257),
            hidden_size=hidden,
            intermediate_size=hidden * 5 // 2,
            num_hidden_layers=size["layers"],
            num_attention_heads=heads,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def fit(model: Any, streams: Sequence[Tokens], steps: int, rate: float, seed: int) -> None:
    """Train in place on windows drawn from the streams in equal parts.

    AdamW, a tenth of the steps of warm-up, then a cosine to zero.

    Raises:
        FusekitError: a stream shorter than a window.
    """
    import torch

    if min(map(len, streams)) <= WINDOW:
        raise FusekitError(f"a domain has too little text to train on: less than {WINDOW} tokens")
    generator = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    model.train()
    for _ in range(steps):
        chosen = [streams[i] for i in generator.integers(len(streams), size=BATCH)]
        starts = [int(generator.integers(len(own) - WINDOW)) for own in chosen]
        tokens = torch.from_numpy(
            np.stack([own[at : at + WINDOW] for own, at in zip(chosen, starts, strict=True)])
        )
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _perplexities(model: Any, windows: Mapping[str, Tokens]) -> str:
    each = {
        domain: float(np.exp(-np.log(scores(model, own)).mean())) for domain, own in windows.items()
    }
    return "perplexity " + ", ".join(f"{domain} {value:.1f}" for domain, value in each.items())


def _write_windows(path: Path, corpus: Corpus) -> None:
    from safetensors.numpy import save

    train = {
        domain: _windows(stream, CALIBRATION_EXAMPLES) for domain, stream in corpus.train.items()
    }
    splits = {"train": train, "validation": corpus.validation, "test": corpus.test}
    tensors = {
        f"{split}.{domain}": windows.astype(np.int32)
        for split, own in splits.items()
        for domain, windows in own.items()
    }
    path.write_bytes(save(tensors))
