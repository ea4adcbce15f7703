"""The output vocabulary of a merge: the `tokenizer` and `tokenizer_source` settings of a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fusekit.checkpoint.references import reference_text
from fusekit.errors import CheckpointError, RecipeError, did_you_mean
from fusekit.tokenizers.alignment import Alignment, Ids
from fusekit.tokenizers.files import tokenizer_files
from fusekit.tokenizers.vocabulary import AddedToken, Vocabulary


@dataclass(frozen=True, slots=True)
class ZeroRow:
    """Take zeros for the token."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """Take a row of `model`: that of `token`, of `token_id`, or of the same token if neither."""

    model: str
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenOverride:
    """Where a token's row comes from in models that lack it; in all of them with `force`."""

    source: ZeroRow | ModelRow | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """A recipe's tokenizer settings; `source` is `union`, `base` or a model reference."""

    source: str = "union"
    tokens: Mapping[str, TokenOverride] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class VocabularyInput:
    """One model of a merge: its reference, its tokenizer (None without files), its usable rows.

    `rows` is the number of rows of its embedding matrix; `vocab_size` the size its config states.
    Ids beyond either are not usable.
    """

    reference: str
    vocabulary: Vocabulary | None
    rows: int
    vocab_size: int | None = None

    @property
    def usable(self) -> int:
        return self.rows if self.vocab_size is None else min(self.rows, self.vocab_size)


@dataclass(frozen=True)
class MergedVocabulary:
    """The output vocabulary.

    `ids` maps its tokens to ids, `origin` names the model whose tokenizer it extends, `files` are
    the tokenizer files to write (name -> bytes), `notes` what the user should be told.
    `alignment.rows` is the `vocab_size` of the output's config.
    """

    ids: Mapping[str, int]
    origin: str
    alignment: Alignment
    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def tokenizer_spec(value: str | Mapping[str, Any]) -> TokenizerSpec:
    """The settings of a recipe's `tokenizer_source` (a string) or `tokenizer` (a mapping).

    >>> tokenizer_spec({"source": "base", "pad_to_multiple_of": 64}).pad_to_multiple_of
    64

    Raises:
        RecipeError: an unknown key, or a value of the wrong kind.
    """
    if isinstance(value, str):
        return TokenizerSpec(source=value.removeprefix("model:"))
    _check_keys("tokenizer", value, ("source", "tokens", "pad_to_multiple_of"))
    tokens = value.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(
            f"tokenizer.tokens: expected a mapping from token to settings, "
            f"found {type(tokens).__name__}"
        )
    multiple = value.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise RecipeError(
            f"tokenizer.pad_to_multiple_of: expected a positive integer, found {multiple!r}"
        )
    source = value.get("source")
    return TokenizerSpec(
        "union" if source is None else _reference(source, "tokenizer.source"),
        {str(token): _override(str(token), entry) for token, entry in tokens.items()},
        multiple,
    )


