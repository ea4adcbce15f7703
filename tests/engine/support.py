"""Plans of state dicts in memory, run by the executor itself, and checkpoint folders on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.source import TensorSource
from fusekit.engine.executor import Execution, Executor
from fusekit.engine.operands import choose_operands
from fusekit.engine.plan import Plan
from fusekit.engine.planner import plan_checkpoints
from fusekit.methods import Method, find
from fusekit.recipe.schema import load_recipe

Array = np.ndarray[Any, np.dtype[Any]]
StateDict = Mapping[str, Array]


class ArraySink:
    """Collects merged tensors, the bytes written so far and the checksums."""

    def __init__(self, plan: Plan) -> None:
        self.arrays = {p.name: np.zeros(p.shape, p.dtype.numpy) for p in plan.tensors}
        self.checksums: dict[str, str] = {}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        if name not in self.arrays:
            return  # data beside the model
        flat = self.arrays[name].reshape(-1).view(np.uint8)
        flat[offset : offset + len(data)] = data

    def finished(self, name: str, checksum: str) -> None:
        assert name not in self.checksums
        self.checksums[name] = checksum


def plan_of(
    sources: Sequence[TensorSource],
    method: str | Method,
    base: TensorSource | None = None,
    **recipe: Any,
) -> Plan:
    """The plan of a merge of opened sources; `recipe` takes what a recipe takes."""
    merging = find(method) if isinstance(method, str) else method
    own = recipe.pop("model_parameters", None) or [{} for _ in sources]
    names = [f"model {i}" for i in range(len(sources))]
    content = {
        "merge_method": merging.name,
        "models": [
            {"model": name, "parameters": dict(each)} for name, each in zip(names, own, strict=True)
        ],
        **({"base_model": "base"} if base is not None else {}),
        **recipe,
    }
    parsed = load_recipe(content)
    opened = [Checkpoint("base", base)] if base is not None else []
    opened += [Checkpoint(name, source) for name, source in zip(names, sources, strict=True)]
    return plan_checkpoints(parsed, merging, choose_operands(parsed, merging), opened)


def execute(
    models: Sequence[StateDict],
    method: str | Method,
    base: StateDict | None = None,
    engine: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> tuple[dict[str, Array], Execution, dict[str, str]]:
    """Merged arrays, what the run reports, and checksums; `engine` goes to the executor."""
    plan = plan_of(
        [MemorySource(arrays, f"model {i}") for i, arrays in enumerate(models)],
        method,
        None if base is None else MemorySource(base, "base"),
        **recipe,
    )
    sink = ArraySink(plan)
    execution = Executor(plan, sink, **(engine or {})).run()
    return sink.arrays, execution, sink.checksums


def assert_same_bytes(found: StateDict, expected: StateDict) -> None:
    """The same names, types, shapes and bytes."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        if found[name].tobytes() != array.tobytes():
            differing = np.count_nonzero(
                np.frombuffer(found[name].tobytes(), np.uint8)
                != np.frombuffer(array.tobytes(), np.uint8)
            )
            raise AssertionError(f"{name}: {differing} of {array.nbytes} bytes differ")


def random_models(
    shapes: Mapping[str, tuple[int, ...]], n: int, seed: int = 0, spread: float = 0.1
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """A base and `n` models around it, float32."""
    rng = np.random.default_rng(seed)
    base = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    models = [
        {k: (v + spread * rng.standard_normal(v.shape)).astype(np.float32) for k, v in base.items()}
        for _ in range(n)
    ]
    return base, models


def write_model(folder: Path, tensors: StateDict, config: Mapping[str, Any] | None = None) -> Path:
    """A model folder with one safetensors file and, if given, a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
