"""Building suites whose models are not package data: train a base and experts, write suite.yml.

`once` makes building resumable: what has been made with the same settings is not made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fusekit.errors import FusekitError, did_you_mean
from fusekit.evaluate.suite import Settings, load, load_suite

BUILDERS: Mapping[str, str] = {
    "digits": "fusekit.evaluate.digits_training:build",
    "lm": "fusekit.evaluate.lm_building:build",
    "text": "fusekit.evaluate.text_building:build",
    "vision": "fusekit.evaluate.vision_training:build",
}
"""Suites that can be built, by name: `module:function`, a `Builder`, loaded on use."""

MULTITASK = "multitask"
"""Name, among a suite's references, of a model trained on the data of all tasks."""

ABOUT = "trained.json"
"""In every folder that `once` made: what it was made with."""


class Builder(Protocol):
    """Trains a base and its experts and writes an ordinary suite folder."""

    def __call__(
        self,
        out: Path,
        *,
        data: Path | None,
        seed: int,
        settings: Settings,
        on_progress: Callable[[str], None],
    ) -> None:
        """Write `out/suite.yml` (with `write_suite`, last) and the checkpoints it names.

        Args:
            out: folder of the suite; checkpoints are made in it with `once`.
            data: folder of the data to train on, None where the user gave none.
            seed: of everything random.
            settings: what the user set; refuse what is unknown with `only_known`.
            on_progress: is told in one line what is being trained and what it reached.

        Raises:
            FusekitError: an unknown setting, or data that is absent or unreadable.
        """


def build_suite(
    name: str,
    out: Path,
    *,
    data: Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """Train the models of a suite; an interrupted run continues with what is missing.

    Args:
        name: of `BUILDERS`.
        out: folder for the suite.
        data: folder of the data, for suites that need some.
        seed: of everything random.
        settings: of the builder.
        on_progress: called with one line for every step.

    Returns:
        The suite's YAML file, for `load_suite`.

    Raises:
        FusekitError: no such suite; settings or data the builder refuses; a folder that holds
            models made otherwise.
    """
    if name not in BUILDERS:
        raise FusekitError(f"suite {name!r} cannot be built{did_you_mean(name, BUILDERS)}")
    builder: Builder = load(BUILDERS[name])
    out.mkdir(parents=True, exist_ok=True)
    say = on_progress or (lambda line: None)
    builder(out, data=data, seed=seed, settings=settings or {}, on_progress=say)
    load_suite(out / "suite.yml")
    return out / "suite.yml"


def once(folder: Path, about: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Make a folder unless it exists already; whole or not at all.

    Args:
        folder: what to make.
        about: what it depends on (JSON types), kept in it.
        make: writes everything into the folder it is given.

    Returns:
        Whether it was made now.

    Raises:
        FusekitError: the folder exists and was made with something else.
    """
    wanted = json.loads(json.dumps(about))
    if folder.exists():
        note = folder / ABOUT
        found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        if found != wanted:
            raise FusekitError(
                f"{folder}: exists and was made with {found or 'something else'}, "
                f"expected {wanted}; choose another folder"
            )
        return False
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    make(partial)
    (partial / ABOUT).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)
    return True


def suite_name(kind: str, seed: int, settings: Settings) -> str:
    """`digits-seed_1-width_24`: what was built, and what is not the default about it.

    A study wants the names of its suites to differ.
    """
    chosen = {"seed": seed, **settings} if seed else settings
    return "-".join([kind, *(f"{key}_{value}" for key, value in sorted(chosen.items()))])


def write_suite(out: Path, content: Mapping[str, Any]) -> None:
    """Write `out/suite.yml`: the keys that `load_suite` reads, paths relative to `out`."""
    import yaml

    partial = out / "suite.yml.partial"
    partial.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    partial.replace(out / "suite.yml")
