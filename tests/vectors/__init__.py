"""Golden inputs and outputs of the official implementations, and how to read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

FOLDER = Path(__file__).parent
StateDict = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One case of a file: its metadata, and tensors by group (`in/base`, `out/merged`, ...)."""

    about: dict[str, Any]
    tensors: dict[str, StateDict]

    def group(self, name: str) -> StateDict:
        return self.tensors[name]

    @property
    def base(self) -> StateDict | None:
        return self.tensors.get("in/base")

    @property
    def models(self) -> list[StateDict]:
        return self.numbered("in/model")

    @property
    def merged(self) -> StateDict:
        return self.tensors["out/merged"]

    def numbered(self, prefix: str) -> list[StateDict]:
        found = []
        while f"{prefix}{len(found)}" in self.tensors:
            found.append(self.tensors[f"{prefix}{len(found)}"])
        return found


def read_case(slug: str, case: str) -> Case:
    """A case of `<slug>.safetensors`; names are `case/in|out/group/tensor`."""
    tensors: dict[str, StateDict] = {}
    with safe_open(FOLDER / f"{slug}.safetensors", "np") as file:
        about = json.loads(file.metadata()[case])
        for key in file.keys():  # noqa: SIM118
            owner, _, rest = key.partition("/")
            if owner == case:
                side, group, *name = rest.split("/", 2)
                where = f"{side}/{group}" if name else side
                tensors.setdefault(where, {})[name[0] if name else group] = file.get_tensor(key)
    return Case(about, tensors)


def assert_close(found: StateDict, expected: StateDict, atol: float, rtol: float = 0.0) -> None:
    """Same names, shapes and values within the tolerance, naming the tensor that is off."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=atol, rtol=rtol, err_msg=name)