def merge_vocabularies(
    inputs: Sequence[VocabularyInput], spec: TokenizerSpec, base: str | None = None
) -> MergedVocabulary:
    """Build the output vocabulary and every model's row map.

    `base` and a model reference keep that model's tokenizer. `union` keeps the base's (without a
    base: the first model's) ids and appends what the other models have on top, model by model in
    the given order, ordinary tokens before added ones, each by ascending id; the ids are therefore
    reproducible. Appended tokens match as whole strings: merge rules of the other tokenizers are
    not taken over.

    A model that lacks a token gets, in this order: the override's row; the only model's row that
    has it; the base's row; the mean of the rows of all models that have it.

    The number of rows is that of the tokenizer's own model, or more where tokens need it; with
    `pad_to_multiple_of` it is the next multiple of that above the tokens (1 trims the padding),
    filled up with each matrix's mean row.

    Args:
        inputs: the models in recipe order, the base among them.
        spec: the recipe's settings.
        base: reference of the base model.

    Raises:
        RecipeError: a model named in the settings is not an input, or a token cannot be found.
        CheckpointError: a model without tokenizer whose rows differ from the base's.
    """
    notes: list[str] = []
    references = [entry.reference for entry in inputs]
    origin = _origin(references, spec.source, base)
    _check_override_models(spec.tokens, references)
    known = _with_vocabularies(inputs, base or inputs[0].reference, notes)
    usable = {entry.reference: _usable_tokens(entry, notes) for entry in known}
    by_reference = {entry.reference: entry for entry in known}

    kept = usable[origin]
    appended: dict[str, AddedToken] = {}
    if spec.source == "union":
        appended = _appended(known, usable, kept, notes)
    _append_named(spec.tokens, known, usable, kept, appended)
    ids = kept | {token: entry.id for token, entry in appended.items()}

    alignment = _align(known, usable, ids, by_reference[origin], base, spec)
    vocabulary = by_reference[origin].vocabulary
    assert vocabulary is not None
    files = tokenizer_files(vocabulary, set(vocabulary.ids) - set(kept), list(appended.values()))
    return MergedVocabulary(ids, origin, alignment, files, tuple(notes))


