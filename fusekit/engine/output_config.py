"""The config.json of an output: the reference model's, made true of what is written."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.layers import infer_layers
from fusekit.checkpoint.source import TensorInfo
from fusekit.checkpoint.views import LoraSource
from fusekit.engine.matching import Heads, declared_tie, is_head
from fusekit.engine.units import StackedLayers, Structure
from fusekit.errors import RecipeError
from fusekit.tokenizers.config import config_vocab_size, with_vocab_size
from fusekit.tokenizers.embedding import EMBEDDING_NAMES

LAYER_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
"""Keys under which configs count layers."""

_LAYER_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "full_attn_idxs",
)
"""Keys whose lists hold numbers of layers."""

_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
"""Keys that say how many of the first layers are of another kind."""

_EVERY_NTH = (
    "decoder_sparse_step",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "expert_layer_period",
    "attn_layer_period",
    "full_attention_interval",
    "sliding_window_pattern",
    "global_attn_every_n_layers",
)
"""Keys that say that every so many layers one is of another kind."""

_NOT_PER_LAYER = re.compile(
    r"token|architectures|mrope|conv_|kernel|stride|dilation|hidden_sizes|^out_|image|video"
    r"|_mean$|_std$|_ids?$|label|task"
)
"""Lists that may be as long as there are layers without being about layers."""


def output_config(
    config: Mapping[str, Any] | None,
    reference: Checkpoint,
    models: Mapping[str, Checkpoint],
    *,
    dtype: str | None,
    stacks: Sequence[StackedLayers],
    tensors: Sequence[TensorInfo],
    heads: Heads,
) -> dict[str, Any] | None:
    """The reference's config with the output's dtype, layers, vocabulary and tied weights.

    Args:
        config: the reference's config, with token ids and sizes of the output's vocabulary.
        reference: the model whose config is carried over.
        models: all models, for the per-layer settings of layers that come from others.
        dtype: the output's element type, or None if it is not changed.
        stacks: the stacks that slices have put together.
        tensors: the output's tensors.
        heads: what became of tied output heads.
    """
    if config is None:
        return None
    updated = copy.deepcopy(dict(config))
    for stacked in stacks:
        _set_layers(updated, stacked, reference, models)
    _set_vocabulary(updated, reference, tensors)
    written = any(is_head(info) for info in tensors)
    if heads.untied or (stacks and written and declared_tie(updated)):
        _set_untied(updated)
    if dtype is not None:
        updated["torch_dtype" if "torch_dtype" in updated else "dtype"] = dtype
    return updated


def part_configs(reference: Checkpoint, dtype: str | None) -> dict[str, bytes]:
    """The configs of a pipeline's parts that state another element type than is written."""
    changed: dict[str, bytes] = {}
    for part in filter(None, reference.parts()):
        assert reference.folder is not None
        config = Checkpoint(part, reference.source, reference.folder / part).config() or {}
        stated = [key for key in ("dtype", "torch_dtype") if key in config]
        if dtype is not None and stated:
            content = config | dict.fromkeys(stated, dtype)
            changed[f"{part}/config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return changed


def _set_layers(
    config: dict[str, Any],
    stacked: StackedLayers,
    reference: Checkpoint,
    models: Mapping[str, Checkpoint],
) -> None:
    """The layer count, and lists with one entry per layer gathered like the layers."""
    depth = _depth(stacked, reference)
    path = _holder(config, stacked.stack, depth)
    if path is None:
        return
    holder = _at(config, path)
    sources = {model: _at(models[model].config() or {}, path) for model, _ in stacked.origins}
    _refuse_stages(holder, stacked, depth)
    _set_layer_numbers(holder, stacked, sources)
    for key, value in list(holder.items()):
        if (
            _NOT_PER_LAYER.search(key)
            or key in _LAYER_NUMBERS
            or not isinstance(value, list)
            or len(value) != depth
        ):
            continue
        gathered = []
        for model, index in stacked.origins:
            theirs = sources[model].get(key)
            same = isinstance(theirs, list) and index < len(theirs)
            gathered.append(theirs[index] if same else value[index % len(value)])
        holder[key] = gathered
    counted = [holder[key] for key in _counts(holder, stacked.stack)]
    before = depth if depth in counted else counted[0]
    for part in (config, holder) if _is_language(path) else (holder,):
        for key in _counts(part, stacked.stack):
            if part[key] == before:
                part[key] = len(stacked.origins)


def _depth(stacked: StackedLayers, reference: Checkpoint) -> int:
    """How many layers the reference has in a stack; its config is about them."""
    layers = infer_layers(reference.source.tensors).values()
    depths = {layer.stack: layer.depth for layer in layers if layer is not None}
    return depths.get(stacked.stack, stacked.depth)


def _refuse_stages(holder: Mapping[str, Any], stacked: StackedLayers, depth: int) -> None:
    stages = holder.get("depths")
    model, _ = stacked.origins[0]
    whole = stacked.origins == tuple((model, index) for index in range(depth))
    if isinstance(stages, list) and len(stages) == depth and not whole:
        raise RecipeError(
            f"slices: {stacked.stack} of {model} are stages of growing width (depths: {stages} in "
            "config.json), which cannot be put together in another order"
        )


def _set_layer_numbers(
    holder: dict[str, Any], stacked: StackedLayers, sources: Mapping[str, Mapping[str, Any]]
) -> None:
    """Settings that name layers by number, for the numbers that the layers have in the output.

    Raises:
        RecipeError: the layers are in an order that such a setting cannot describe.
    """
    for key in _LAYER_NUMBERS:
        if isinstance(holder.get(key), list):
            holder[key] = [
                number
                for number, (model, index) in enumerate(stacked.origins)
                if index in (sources[model].get(key) or ())
            ]
    for key in _FIRST_LAYERS:
        if isinstance(holder.get(key), int):
            kinds = [index < (sources[model].get(key) or 0) for model, index in stacked.origins]
            holder[key] = sum(kinds)
            if not all(kinds[: holder[key]]):
                number = kinds.index(False)
                _refuse_order(key, stacked, number, "comes before one of the first kind of layers")
    for key in _EVERY_NTH:
        period = holder.get(key)
        if not isinstance(period, int) or period < 2 or "layer_types" in holder:
            continue
        for number, (model, index) in enumerate(stacked.origins):
            if sources[model].get(key) != period:
                found = f"is of a model with {key}: {sources[model].get(key)}, expected {period}"
                _refuse_order(key, stacked, number, found)
            if number % period != index % period:
                found = f"must be one with the remainder {number % period} when divided by {period}"
                _refuse_order(key, stacked, number, found)


def _refuse_order(key: str, stacked: StackedLayers, number: int, why: str) -> NoReturn:
    model, index = stacked.origins[number]
    raise RecipeError(
        f"slices: {key} in config.json says by their numbers of which kind layers are, and cannot "
        f"describe the new order: layer {number} of the output, which is layer {index} of {model}, "
        f"{why}"
    )


def stack_notes(stacks: Sequence[StackedLayers], structures: Mapping[str, Structure]) -> list[str]:
    """First layers that hold other tensors than all later ones, and have changed places.

    An architecture expects them in the first layer only (T5's relative positions).
    """
    notes = []
    for stacked in stacks:
        for number, (model, index) in enumerate(stacked.origins):
            if (number == 0) == (index == 0):
                continue
            structure = structures[model]
            own = _only_first(structure, stacked.stack)
            if own and not _says_first(structure.checkpoint):
                notes.append(
                    f"layer {number} of the output is layer {index} of {model}, whose first layer "
                    f"differs from all others in {own[0]!r}; a loader may expect that of the "
                    "output's first layer, and of no other"
                )
                break
    return notes


def _only_first(structure: Structure, stack: str) -> list[str]:
    """Tensors that only the first block of a stack holds, or only it lacks."""
    first, *others = [set(block) for block in structure.blocks.get(stack, [{}])]
    if not others:
        return []
    return sorted((first - set().union(*others)) | (set.intersection(*others) - first))


def _says_first(checkpoint: Checkpoint) -> bool:
    """Whether the config says which of the layers are of another kind."""
    config = checkpoint.config() or {}
    return any(config.get(key) for key in (*_FIRST_LAYERS, *_LAYER_NUMBERS))


def _counts(holder: Mapping[str, Any], stack: str) -> list[str]:
    """The keys of a config that count the layers of a stack."""
    both = any(isinstance(holder.get(key), int) for key in ("encoder_layers", "num_encoder_layers"))
    return [
        key
        for key in LAYER_KEYS
        if isinstance(holder.get(key), int)
        and _about(key, stack)
        # Beside a count of each, the plain one repeats that of the encoder.
        and not (both and key == "num_hidden_layers" and "decoder" in stack)
    ]


def _about(key: str, stack: str) -> bool:
    """Whether a count of decoder (encoder) layers is about this stack."""
    if "decoder" in key:
        return "encoder" not in stack
    if "encoder" in key or (key == "num_layers" and "decoder" in stack):
        return "decoder" not in stack
    return True


def _holder(config: Mapping[str, Any], stack: str, depth: int) -> tuple[str, ...] | None:
    """The path to the (nested) config that counts the layers of a stack.

    Of several, one that says how many the reference has; of these the one whose name the stack's
    name has in it, or else that of the language model. A single one may count wrongly: models can
    come with layers that their config leaves out.
    """
    counting = [(path, part) for path, part in _parts(config) if _counts(part, stack)]
    exact = [
        path for path, part in counting if any(part[key] == depth for key in _counts(part, stack))
    ]
    found = exact or [path for path, _ in counting if len(counting) == 1]
    named = {path: place for path in found if (place := _resemblance(path, stack)) is not None}
    if named:
        return min(named, key=lambda path: named[path])
    return min(found, key=lambda path: not (path and _is_language(path)), default=None)


def _is_language(path: tuple[str, ...]) -> bool:
    return not path or path[-1] in {"text_config", "llm_config", "language_config"}


def _resemblance(path: tuple[str, ...], stack: str) -> int | None:
    """Which part of a stack's name (`visual.blocks`) begins like a config's (`vision_config`)."""
    names = stack.split(".")
    return next((i for i, name in enumerate(names) if path and name[:3] == path[-1][:3]), None)


def _parts(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    parts: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    for key, value in config.items():
        if isinstance(value, Mapping) and (
            key.endswith("_config") or key in {"encoder", "decoder"}
        ):
            parts += [((key, *path), part) for path, part in _parts(value)]
    return parts


def _at(config: Any, path: tuple[str, ...]) -> Any:
    """The part of a config at a path; empty where another model has none."""
    for key in path:
        config = config.get(key)
        if not isinstance(config, Mapping):
            return {}
    return config


def _set_vocabulary(
    config: dict[str, Any], reference: Checkpoint, tensors: Sequence[TensorInfo]
) -> None:
    """`vocab_size`, where the embedding's rows have changed."""
    before = config_vocab_size(config)
    if before is None:
        return
    source = reference.source
    stated = source.base.tensors if isinstance(source, LoraSource) else source.tensors
    for info in tensors:
        if EMBEDDING_NAMES.search(info.name) and info.shape:
            old = stated.get(info.name)
            if old is not None and old.shape[0] == before != info.shape[0]:
                config.update(with_vocab_size(config, info.shape[0]))
                return


def _set_untied(config: dict[str, Any]) -> None:
    """Say that the head is a matrix of its own, wherever the config speaks of it."""
    stated = [part for _, part in _parts(config) if "tie_word_embeddings" in part]
    for part in stated or [config]:
        part["tie_word_embeddings"] = False  # type: ignore[index]
