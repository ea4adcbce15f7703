"""What a method that keeps data per task writes beside the model, and what its tasks are called."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fusekit.checkpoint.dtypes import dtype_named
from fusekit.checkpoint.folder import Checkpoint
from fusekit.checkpoint.source import TensorInfo
from fusekit.engine.plan import PlannedTensor
from fusekit.errors import RecipeError


def side_file(
    planned: Sequence[PlannedTensor], checkpoints: Sequence[Checkpoint]
) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors of the side file and the metadata of its header; both empty without one.

    Raises:
        RecipeError: tasks that cannot be told apart, or names that the model already uses.
    """
    merged = [each for each in planned if each.kind == "merge" and each.method.side is not None]
    if not merged:
        return [], {}
    tasks = _task_names(merged[0], checkpoints)
    taken = {each.name for each in planned}
    side = []
    for each in merged:
        assert each.method.side is not None
        if each.tensor.models != len(tasks):
            raise RecipeError(
                f"{each.method.name}: tensor {each.name!r} is missing in some models; "
                "it keeps data for every task and needs the tensor in all of them"
            )
        for extra in each.method.side(each.tensor):
            if extra.name in taken:
                raise RecipeError(
                    f"{each.method.name}: the model has a tensor called {extra.name!r}, the name "
                    "of the method's own data; rename it"
                )
            side.append(TensorInfo(extra.name, dtype_named(extra.dtype), extra.shape))
    return side, {"tasks": json.dumps(tasks), "method": merged[0].method.name}


def _task_names(planned: PlannedTensor, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What each model's task is called: as given, or as the model's file or folder."""
    names = []
    for given, ref in zip(planned.tensor.each("task"), planned.models, strict=True):
        reference = checkpoints[ref.source].reference
        names.append(given or reference.rstrip("/").rpartition("/")[2] or reference)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"task: two models' tasks are called {twice!r}; give each model a task of its own "
            "in its parameters"
        )
    return names
