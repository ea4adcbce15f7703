"""Merges that run experts on training examples as they go, where a suite has such examples.

A method of the registry that needs data is given files of statistics. These here look further: the
inputs of a layer that come through the merged layers before it, or the gradient of a task's loss.
What they prepare, checkpoints, is merged by a method of the registry.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.checkpoint.folder import open_checkpoint
from fusekit.evaluate.suite import Calibrates, Suite
from fusekit.methods.base import Parameter

Prepare = Callable[[Suite, Mapping[str, Any], Path], list[Path]]
"""(suite, parameters, folder) -> the checkpoints to merge, written into the folder."""


@dataclass(frozen=True)
class DataMethod:
    """A merge that a suite prepares on training examples of the tasks.

    Attributes:
        name, parameters: as of `Method`; every parameter has a default.
        prepare: makes the checkpoints to merge.
        method: the registry's, which merges them, with the parameters `merging`.
    """

    name: str
    parameters: tuple[Parameter, ...]
    prepare: Prepare
    method: str
    merging: Mapping[str, Any]

    def complete(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, with defaults for those that are not given."""
        return {p.name: parameters.get(p.name, p.default) for p in self.parameters}


def measure_expert(suite: Suite, task: str, statistic: str, out: Path) -> None:
    """Measure the expert of a task on training examples: `fisher`, `gram`, ... of its layers.

    Raises:
        FusekitError: a checkpoint that cannot be loaded, or no training examples.
    """
    from fusekit.calibrate import measure
    from fusekit.evaluate.pretrained import one_thread

    known = _calibrates(suite).calibration(suite.experts[task], task)
    with one_thread():
        measure(known.module, known.batches, out, statistic=statistic, estimator=known.estimator)


def _regmean_plus_plus(suite: Suite, parameters: Mapping[str, Any], folder: Path) -> list[Path]:
    """All experts in one checkpoint, merged block by block."""
    from fusekit.calibrate import regmean_plus_plus
    from fusekit.evaluate.pretrained import one_thread

    evaluator = _calibrates(suite)
    known = [evaluator.calibration(path, task) for task, path in suite.experts.items()]
    merged = evaluator.calibration(suite.base, suite.tasks[0]).module
    with one_thread():
        regmean_plus_plus(
            merged,
            [each.module for each in known],
            [each.batches for each in known],
            known[0].blocks,
            scale=parameters["scale"],
        )
    return [_written(merged.state_dict(), suite.base, folder / "merged")]


def _localized(suite: Suite, parameters: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every expert with everything that its learned mask leaves out as in the base."""
    from fusekit.evaluate.pretrained import one_thread
    from fusekit.learn import learn_mask

    evaluator = _calibrates(suite)
    found = []
    for task, path in suite.experts.items():
        base = evaluator.calibration(suite.base, task).module.state_dict()
        known = evaluator.calibration(path, task)
        with one_thread():
            learned = learn_mask(known.module, base, known.batches, density=parameters["density"])
        state = learned.apply(base, known.module.state_dict())
        found.append(_written(state, path, folder / task))
    return found


def _calibrates(suite: Suite) -> Calibrates:
    assert isinstance(suite.evaluator, Calibrates)
    return suite.evaluator


def _written(state: Mapping[str, Any], like: Path, folder: Path) -> Path:
    """A checkpoint with the tensors and the configuration of another, in float32."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: state[name].contiguous() for name in _names(like)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if (like / "config.json").is_file():
        shutil.copyfile(like / "config.json", folder / "config.json")
    return folder


def _names(checkpoint: Path) -> list[str]:
    source = open_checkpoint(str(checkpoint)).source
    try:
        return list(source.tensors)
    finally:
        source.close()


DATA_METHODS: Mapping[str, DataMethod] = {
    method.name: method
    for method in (
        DataMethod(
            name="regmean_plus_plus",
            parameters=(
                Parameter(
                    "scale",
                    "float",
                    "Of the Gram matrices' off-diagonal entries.",
                    default=0.9,
                    minimum=0.0,
                    maximum=1.0,
                ),
            ),
            prepare=_regmean_plus_plus,
            method="passthrough",
            merging={},
        ),
        DataMethod(
            name="localize_and_stitch_learned",
            parameters=(
                Parameter(
                    "density",
                    "float",
                    "Share of the entries that is kept before learning.",
                    default=0.3,
                    above=0.0,
                    maximum=1.0,
                ),
            ),
            prepare=_localized,
            method="localize_and_stitch",
            merging={"density": 1.0},
        ),
    )
}
"""By name; `--methods` takes them beside those of the registry."""
