"""Settings of suites: whole numbers, by which they are built, and files, by which they score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fusekit.errors import FusekitError
from fusekit.evaluate.suite import Settings, only_known


def whole_numbers(settings: Settings, defaults: Mapping[str, int]) -> dict[str, int]:
    """The defaults, with what the user set in their place.

    Raises:
        FusekitError: a setting of another name, or a value that is not a whole number from 1 on.
    """
    only_known(settings, tuple(defaults))
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FusekitError(
                f"setting {name!r}: found {value!r}, expected a whole number of at least 1"
            )
    return {**defaults, **settings}


def only_file(settings: Settings, name: str, folder: Path) -> Path:
    """The file that the only setting names, relative to the suite's folder.

    Raises:
        FusekitError: another setting, or none of that name.
    """
    only_known(settings, (name,))
    value = settings.get(name)
    if not isinstance(value, str):
        raise FusekitError(f"{name}: found {value!r}, expected a file")
    return folder / value
