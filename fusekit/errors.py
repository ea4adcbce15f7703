"""Errors a user can act on. Each message names the place, what was found and what was expected."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

_MOST_LISTED = 800
"""Characters of a list of names in a message: room for every method, not for every tensor."""


class FusekitError(Exception):
    """Any refusal that is the input's fault. The CLI prints it and exits with status 2."""


class RecipeError(FusekitError):
    """The recipe asks for something that cannot be done."""


class CheckpointError(FusekitError):
    """A file or tensor of a checkpoint is missing, malformed or does not fit the others."""


class MissingExtraError(FusekitError):
    """An optional dependency is needed; the message names the extra that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the [{extra}] extra: pip install 'fusekit[{extra}]'")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the choice nearest to `word`, or the list of choices if none is.

    >>> did_you_mean("densty", ["density", "weight"])
    " (did you mean 'density'?)"
    """
    known = sorted(choices)
    plain = {choice.lower(): choice for choice in reversed(known)}
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6) or [
        plain[close] for close in difflib.get_close_matches(word.lower(), plain, n=1, cutoff=0.6)
    ]
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {_listed(known)})" if known else ""


def _listed(words: list[str]) -> str:
    """Words with commas between them, as many as a sentence can hold."""
    lengths = itertools.accumulate(len(word) + 2 for word in words)
    shown = max(1, sum(length <= _MOST_LISTED for length in lengths))
    more = f" and {len(words) - shown} more" if shown < len(words) else ""
    return ", ".join(words[:shown]) + more
