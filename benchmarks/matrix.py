"""Time and memory of methods on whole matrices against the decompositions alone, in one run.

    python -m benchmarks.matrix --hidden 896 --intermediate 4864 --layers 24 --vocabulary 151936

Three floors per method, of random matrices of the shapes it decomposes; each shape is measured
once and counted as often as it occurs. `svd`: LAPACK's thin SVDs in float32. `triples`: the same
singular triples through Gram matrices in float64, as the methods find them, by NumPy alone. `eigh`:
of these only the eigenproblems. `ratio` is the whole merge, reading and writing included, over a
floor. Times are CPU seconds, of one thread by default, which other work on the machine disturbs
least; with --device they are seconds on the clock, and the floors are torch's. WUDI's closed form
is compared with its Adam form. Every merge runs in a process of its own, whose peak memory is held
against 6 x largest tensor (float32) x models + 500 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from fusekit.methods.matrix import quadratic
from fusekit.methods.matrix.iso import specific_directions

MODELS = 4
METHODS = ("tsv", "iso_c", "iso_cts", "opcm", "wudi")
FLOORS = ("svd", "triples", "eigh")
WITHOUT_EMBEDDINGS = ("opcm", "wudi")
"""Methods that leave embeddings alone unless told otherwise."""


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
        largest = max(map(math.prod, shapes.values()))
        total = sum(map(math.prod, shapes.values()))
        print(f"{total / 1e6:.1f} M parameters, {MODELS} models, largest {largest / 1e6:.2f} M")
        header = "".join(f" {name + ' s':>9} {'ratio':>6}" for name in FLOORS)
        print(f"{'method':10} {'merge s':>8}{header} {'peak MB':>8} {'bound MB':>9}")
        floors = Floors(options.device, options.threads)
        for method in options.methods:
            run_one(folder, method, {}, options, shapes, floors)
        if "wudi" in options.methods:
            run_one(folder, "wudi", {"solver": "adam"}, options, shapes, floors)
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
import json, sys
import ml_dtypes, numpy, torch
from fusekit import merge, merge_state_dicts
recipe, out, threads, device = json.loads(sys.argv[1])
warm = [{"w": (numpy.eye(4, 5) * i).astype(ml_dtypes.bfloat16)} for i in range(3)]
merge_state_dicts(warm[1:], base=warm[0], method=recipe["merge_method"])
report = merge(recipe, out, threads=threads, device=device)
seconds = report.cpu_seconds if device == "cpu" else report.seconds
print(json.dumps([seconds, report.peak_rss / 1e6]))
"""


def run_one(
    folder: Path,
    method: str,
    parameters: dict[str, Any],
    options: argparse.Namespace,
    shapes: dict[str, tuple[int, ...]],
    floors: Floors,
) -> None:
    """One line of the table."""
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"model{i}")} for i in range(MODELS)],
        "parameters": parameters,
    }
    out = folder / "out"
    given = json.dumps([recipe, str(out), options.threads, options.device])
    done = subprocess.run(
        [sys.executable, "-c", MERGE, given], capture_output=True, text=True, check=True
    )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    for made in (out, out.with_name("out.continual")):
        shutil.rmtree(made, ignore_errors=True)
    alone = dict.fromkeys(FLOORS, 0.0)
    for name, shape in shapes.items():
        if len(shape) == 2 and not (method in WITHOUT_EMBEDDINGS and "embed" in name):
            for decomposed in decompositions(method, shape):
                for floor, cost in zip(FLOORS, floors.of(decomposed), strict=True):
                    alone[floor] += cost
    bound = 6 * 4 * max(map(math.prod, shapes.values())) * MODELS / 1e6 + 500
    compared = "".join(f" {cost:9.2f} {seconds / cost:6.2f}" for cost in alone.values())
    label = "-".join([method, *map(str, parameters.values())])
    print(f"{label:10} {seconds:8.2f}{compared} {peak:8.0f} {bound:9.0f}", flush=True)


def decompositions(method: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Shapes of all that is decomposed to merge a matrix, the polar factors included."""
    rows, columns = shape
    rank = min(shape)
    polar = [(rows, rank), (columns, rank)]
    if method == "tsv":
        return [(rows, columns)] * MODELS + polar
    if method == "iso_cts":
        own = specific_directions(rank, MODELS, 0.8) * MODELS
        residual = (own, columns) if rows <= columns else (rows, columns)
        return [(rows, columns), *[residual] * MODELS, *polar]
    if method == "wudi":
        return [(MODELS * rows, columns)]
    return [(rows, columns)] * (MODELS - 1 if method == "opcm" else 1)


class Floors:
    """Seconds of decompositions by shape, measured once each."""

    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        threadpool_limits(threads, user_api="blas")
        self._device = device
        self._known: dict[tuple[int, int], tuple[float, ...]] = {}
        self._measured((64, 32))  # a library's first call is slow

    def of(self, shape: tuple[int, int]) -> tuple[float, ...]:
        """Of a thin SVD, of the same through a Gram matrix, and of the eigenproblem in that."""
        if shape not in self._known:
            self._known[shape] = self._measured(shape)
        return self._known[shape]

    def _measured(self, shape: tuple[int, int]) -> tuple[float, ...]:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        single, wide, eigh = self._numerics(matrix)
        if shape[0] < shape[1]:
            single, wide = single.T, wide.T
        gram = wide.T @ wide
        svd = self._seconds(lambda: torch.linalg.svd(matrix, full_matrices=False))
        squared = self._seconds(lambda: wide.T @ wide)
        solved = self._seconds(lambda: eigh(gram))
        applied = self._seconds(lambda: single @ single[: min(shape)])
        return svd, squared + solved + applied, solved

    def _numerics(self, matrix: torch.Tensor) -> tuple[Any, Any, Callable[[Any], Any]]:
        """The matrix in float32 and float64 and the eigensolver, of the faster library there is."""
        if self._device != "cpu":
            return matrix, matrix.double(), torch.linalg.eigh
        return matrix.numpy(), matrix.double().numpy(), np.linalg.eigh

    def _seconds(self, function: Callable[[], Any]) -> float:
        clock = time.process_time if self._device == "cpu" else time.perf_counter
        begun = clock()
        function()
        if self._device != "cpu":
            torch.cuda.synchronize()
        return clock() - begun


def compare_losses(shapes: dict[str, tuple[int, ...]]) -> None:
    """WUDI's loss after 300 Adam steps and in closed form, relative to that of the sum."""
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
