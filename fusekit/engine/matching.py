"""From units of tensors to matched tensors: shapes that agree, tied heads, missing tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.layers import infer_layers
from fusekit.checkpoint.source import TensorInfo
from fusekit.checkpoint.views import LoraSource, equal_tensors
from fusekit.engine.operands import Operands, Slice
from fusekit.engine.plan import TensorRef
from fusekit.engine.units import Unit
from fusekit.errors import CheckpointError, RecipeError, did_you_mean
from fusekit.methods.base import Method
from fusekit.tokenizers.embedding import EMBEDDING_NAMES, HEAD_NAMES

_SKIPPING = ("skip-model", "copy")
"""Settings by which a tensor is merged from the models that have it."""


@dataclass(frozen=True, slots=True)
class Matched:
    """One output tensor: its operands, and which of the slice's models they are.

    `names` are the tensors' names in those models, by which per-model parameters are looked up; an
    embedding that stands in for a tied head goes by the head's.
    """

    info: TensorInfo
    part: Slice
    position: float
    kept: tuple[int, ...]
    names: tuple[str, ...]
    models: tuple[TensorRef, ...]
    base: TensorRef | None
    is_alone: bool = False
    """Whether only the first operand's tensor is used, whatever the others hold."""


@dataclass
class Heads:
    """What matching has found out about tied output heads."""

    untied: bool = False
    """Whether a head is written although a model shares it with its embedding."""

    dropped: list[str] = field(default_factory=list)
    """Heads left out because every model shares them with its embedding."""


