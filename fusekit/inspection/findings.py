"""Facts that follow from headers, digests and statistics: each function looks for one kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusekit.checkpoint.folder import Checkpoint
from fusekit.errors import FusekitError
from fusekit.inspection.measure import Measurement
from fusekit.inspection.result import Finding

UNRELATED_COSINE = 0.5
"""A model whose matrices have, in the median, a smaller cosine to the base does not descend from
it."""

FAR_COSINE = 0.9
"""Below this a model descends from the base but has moved unusually far."""


@dataclass(frozen=True)
class Evidence:
    """What the findings are drawn from; `names` are those of the checkpoints, the base first."""

    names: tuple[str, ...]
    checkpoints: Sequence[Checkpoint]
    has_base: bool
    measurements: Sequence[Measurement]
    lora_ranks: Mapping[int, Sequence[int | None]]

    @property
    def models(self) -> range:
        """Source indices of the models."""
        return range(int(self.has_base), len(self.names))


def find_all(evidence: Evidence) -> tuple[Finding, ...]:
    """Every finding, the gravest first."""
    looked = (
        nonfinite,
        disjoint,
        unrelated,
        shapes,
        vocabularies,
        duplicate_models,
        missing_tensors,
        unchanged_tensors,
        shared_within,
        tying,
        lora_origin,
        dtypes,
    )
    found = [finding for look in looked for finding in look(evidence)]
    order = {"stop": 0, "warning": 1, "note": 2}
    return tuple(sorted(found, key=lambda finding: order[finding.severity]))


def nonfinite(evidence: Evidence) -> Iterator[Finding]:
    """NaN and Inf, per model, naming the worst tensor."""
    for index, name in enumerate(evidence.names):
        bad = {
            found.comparison.name: found.nonfinite[index]
            for found in evidence.measurements
            if found.nonfinite.get(index)
        }
        if bad:
            worst = max(bad, key=lambda tensor: bad[tensor])
            yield Finding(
                "stop",
                "nonfinite",
                f"{name}: {sum(bad.values())} NaN or infinite values in {_count(bad, 'tensor')}, "
                f"most of them ({bad[worst]}) in {worst!r}; a merge refuses them",
                (name,),
            )


def disjoint(evidence: Evidence) -> Iterator[Finding]:
    """Checkpoints that have no tensor in common with the first one."""
    for index, name in enumerate(evidence.names[1:], start=1):
        if not any({0, index} <= set(found.comparison.infos) for found in evidence.measurements):
            yield Finding(
                "stop",
                "disjoint",
                f"{name} and {evidence.names[0]} have no tensor name in common: not the same "
                "architecture",
                (name,),
            )


def unrelated(evidence: Evidence) -> Iterator[Finding]:
    """Models that do not descend from the base, by the cosine of their matrices to the base's."""
    if not evidence.has_base:
        return
    cosines = [
        found.statistics.cosine_to_base
        for found in evidence.measurements
        if found.statistics is not None and found.comparison.is_matrix
    ]
    for model, index in enumerate(evidence.models):
        known = [each[model] for each in cosines if not np.isnan(each[model])]
        if not known:
            continue
        cosine = float(np.median(known))
        name = evidence.names[index]
        if cosine < UNRELATED_COSINE:
            yield Finding(
                "stop",
                "unrelated",
                f"{name} does not share the base {evidence.names[0]}: the median cosine between "
                f"its matrices and the base's is {cosine:.2f} (fine-tuned models: above 0.95)",
                (name,),
            )
        elif cosine < FAR_COSINE:
            yield Finding(
                "warning",
                "far",
                f"{name} is far from the base {evidence.names[0]}: median cosine {cosine:.2f} "
                "between their matrices; its task vector is as large as what it started from",
                (name,),
            )


def shapes(evidence: Evidence) -> Iterator[Finding]:
    """Tensors whose shapes differ beyond their first axis: not the same architecture."""
    for found in evidence.measurements:
        infos = found.comparison.infos
        if (
            len({info.shape[1:] for info in infos.values()}) > 1
            or len({len(info.shape) for info in infos.values()}) > 1
        ):
            each = ", ".join(f"{evidence.names[i]} {list(info.shape)}" for i, info in infos.items())
            yield Finding(
                "stop", "shapes", f"tensor {found.comparison.name!r} has different shapes: {each}"
            )
            return


def vocabularies(evidence: Evidence) -> Iterator[Finding]:
    """Embeddings of different length, and tokenizers that disagree."""
    for found in evidence.measurements:
        infos = found.comparison.infos
        leading = {i: info.shape[0] for i, info in infos.items() if len(info.shape) > 1}
        if len({info.shape[1:] for info in infos.values()}) == 1 and len(set(leading.values())) > 1:
            each = ", ".join(f"{evidence.names[i]} {rows}" for i, rows in leading.items())
            yield Finding(
                "warning",
                "vocabulary",
                f"vocabularies differ in size: {found.comparison.name!r} has rows {each}; only "
                "common rows were compared",
            )
            break
    yield from _tokenizers(evidence)


def _tokenizers(evidence: Evidence) -> Iterator[Finding]:
    from fusekit.tokenizers.vocabulary import has_tokenizer, read_vocabulary

    tokens: dict[int, Mapping[str, int]] = {}
    for index, checkpoint in enumerate(evidence.checkpoints):
        if checkpoint.folder is None or not has_tokenizer(checkpoint.folder):
            continue
        try:
            tokens[index] = dict(read_vocabulary(checkpoint.folder).ordered())
        except FusekitError as error:
            yield Finding("warning", "tokenizer", str(error), (evidence.names[index],))
    if not tokens:
        return
    first = min(tokens)
    for index, own in tokens.items():
        extra, absent = own.keys() - tokens[first].keys(), tokens[first].keys() - own.keys()
        moved = sum(own[token] != tokens[first][token] for token in own.keys() - extra)
        if extra or absent or moved:
            yield Finding(
                "warning",
                "tokenizer",
                f"the tokenizer of {evidence.names[index]} differs from that of "
                f"{evidence.names[first]}: {len(extra)} tokens more, {len(absent)} fewer, "
                f"{moved} with another id",
                (evidence.names[index],),
            )


