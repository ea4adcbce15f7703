"""Time and memory of methods on whole matrices against the decompositions alone, in one run.

    python -m benchmarks.matrix --hidden 896 --intermediate 4864 --layers 2

Two floors per method, on matrices of the shapes it decomposes: LAPACK's thin SVDs in float32, and
the symmetric eigenproblems in float64 that the methods solve instead. `ratio` is the whole merge,
reading and writing included, over a floor. Times are CPU seconds, of one thread by default, which
other work on the machine disturbs least; with --device they are seconds on the clock. WUDI's closed
form is compared with its Adam form. Every merge runs in a process of its own, whose peak memory is
held against 6 x largest tensor (float32) x models + 500 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

MODELS = 4
METHODS = ("tsv", "iso_c", "iso_cts", "opcm", "wudi")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    shapes = llama_shapes(options.hidden, options.intermediate, options.layers, options.vocabulary)
    with tempfile.TemporaryDirectory(prefix="fusekit-matrix-") as scratch:
        folder = Path(scratch)
        write_models(folder, shapes)
        largest = max(int(np.prod(shape)) for shape in shapes.values())
        total = sum(int(np.prod(shape)) for shape in shapes.values())
        print(f"{total / 1e6:.1f} M parameters, {MODELS} models, largest {largest / 1e6:.2f} M")
        print(
            f"{'method':14} {'merge s':>8} {'svd s':>8} {'ratio':>6} {'eigh s':>8} {'ratio':>6}"
            f" {'peak MB':>8} {'bound MB':>9}"
        )
        alone = floors(shapes, options)
        for method in options.methods:
            run_one(folder, method, {}, options, shapes, alone)
        if "wudi" in options.methods:
            run_one(folder, "wudi", {"solver": "adam"}, options, shapes, alone)
            compare_losses(shapes)


def llama_shapes(
    hidden: int, intermediate: int, layers: int, vocabulary: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with a quarter of the heads for keys and values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, outputs in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (outputs, hidden)
        for name in ("gate", "up"):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    return shapes


def write_models(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A base and fine-tuned models in bfloat16."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=shape).astype("f4") * 0.02 for name, shape in shapes.items()}
    for label in ("base", *(f"model{i}" for i in range(MODELS))):
        moved = {
            name: value
            if label == "base"
            else value + 0.005 * rng.standard_normal(value.shape).astype("f4")
            for name, value in base.items()
        }
        target = folder / label
        target.mkdir()
        arrays = {name: value.astype(ml_dtypes.bfloat16) for name, value in moved.items()}
        save_file(arrays, target / "model.safetensors")


MERGE = """
import json, resource, sys
import numpy, torch
from fusekit import merge, merge_state_dicts
recipe, out, threads, device = json.loads(sys.argv[1])
warm = [{"w": numpy.eye(4, 5, dtype="f4") * i} for i in range(3)]
merge_state_dicts(warm[1:], base=warm[0], method=recipe["merge_method"])
report = merge(recipe, out, threads=threads, device=device)
seconds = report.cpu_seconds if device == "cpu" else report.seconds
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def run_one(
    folder: Path,
    method: str,
    parameters: dict[str, Any],
    options: argparse.Namespace,
    shapes: dict[str, tuple[int, ...]],
    alone: tuple[float, float],
) -> None:
    """One line of the table; `alone` are the seconds of one decomposition per matrix."""
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"model{i}")} for i in range(MODELS)],
        "parameters": {"exclude": "embed", **parameters},
    }
    label = "-".join([method, *map(str, parameters.values())])
    given = json.dumps([recipe, str(folder / f"out-{label}"), options.threads, options.device])
    done = subprocess.run(
        [sys.executable, "-c", MERGE, given], capture_output=True, text=True, check=True
    )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    svd, eigh = (decompositions(method) * floor for floor in alone)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    bound = 6 * 4 * largest * MODELS / 1e6 + 500
    print(
        f"{label:14} {seconds:8.2f} {svd:8.2f} {seconds / svd:6.2f} {eigh:8.2f} "
        f"{seconds / eigh:6.2f} {peak:8.0f} {bound:9.0f}",
        flush=True,
    )


def decompositions(method: str) -> int:
    """Dense decompositions per matrix, those of polar factors included."""
    return {
        "tsv": MODELS + 2,
        "iso_c": 1,
        "iso_cts": MODELS + 3,
        "opcm": MODELS - 1,
        "wudi": 1,
    }[method]


def floors(shapes: dict[str, tuple[int, ...]], options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of every matrix decomposed once: thin SVDs, eigenproblems of the smaller side."""
    import torch

    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(shape, generator=generator).to(options.device)
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed" not in name
    ]
    grams = [(m if m.shape[0] <= m.shape[1] else m.T).double() for m in matrices]
    grams = [m @ m.T for m in grams]
    svd = _seconds(matrices, lambda m: torch.linalg.svd(m, full_matrices=False), options.device)
    eigh = _seconds(grams, torch.linalg.eigh, options.device)
    return svd, eigh


def _seconds(matrices: Iterable[Any], function: Callable[[Any], Any], device: str) -> float:
    import torch

    clock = time.process_time if device == "cpu" else time.perf_counter
    begun = clock()
    for matrix in matrices:
        function(matrix)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - begun


def compare_losses(shapes: dict[str, tuple[int, ...]]) -> None:
    """WUDI's loss after 300 Adam steps and in closed form, relative to that of the sum."""
    import torch

    from fusekit.methods.matrix import quadratic

    shape = next(s for n, s in shapes.items() if "up_proj" in n)
    generator = torch.Generator().manual_seed(0)
    deltas = [0.005 * torch.randn(shape, generator=generator).double() for _ in range(MODELS)]
    problem, start = quadratic.wudi_problem(deltas), quadratic.starting_point(deltas, "sum")
    begun = time.process_time()
    descended = quadratic.adam(problem, start)
    middle = time.process_time()
    solved = quadratic.closed_form(problem, start, quadratic.Spectral())
    end = time.process_time()
    slow, fast, before = middle - begun, end - middle, problem.loss(start)
    print(
        f"WUDI {shape}, loss over that of the sum: adam {problem.loss(descended) / before:.3g} in "
        f"{slow:.2f} s, closed form {problem.loss(solved) / before:.3g} in {fast:.2f} s "
        f"({slow / fast:.0f} x faster)"
    )


if __name__ == "__main__":
    main()