class Matcher:
    """Matches the units of one merge.

    Args:
        checkpoints: the opened models, in the order that `TensorRef.source` counts.
        method: what merges them.
        missing: what to do about tensors that a model lacks.
    """

    def __init__(self, checkpoints: list[Checkpoint], method: Method, missing: str) -> None:
        self._checkpoints = checkpoints
        self._index = {checkpoint.reference: i for i, checkpoint in enumerate(checkpoints)}
        self._tensors = [checkpoint.source.tensors for checkpoint in checkpoints]
        self._method = method
        self._missing = missing
        self._ties: dict[int, bool | None] = {}
        self._embeddings: dict[int, list[TensorInfo]] = {}
        self.heads = Heads()
        self.warnings: list[str] = []
        self._left_out: list[str] = []
        self._copied: list[str] = []

    def match(self, unit: Unit) -> Iterator[Matched]:
        """The unit's output tensors, those of its first operand first.

        Raises:
            CheckpointError: tensors that are missing or differ in shape or kind.
        """
        sources = [self._index[operand.model] for operand in unit.part.operands]
        first, *others = unit.offered
        extra = list(dict.fromkeys(name for other in others for name in other if name not in first))
        if self._method.missing == "first":
            self._left_out += extra
            yield from (self._alone_or_matched(name, unit, sources) for name in first)
            return
        untied = self._head_to_untie(unit, sources)
        if untied is not None and untied.name not in first and untied.name not in extra:
            extra.append(untied.name)
        for name in [*first, *extra]:
            found = [offered.get(name) for offered in unit.offered]
            is_untied = untied is not None and name == untied.name
            if (
                HEAD_NAMES.search(name)
                and not is_untied
                and self._is_shared_by_all(name, found, sources)
            ):
                self.heads.dropped.append(name)
                continue
            if None in found:
                found = self._with_tied(name, found, sources, untied if is_untied else None)
            holder = self._only_holder(unit, found)
            if holder is None:
                yield self._matched(name, unit, sources, found)
            else:
                self._copied.append(name)
                yield self._alone(name, unit, sources, found, holder)

    def notes(self) -> list[str]:
        """What the user should be told about the tensors."""
        notes = list(self.warnings)
        if self._left_out:
            notes.append(
                f"{len(self._left_out)} tensor(s) that {self._checkpoints[0].reference} does not "
                f"have are left out, such as {min(self._left_out)!r}"
            )
        if self._copied:
            notes.append(
                f"{len(self._copied)} tensor(s) that only one model has are copied from it, such "
                f"as {min(self._copied)!r}; the output's config is still that of one model"
            )
        return notes

    def _alone_or_matched(self, name: str, unit: Unit, sources: list[int]) -> Matched:
        """The tensor of all operands, or of the first alone where others lack it or differ."""
        found = [offered.get(name) for offered in unit.offered]
        infos = [
            None if inner is None else self._tensors[source][inner]
            for inner, source in zip(found, sources, strict=True)
        ]
        lead = infos[0]
        assert lead is not None
        if all(info is not None and info.shape == lead.shape for info in infos):
            return self._matched(name, unit, sources, found)
        return self._alone(name, unit, sources, found, 0)

    def _only_holder(self, unit: Unit, found: list[str | None]) -> int | None:
        """Of a tensor that is to be copied where no other operand has it, the operand with it."""
        holders = [i for i, inner in enumerate(found) if inner is not None]
        if self._missing != "copy" or len(holders) != 1 or len(found) == 1:
            return None
        return None if holders == [0] and unit.part.base is not None else holders[0]

    def _alone(
        self, name: str, unit: Unit, sources: list[int], found: list[str | None], operand: int
    ) -> Matched:
        """The tensor of one operand, whatever the others hold."""
        inner = found[operand]
        assert inner is not None
        info = self._tensors[sources[operand]][inner]
        ref = TensorRef(sources[operand], info.name, info.dtype)
        has_base = unit.part.base is not None
        return Matched(
            TensorInfo(name, info.dtype, info.shape),
            unit.part,
            unit.position(name),
            (max(operand - has_base, 0),),
            (info.name,),
            (ref,),
            ref if has_base else None,
            is_alone=True,
        )

    # -- tied heads ------------------------------------------------------------------------------

    def _is_shared_by_all(self, name: str, found: list[str | None], sources: list[int]) -> bool:
        """Whether the head only repeats what every model shares with its embedding."""
        if not name.endswith(".weight"):
            return False
        heads = [
            self._tied_head(source, inner) for inner, source in zip(found, sources, strict=True)
        ]
        if None in heads or self._is_trained_apart(heads, sources):
            self.heads.untied |= any(heads)
            return False
        return True

    def _tied_head(self, source: int, inner: str | None) -> tuple[str, str] | None:
        """A model's head and its embedding, if its config says that they are one."""
        if inner is None or not self._declared_tie(source):
            return None
        embedding = self._embedding_like(source, self._tensors[source][inner])
        return None if embedding is None else (inner, embedding)

    def _is_trained_apart(
        self, heads: Sequence[tuple[str, str] | None], sources: Sequence[int]
    ) -> bool:
        """Whether an adapter makes a tied head another matrix than the embedding."""
        for pair, index in zip(heads, sources, strict=True):
            source = self._checkpoints[index].source
            if (
                pair is not None
                and isinstance(source, LoraSource)
                and any(source.changes(name) for name in pair)
                and not equal_tensors(source, *pair)
            ):
                return True
        return False

    def _head_to_untie(self, unit: Unit, sources: list[int]) -> TensorInfo | None:
        """The own head of the first layers' models, where the last layers' all have tied ones.

        The output's embedding is another than theirs, so theirs has to be written as the head.
        """
        own = next(
            (
                info
                for model in unit.after
                if self._declared_tie(self._index[model]) is not True
                for info in self._tensors[self._index[model]].values()
                if is_head(info)
            ),
            None,
        )
        if own is None or not all(
            self._declared_tie(source) is not False and self._embedding_like(source, own)
            for source in sources
        ):
            return None
        return own

    def _with_tied(
        self,
        name: str,
        found: list[str | None],
        sources: list[int],
        untied: TensorInfo | None = None,
    ) -> list[str | None]:
        """Where a model has no head because it is tied, its embedding takes the head's place.

        `untied` is what the head is like where no model has one.
        """
        present = next(
            (
                self._tensors[source][inner]
                for inner, source in zip(found, sources, strict=True)
                if inner is not None
            ),
            untied,
        )
        assert present is not None
        if not is_head(replace(present, name=name)):
            return found
        completed = list(found)
        for i, source in enumerate(sources):
            if completed[i] is None and self._declared_tie(source) is not False:
                completed[i] = self._embedding_like(source, present)
                self.heads.untied |= completed[i] is not None
        return completed

    def _declared_tie(self, source: int) -> bool | None:
        if source not in self._ties:
            self._ties[source] = declared_tie(self._checkpoints[source].config() or {})
        return self._ties[source]

    def _embedding_like(self, source: int, head: TensorInfo) -> str | None:
        """The one embedding with rows of the head's length; of several, the `shared` one."""
        if source not in self._embeddings:
            self._embeddings[source] = [
                info
                for name, info in self._tensors[source].items()
                if len(info.shape) == 2 and EMBEDDING_NAMES.search(name)
            ]
        alike = [info.name for info in self._embeddings[source] if info.shape[1:] == head.shape[1:]]
        if len(alike) > 1:
            alike = [name for name in alike if name.endswith("shared.weight")]
        return alike[0] if len(alike) == 1 else None

    # -- operands --------------------------------------------------------------------------------

    def _matched(
        self, name: str, unit: Unit, sources: list[int], found: list[str | None]
    ) -> Matched:
        if None in found:
            found, sources = self._without_missing(name, unit, sources, found)
        infos = [
            None if inner is None else self._tensors[source][inner]
            for inner, source in zip(found, sources, strict=True)
        ]
        lead = next(i for i, info in enumerate(infos) if info is not None)
        reference = infos[lead]
        assert reference is not None
        shape = reference.shape
        for i, info in enumerate(infos):
            if info is None or info is reference:
                continue
            if info.shape != shape:
                shape = self._common_shape(info, sources[i], shape, reference, sources[lead])
            if info.dtype != reference.dtype:
                self._check_kind(info, sources[i], reference, sources[lead])
        refs = [
            None if info is None else TensorRef(source, info.name, info.dtype)
            for info, source in zip(infos, sources, strict=True)
        ]
        base = None if unit.part.base is None else refs[0]
        offset = 0 if unit.part.base is None else 1
        kept = tuple(i for i in range(len(refs) - offset) if refs[i + offset] is not None)
        models = tuple(ref for ref in refs[offset:] if ref is not None)
        return Matched(
            TensorInfo(name, reference.dtype, shape),
            unit.part,
            unit.position(name),
            kept,
            tuple(name if _stands_in(ref.name, name) else ref.name for ref in models),
            models,
            base,
        )

    def _without_missing(
        self, name: str, unit: Unit, sources: list[int], found: list[str | None]
    ) -> tuple[list[str | None], list[int]]:
        """What is left of the operands when some lack the tensor, or the refusal."""
        operands = unit.part.operands
        if found[0] is None and (unit.part.base is not None or self._missing not in _SKIPPING):
            holder = next(i for i, inner in enumerate(found) if inner is not None)
            inner = found[holder]
            assert inner is not None
            raise CheckpointError(
                f"{self._checkpoints[sources[holder]].source.where(inner)}: tensor {inner!r} is "
                f"not in {operands[0].model}; all models must hold the same tensors"
                + self._tie_hint(name, sources, found)
            )
        lacking = [i for i, inner in enumerate(found) if inner is None]
        if self._missing == "error":
            i = lacking[0]
            theirs = unit.offered[i]
            raise CheckpointError(
                f"{self._checkpoints[sources[i]].source.label}: tensor {name!r} of "
                f"{operands[0].model} is missing"
                + (
                    self._depth_hint(name, sources[0], sources[i])
                    or (did_you_mean(name, theirs) if len(theirs) < 2000 else "")
                )
                + self._tie_hint(name, sources, found)
            )
        if self._missing == "base":
            if unit.part.base is None:
                raise RecipeError("missing: 'base' takes tensors from base_model, which is missing")
            return (
                [found[0] if inner is None else inner for inner in found],
                [
                    sources[0] if inner is None else source
                    for inner, source in zip(found, sources, strict=True)
                ],
            )
        left = len(found) - len(lacking) - (unit.part.base is not None)
        if unit.part.base is None and left < self._method.min_models:
            raise CheckpointError(
                f"tensor {name!r}: only {left} of {len(found)} models hold it, and "
                f"{self._method.name} merges at least {self._method.min_models}"
            )
        return found, sources

    def _depth_hint(self, name: str, holder: int, lacking: int) -> str:
        """That a model has fewer layers, where that is why it lacks a tensor."""
        here, there = (infer_layers(self._tensors[source]) for source in (holder, lacking))
        layer = here.get(name)
        if layer is None:
            return ""
        depth = max(
            (one.depth for one in there.values() if one and one.stack == layer.stack), default=0
        )
        if not 0 < depth < layer.depth:
            return ""
        return (
            f": {self._checkpoints[lacking].reference} has {depth} layers, "
            f"{self._checkpoints[holder].reference} {layer.depth}; choose among them with slices"
        )

    def _tie_hint(self, name: str, sources: list[int], found: list[str | None]) -> str:
        """Why a missing head could not be taken from the embedding."""
        if not HEAD_NAMES.search(name) or not name.endswith(".weight"):
            return ""
        lacking = next(
            source for inner, source in zip(found, sources, strict=True) if inner is None
        )
        if self._declared_tie(lacking) is False:
            return (
                f" ({self._checkpoints[lacking].reference} has no output head although its config "
                "says tie_word_embeddings: false)"
            )
        return f" (no embedding of {self._checkpoints[lacking].reference} can stand in for it)"

    def _common_shape(
        self,
        info: TensorInfo,
        source: int,
        shape: tuple[int, ...],
        reference: TensorInfo,
        lead: int,
    ) -> tuple[int, ...]:
        """The rows of a vocabulary tensor that all have; any other difference is refused.

        Where task vectors are taken, models are cut to the base's rows; else all to the fewest, as
        where a method interpolates around its base.
        """
        label = self._checkpoints[source].source.where(info.name)
        expected = self._checkpoints[lead].source.where(reference.name)
        vocabulary = EMBEDDING_NAMES.search(info.name) or HEAD_NAMES.search(info.name)
        fixed = self._method.base == "origin" and not self._method.common_rows
        if not vocabulary or info.shape[1:] != shape[1:] or (fixed and info.shape[0] < shape[0]):
            hint = (
                "; align the vocabularies with tokenizer_source: union"
                if vocabulary and info.shape[1:] == shape[1:]
                else ""
            )
            raise CheckpointError(
                f"{label}: tensor {info.name!r} has shape {list(info.shape)}, "
                f"expected {list(shape)} as in {expected}{hint}"
            )
        rows = min(info.shape[0], shape[0])
        self.warnings.append(
            f"{reference.name}: {self._checkpoints[source].reference} has {info.shape[0]} rows, "
            f"{self._checkpoints[lead].reference} {reference.shape[0]}; only the first {rows} are "
            "merged; set tokenizer_source to align the vocabularies"
        )
        return (rows, *shape[1:])

    def _check_kind(self, info: TensorInfo, source: int, reference: TensorInfo, lead: int) -> None:
        if info.dtype.is_float and reference.dtype.is_float:
            return
        raise CheckpointError(
            f"{self._checkpoints[source].source.where(info.name)}: tensor {info.name!r} is "
            f"{info.dtype.torch_name}, expected {reference.dtype.torch_name} as in "
            f"{self._checkpoints[lead].source.where(reference.name)}"
        )