def duplicate_models(evidence: Evidence) -> Iterator[Finding]:
    """Models that are the same, byte for byte, as another one."""
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for index, name in enumerate(evidence.names):
        content = tuple(
            (found.comparison.name, found.digests[index])
            for found in evidence.measurements
            if index in found.digests
        )
        if content in seen:
            text = f"{name} holds the same bytes as {seen[content]}"
            yield Finding("warning", "duplicate_model", text, (name, seen[content]))
        else:
            seen[content] = name


def missing_tensors(evidence: Evidence) -> Iterator[Finding]:
    """Tensors that only some checkpoints have."""
    for index, name in enumerate(evidence.names):
        absent = [
            found.comparison.name
            for found in evidence.measurements
            if index not in found.comparison.infos
        ]
        if absent:
            text = f"{name} lacks {_count(absent, 'tensor')} that others have: {_some(absent)}"
            yield Finding("warning", "missing", text, (name,))


def unchanged_tensors(evidence: Evidence) -> Iterator[Finding]:
    """How much of every model is still the base, byte for byte."""
    if not evidence.has_base:
        return
    for index in evidence.models:
        both = [found for found in evidence.measurements if {0, index} <= found.digests.keys()]
        same = [found for found in both if found.digests[0] == found.digests[index]]
        if same and len(same) < len(both):
            kinds = Counter(found.comparison.kind for found in same)
            text = (
                f"{evidence.names[index]}: {len(same)} of {len(both)} tensors are the base's, "
                f"unchanged: {_some([kind for kind, _ in kinds.most_common()])}"
            )
            yield Finding("note", "unchanged", text, (evidence.names[index],))


def shared_within(evidence: Evidence) -> Iterator[Finding]:
    """Matrices that occur twice in one checkpoint."""
    for index, name in enumerate(evidence.names):
        names: dict[str, list[str]] = defaultdict(list)
        for found in evidence.measurements:
            if index in found.digests and len(found.comparison.infos[index].shape) > 1:
                names[found.digests[index]].append(found.comparison.name)
        for same in names.values():
            if len(same) > 1:
                text = f"{name}: {_some(same)} hold the same bytes (tied weights, or a copy)"
                yield Finding("note", "duplicate_tensors", text, (name,))


def tying(evidence: Evidence) -> Iterator[Finding]:
    """Whether the head is the embedding, and whether the checkpoints agree on it."""
    tied: dict[str, bool] = {}
    for index, name in enumerate(evidence.names):
        present = {
            found.comparison.name: found.digests[index]
            for found in evidence.measurements
            if index in found.digests
        }
        embeddings = [tensor for tensor in present if tensor.endswith(_EMBEDDINGS)]
        if not embeddings:
            continue
        heads = [tensor for tensor in present if tensor.endswith("lm_head.weight")]
        config = evidence.checkpoints[index].config() or {}
        claimed = bool(config.get("tie_word_embeddings", False))
        stored = bool(heads) and present[heads[0]] == present[embeddings[0]]
        if claimed and heads and not stored:
            text = (
                f"{name}: config.json says tie_word_embeddings, but {heads[0]!r} and "
                f"{embeddings[0]!r} differ; loading will drop one of them"
            )
            yield Finding("warning", "tying", text, (name,))
        tied[name] = claimed or stored
    if len(set(tied.values())) > 1:
        untied = [name for name, value in tied.items() if not value]
        text = f"embedding and head are tied in some checkpoints but not in {_some(untied)}"
        yield Finding("warning", "tying", text, tuple(untied))
    elif any(tied.values()):
        yield Finding("note", "tying", "embedding and head are tied: one matrix in two roles")


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def lora_origin(evidence: Evidence) -> Iterator[Finding]:
    """Models whose task vector has low rank in most of the matrices that were looked at."""
    for index, ranks in evidence.lora_ranks.items():
        low = [rank for rank in ranks if rank is not None]
        if low and len(low) * 3 >= len(ranks) * 2:
            name = evidence.names[index]
            text = (
                f"{name} looks like a LoRA folded into the base: the task vector has rank "
                f"{int(np.median(low))} (up to {max(low)}) in {len(low)} of {len(ranks)} matrices "
                "looked at, the rest of it is rounding"
            )
            yield Finding("note", "lora", text, (name,))


def dtypes(evidence: Evidence) -> Iterator[Finding]:
    """Checkpoints stored in different precisions."""
    main = {}
    for index, name in enumerate(evidence.names):
        sizes: Counter[str] = Counter()
        for found in evidence.measurements:
            if index in found.comparison.infos:
                info = found.comparison.infos[index]
                sizes[info.dtype.torch_name] += info.size
        if sizes:
            main[name] = sizes.most_common(1)[0][0]
    if len(set(main.values())) > 1:
        each = ", ".join(f"{name} {dtype}" for name, dtype in main.items())
        text = f"precisions differ: {each}; part of the task vectors is rounding"
        yield Finding("note", "dtypes", text)


def _count(items: object, noun: str) -> str:
    count = len(items)  # type: ignore[arg-type]
    return f"{count} {noun}{'s' * (count != 1)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
