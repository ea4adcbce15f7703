"""How long planning takes: models of many tensors, headers only.

python -m benchmarks.planning --tensors 50000 --models 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import fusekit

GROUP = 50


def write_headers(path: Path, tensors: int) -> None:
    """A safetensors file of tiny bfloat16 tensors named like a mixture of experts."""
    entries: dict[str, object] = {}
    for i in range(tensors):
        layer, rest = divmod(i, GROUP)
        name = f"model.layers.{layer}.mlp.experts.{rest}.down_proj.weight"
        entries[name] = {"dtype": "BF16", "shape": [1, 2], "data_offsets": [4 * i, 4 * i + 4]}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * tensors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=50_000)
    parser.add_argument("--models", type=int, default=4, help="besides the base")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(arguments.models + 1)]
        for path in paths:
            write_headers(path, arguments.tensors)
        recipe = {
            "merge_method": "ties",
            "base_model": str(paths[0]),
            "models": [{"model": str(path)} for path in paths[1:]],
            "parameters": {
                "weight": [{"filter": "experts.7.", "value": [0.2, 0.8]}, {"value": 0.5}],
                "density": 0.5,
            },
        }
        begun, cpu = time.perf_counter(), time.process_time()
        plan = fusekit.plan(recipe)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
        plan.close()
    print(
        f"{len(plan.tensors)} tensors, {arguments.models} models and a base: "
        f"{seconds:.2f} s, {cpu_seconds:.2f} s CPU"
    )


if __name__ == "__main__":
    main()
