"""Settings that are whole numbers: how large and how long the built suites are trained."""

from __future__ import annotations

from collections.abc import Mapping

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