def head_notes(
    operands: Operands, checkpoints: Sequence[Checkpoint], written: Sequence[TensorInfo]
) -> list[str]:
    """What becomes of the head where slices take the last layers from other models than the first.

    The embedding belongs to the first slice, the head to the last. A tied head is an embedding.

    Raises:
        RecipeError: the models of the last slice have no head of their own, those of the first do,
            so the output would have none.
    """
    opened = {checkpoint.reference: checkpoint for checkpoint in checkpoints}
    if any(is_head(info) for info in written):
        return _row_notes(operands, opened, written)
    notes = []
    for section in operands.sections:
        first, last = (
            [operand.model for operand in section.slices[end].operands] for end in (0, -1)
        )
        if set(first) == set(last):
            continue
        own = next((model for model in first if _holds_head(opened[model])), None)
        if own is not None:
            raise RecipeError(
                f"slices: the output would have no output head: {own} has one of its own, but the "
                f"last slice is made of {last[0]}, which has neither a head nor an embedding in "
                f"its place; add {own} to the last slice's sources or end with its layers"
            )
        if declared_tie(opened[last[0]].config() or {}):
            notes.append(
                f"the output head is the embedding of {', '.join(first)}, since the models are "
                f"tied, but the last layers are those of {', '.join(last)}, which were trained "
                "with another embedding as head"
            )
    return notes


