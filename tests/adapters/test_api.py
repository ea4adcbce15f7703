"""The public names of fusekit.adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fusekit.adapters

NEED_TORCH = ("mos", "polyhistor")


@pytest.mark.parametrize("name", fusekit.adapters.__all__)
def test_every_public_name_loads_and_is_described(name):
    if any(part in name.lower() for part in NEED_TORCH):
        pytest.importorskip("torch")
    found = getattr(fusekit.adapters, name)
    assert name == "METHODS" or found.__doc__
    assert name in dir(fusekit.adapters)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'merge_adapter'"):
        fusekit.adapters.merge_adapter  # noqa: B018


def test_reading_and_merging_load_no_torch():
    code = (
        "import sys; from fusekit.adapters import load_adapter, merge_adapters, plan_adapters; "
        "print([m for m in ('torch', 'numba', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