def _check_keys(place: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in entry:
        if key not in known:
            raise RecipeError(f"{place}: unknown key {key!r}{did_you_mean(str(key), known)}")


def _reference(value: Any, place: str) -> str:
    """A model reference as one string, from its text or its long form."""
    text = reference_text(value, place)
    if not isinstance(text, str):
        raise RecipeError(f"{place}: expected a model reference, found {value!r}")
    return text


def _override(token: str, entry: Any) -> TokenOverride:
    place = f"tokenizer.tokens[{token!r}]"
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{place}: expected a mapping with 'source', found {entry!r}")
    _check_keys(place, entry, ("source", "force"))
    force = entry.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{place}.force: expected true or false, found {force!r}")
    source = _row_source(entry.get("source"), f"{place}.source")
    if force and source is None:
        raise RecipeError(f"{place}: force needs a source to take the row from")
    return TokenOverride(source, force)


def _row_source(source: Any, place: str) -> ZeroRow | ModelRow | None:
    if source is None:
        return None
    if not isinstance(source, Mapping) or not {"kind", "token", "token_id"} & set(source):
        return ModelRow(_reference(source, place))
    kind = source.get("kind", "model_token")
    if kind == "zero":
        _check_keys(place, source, ("kind",))
        return ZeroRow()
    if kind != "model_token":
        raise RecipeError(
            f"{place}.kind: unknown kind {kind!r}{did_you_mean(str(kind), ('zero', 'model_token'))}"
        )
    _check_keys(place, source, ("kind", "model", "token", "token_id"))
    token, token_id = source.get("token"), source.get("token_id")
    if "model" not in source or (token is None) == (token_id is None):
        raise RecipeError(f"{place}: model_token needs a model and either token or token_id")
    if token_id is not None and (type(token_id) is not int or token_id < 0):
        raise RecipeError(f"{place}.token_id: expected a row number, found {token_id!r}")
    model = _reference(source["model"], f"{place}.model")
    return ModelRow(model, None if token is None else str(token), token_id)


def _origin(references: Sequence[str], source: str, base: str | None) -> str:
    """The model whose tokenizer the output extends."""
    if not references:
        raise RecipeError("tokenizer: there are no models to take a vocabulary from")
    if base is not None and base not in references:
        raise RecipeError(f"base_model {base!r} is not among the models")
    if source in ("union", "base"):
        return references[0] if base is None else base
    if source not in references:
        raise RecipeError(
            f"tokenizer source {source!r} is not 'union', 'base' or a model of the recipe"
            f"{did_you_mean(source, (*references, 'union', 'base'))}"
        )
    return source


def _check_override_models(
    overrides: Mapping[str, TokenOverride], references: Sequence[str]
) -> None:
    for token, override in overrides.items():
        source = override.source
        if isinstance(source, ModelRow) and source.model not in references:
            raise RecipeError(
                f"tokenizer.tokens[{token!r}]: model {source.model!r} is not in the recipe"
                f"{did_you_mean(source.model, references)}"
            )


def _with_vocabularies(
    inputs: Sequence[VocabularyInput], base: str, notes: list[str]
) -> list[VocabularyInput]:
    """Every input with a vocabulary: a model without tokenizer files is given the base's."""
    reference = next(entry for entry in inputs if entry.reference == base)
    if reference.vocabulary is None:
        raise CheckpointError(f"{base}: no tokenizer found, and the merged vocabulary needs one")
    completed = []
    for entry in inputs:
        if entry.vocabulary is None:
            if entry.rows != reference.rows:
                raise CheckpointError(
                    f"{entry.reference}: no tokenizer found, and its embedding has {entry.rows} "
                    f"rows where that of {base} has {reference.rows}, so its tokens are unknown"
                )
            notes.append(f"{entry.reference}: no tokenizer found, that of {base} is assumed")
            entry = replace(entry, vocabulary=reference.vocabulary)
        completed.append(entry)
    return completed


def _usable_tokens(entry: VocabularyInput, notes: list[str]) -> dict[str, int]:
    assert entry.vocabulary is not None
    limit = entry.usable
    tokens = {token: number for token, number in entry.vocabulary.ids.items() if number < limit}
    beyond = len(entry.vocabulary.ids) - len(tokens)
    if beyond:
        example = max(entry.vocabulary.ids, key=lambda token: entry.vocabulary.ids[token])  # type: ignore[union-attr]
        notes.append(
            f"{entry.reference}: {beyond} tokens have ids beyond its {limit} embedding rows and "
            f"are ignored, e.g. {example!r}"
        )
    return tokens


def _appended(
    inputs: Sequence[VocabularyInput],
    usable: Mapping[str, Mapping[str, int]],
    kept: Mapping[str, int],
    notes: list[str],
) -> dict[str, AddedToken]:
    """What the union puts on top of the kept tokens, in order of the new ids."""
    appended: dict[str, AddedToken] = {}
    defined: dict[str, AddedToken] = {}
    next_id = max(kept.values(), default=-1) + 1
    for entry in inputs:
        assert entry.vocabulary is not None
        added = entry.vocabulary.added
        tokens = sorted(usable[entry.reference].items(), key=lambda item: (item[1], item[0]))
        for special in (False, True):
            for token, _ in tokens:
                if (token in added) == special and token not in kept and token not in appended:
                    flags = added.get(token, AddedToken(token, 0))
                    appended[token] = replace(flags, id=next_id)
                    next_id += 1
        differing = [
            token
            for token in added
            if token in usable[entry.reference]
            and defined.setdefault(token, added[token]).flags != added[token].flags
        ]
        if differing:
            named = ", ".join(repr(token) for token in differing[:5])
            notes.append(
                f"{entry.reference}: {len(differing)} added tokens have other flags than in an "
                f"earlier model, whose flags are kept: {named}"
            )
    return appended


def _append_named(
    overrides: Mapping[str, TokenOverride],
    inputs: Sequence[VocabularyInput],
    usable: Mapping[str, Mapping[str, int]],
    kept: Mapping[str, int],
    appended: dict[str, AddedToken],
) -> None:
    """Append the tokens that only the settings name."""
    next_id = max([*kept.values(), *(entry.id for entry in appended.values())], default=-1) + 1
    for token, override in overrides.items():
        if token in kept or token in appended:
            continue
        owners = [entry for entry in inputs if token in usable[entry.reference]]
        explicit = isinstance(override.source, ZeroRow) or (
            isinstance(override.source, ModelRow)
            and (override.source.token is not None or override.source.token_id is not None)
        )
        if not owners and not explicit:
            everything = {name for tokens in usable.values() for name in tokens}
            hint = _near(token, everything)
            raise RecipeError(
                f"tokenizer.tokens: no model has the token {token!r}{hint}; a new token needs a "
                "source of kind 'model_token' or 'zero'"
            )
        flags = AddedToken(token, next_id)
        for owner in owners[:1]:
            assert owner.vocabulary is not None
            flags = replace(owner.vocabulary.added.get(token, flags), id=next_id)
        appended[token] = flags
        next_id += 1


def _align(
    inputs: Sequence[VocabularyInput],
    usable: Mapping[str, Mapping[str, int]],
    ids: Mapping[str, int],
    origin: VocabularyInput,
    base: str | None,
    spec: TokenizerSpec,
) -> Alignment:
    references = tuple(entry.reference for entry in inputs)
    needed = max(ids.values(), default=-1) + 1
    size = max(needed, origin.rows) if spec.pad_to_multiple_of is None else needed
    own = np.full((len(inputs), size), -1, np.int64)
    columns = np.fromiter(ids.values(), np.int64, len(ids))
    for row, reference in enumerate(references):
        tokens = usable[reference]
        own[row, columns] = np.fromiter((tokens.get(token, -1) for token in ids), np.int64)

    present = own >= 0
    fallback = own.copy()
    if base is not None:
        position = references.index(base)
        several = (present.sum(axis=0) > 1) & present[position]
        others = np.arange(len(inputs)) != position
        fallback[np.ix_(others, several)] = -1
    _align_unused(own, fallback, inputs, usable, columns, references.index(origin.reference))
    known = own.copy()
    for token, override in spec.tokens.items():
        _apply_override(token, override, ids[token], own, fallback, inputs, usable)

    multiple = spec.pad_to_multiple_of or 1
    return Alignment.of(references, own, fallback, known, -(-size // multiple) * multiple)


def _align_unused(
    own: Ids,
    fallback: Ids,
    inputs: Sequence[VocabularyInput],
    usable: Mapping[str, Mapping[str, int]],
    columns: Ids,
    origin: int,
) -> None:
    """Rows no token uses (holes, padding): the model's own unused row, else the origin's."""
    free = np.ones(own.shape[1], bool)
    free[columns] = False
    unused = np.flatnonzero(free)
    for position, entry in enumerate(inputs):
        taken = np.fromiter(usable[entry.reference].values(), np.int64)
        mine = unused[unused < entry.rows]
        mine = mine[~np.isin(mine, taken)]
        own[position, mine] = mine
        if position == origin:
            fallback[position, mine] = mine


def _apply_override(
    token: str,
    override: TokenOverride,
    column: int,
    own: Ids,
    fallback: Ids,
    inputs: Sequence[VocabularyInput],
    usable: Mapping[str, Mapping[str, int]],
) -> None:
    if override.source is None:
        return
    fallback[:, column] = -1
    if isinstance(override.source, ModelRow):
        position, row = _source_row(token, override.source, inputs, usable)
        fallback[position, column] = row
    if override.force:
        own[:, column] = -1


def _source_row(
    token: str,
    source: ModelRow,
    inputs: Sequence[VocabularyInput],
    usable: Mapping[str, Mapping[str, int]],
) -> tuple[int, int]:
    place = f"tokenizer.tokens[{token!r}]"
    position = [entry.reference for entry in inputs].index(source.model)
    if source.token_id is not None:
        if source.token_id >= inputs[position].rows:
            raise RecipeError(
                f"{place}: token_id {source.token_id} is beyond the {inputs[position].rows} "
                f"embedding rows of {source.model}"
            )
        return position, source.token_id
    wanted = token if source.token is None else source.token
    row = usable[source.model].get(wanted)
    if row is None:
        hint = _near(wanted, usable[source.model])
        raise RecipeError(f"{place}: {source.model} has no token {wanted!r}{hint}")
    return position, row


def _near(token: str, tokens: Iterable[str]) -> str:
    """Like `did_you_mean`, without the list of a whole vocabulary when nothing is near."""
    near = difflib.get_close_matches(token, tokens, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