def _row_notes(
    operands: Operands, opened: Mapping[str, Checkpoint], written: Sequence[TensorInfo]
) -> list[str]:
    """Where slices take the head from a model with another number of tokens."""
    notes = []
    heads = [info for info in written if is_head(info)]
    tables = [
        info for info in written if len(info.shape) == 2 and EMBEDDING_NAMES.search(info.name)
    ]
    for section in operands.sections:
        first, last = (section.slices[end].operands[0].model for end in (0, -1))
        mine, theirs = (opened[model].source.tensors for model in (first, last))
        for table, head in itertools.product(tables, heads):
            if (
                first != last
                and table.name in mine
                and table.name in theirs
                and mine[table.name].shape != theirs[table.name].shape
                and table.shape[0] != head.shape[0]
            ):
                notes.append(
                    f"the embedding of {first} has {table.shape[0]} rows, the head of {last} "
                    f"{head.shape[0]}: few libraries load that; align the vocabularies with "
                    "tokenizer_source: union"
                )
    return notes


def _stands_in(inner: str, name: str) -> bool:
    """Whether an input tensor is an embedding in the place of a tied head."""
    return inner != name and bool(HEAD_NAMES.search(name) and EMBEDDING_NAMES.search(inner))


def is_head(info: TensorInfo) -> bool:
    """Whether a tensor is the matrix of an output head, not its bias."""
    is_named = HEAD_NAMES.search(info.name) is not None and info.name.endswith(".weight")
    return is_named and len(info.shape) == 2


def _holds_head(checkpoint: Checkpoint) -> bool:
    """Whether a model has an output head that its config does not say is its embedding."""
    return declared_tie(checkpoint.config() or {}) is not True and any(
        is_head(info) for info in checkpoint.source.tensors.values()
    )


def declared_tie(config: Mapping[str, Any]) -> bool | None:
    """`tie_word_embeddings` of a config or of its language tower; None where it is not stated."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        value = part.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None
