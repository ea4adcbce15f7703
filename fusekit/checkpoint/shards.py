"""A checkpoint in several files, put together by what its index says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusekit.checkpoint.safetensors import ShardedSource
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError


def open_shards(
    label: str, weight_map: Mapping[str, str], open_shard: Callable[[str], TensorSource]
) -> ShardedSource:
    """The source of every file that `weight_map` (tensor name -> file name) mentions.

    Args:
        label: what messages call the whole checkpoint.
        weight_map: as returned by `read_index`, so with file names that stay in their folder.
        open_shard: opens a file by its name.

    Raises:
        CheckpointError: a tensor is not in the file where the index puts it, or is in two files.
    """
    shards: dict[str, TensorSource] = {}
    try:
        for file in dict.fromkeys(weight_map.values()):
            shards[file] = open_shard(file)
        for name, file in weight_map.items():
            if name not in shards[file].tensors:
                raise CheckpointError(
                    f"{label}: tensor {name!r} is not in {file!r}, where the index puts it"
                )
        return ShardedSource(label, list(shards.values()))
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise
