"""Merging and extracting adapters: seconds and peak memory on 7B shapes.

    python benchmarks/adapters.py merge [--targets all|attention] [--method svd ...] [--runs 3]
    python benchmarks/adapters.py extract [--size 2048]

Every merge runs in a process of its own, from files to files, so that its peak memory is its own;
its times are those of the whole process, start-up included. Of several runs the least time and the
largest memory count. Floating-point operations are those of matrix products and decompositions, by
their usual counts (Golub and Van Loan, "Matrix Computations").
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32
ATTENTION = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
ALL_LINEAR = {
    **ATTENTION,
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
TARGETS = {
    "qv": {name: ATTENTION[name] for name in ("self_attn.q_proj", "self_attn.v_proj")},
    "attention": ATTENTION,
    "all": ALL_LINEAR,
}
DENSITY = {
    "ties": 0.5,
    "dare_linear": 0.5,
    "dare_ties": 0.5,
    "magnitude_prune": 0.5,
    "knots_ties": 0.5,
    "knots_linear": 0.5,
    "knots_dare_ties": 0.5,
}

METHODS = [
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "lora_lego",
    "knots_linear",
    "knots_ties",
    "knots_dare_ties",
]
COORDINATE_PASSES = {"knots_linear": 2, "knots_ties": 3, "knots_dare_ties": 2}
"""How often the coordinates of all layers are computed, a sample of one column in 16 aside: to
count magnitudes, to find the majority sign, to merge."""


def write_adapters(folder: Path, targets: str, count: int, rank: int) -> list[Path]:
    """Random bfloat16 adapters of a 7B-shaped base."""
    import ml_dtypes
    import numpy as np

    from fusekit.adapters import AdapterWriter, LoraModule

    folders = []
    for index in range(count):
        rng = np.random.default_rng(index)
        path = folder / f"adapter{index}"
        with AdapterWriter(path, {"task_type": "CAUSAL_LM"}) as writer:
            for layer in range(LAYERS):
                for name, (rows, columns) in TARGETS[targets].items():
                    A = rng.standard_normal((rank, columns), dtype=np.float32)
                    B = rng.standard_normal((rows, rank), dtype=np.float32)
                    writer.add(
                        LoraModule(
                            f"model.layers.{layer}.{name}.weight",
                            A.astype(ml_dtypes.bfloat16),
                            B.astype(ml_dtypes.bfloat16),
                            alpha=2.0 * rank,
                        )
                    )
        folders.append(path)
    return folders


def run_merge(method: str, folders: list[str], out: str) -> dict[str, Any]:
    """One merge, files to files; called in a process of its own."""
    from fusekit.adapters import MergeOptions, load_adapter, merge_adapters, write_adapter

    options = MergeOptions(density=DENSITY.get(method))
    write_adapter(merge_adapters([load_adapter(f) for f in folders], method, options=options), out)
    used = resource.getrusage(resource.RUSAGE_SELF)
    from fusekit.memory import peak_memory

    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_mb": peak_memory() / 2**20}


def core_flops(rows: int, columns: int, stacked: int, rank: int) -> float:
    """Of the textbook route for one module: thin QR of both stacked factors, SVD of the core."""
    qr = sum(4 * side * stacked**2 - 4 / 3 * stacked**3 for side in (rows, columns))
    return qr + 2 * stacked**3 + 22 * stacked**3 + 2 * (rows + columns) * stacked * rank


def method_flops(method: str, rows: int, columns: int, stacked: int, rank: int) -> float | None:
    """Of what is done instead, for the methods that decompose."""
    small = stacked**3 / 3 + 4 * stacked**3 + 9 * stacked**3  # Cholesky, products, eigenvectors
    if method == "svd":
        gram = (rows + columns) * stacked**2
        solve = 2 / 3 * stacked**3 + 2 * stacked**2 * rank
        return gram + small + solve + 2 * (rows + columns) * stacked * rank
    if method in COORDINATE_PASSES:
        gram = rows * stacked**2 + columns * stacked * rank
        sampled = 0 if method == "knots_dare_ties" else 1 / 16
        coordinates = (COORDINATE_PASSES[method] + sampled) * 2 * columns * stacked**2
        return gram + small + 2 * stacked**3 + 2 * rows * stacked**2 + coordinates
    return None


def core_seconds(folders: list[Path]) -> float:
    """Processor time of the textbook route and nothing else: thin QR of every module's stacked
    factors and an SVD of the small matrix between them, in float32 on one thread."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    from fusekit.adapters import load_adapter
    from fusekit.adapters.adapter import to_float32

    adapters = [load_adapter(folder) for folder in folders]
    seconds = 0.0
    with threadpool_limits(1, user_api="blas"):
        for name in [name for name in adapters[0].modules if ".layers.0." in name]:
            modules = [adapter.modules[name] for adapter in adapters]
            A = np.concatenate([to_float32(module.A) for module in modules])
            B = np.concatenate([to_float32(module.B) for module in modules], axis=1)
            start = time.process_time()
            q_b, r_b = np.linalg.qr(B)
            q_a, r_a = np.linalg.qr(A.T)
            u, _, vt = np.linalg.svd(r_b @ r_a.T)
            rank = modules[0].rank
            q_b @ u[:, :rank], q_a @ vt[:rank].T
            seconds += time.process_time() - start
    return seconds * LAYERS


def benchmark_merge(targets: str, methods: list[str], count: int, rank: int, runs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = write_adapters(folder, targets, count, rank)
        size = sum((f / "adapter_model.safetensors").stat().st_size for f in folders) / 1e6
        print(f"{count} adapters of rank {rank}, {targets} targets, {size:.0f} MB in all")
        core = core_seconds(folders)
        shapes = [(*shape, count * rank, rank) for shape in TARGETS[targets].values()]
        core_work = sum(core_flops(*shape) for shape in shapes)
        print(
            f"  thin QR and SVD of the stacked factors alone: {core:.2f} s of processor time, "
            f"{core_work * LAYERS / 1e9:.0f} Gflop"
        )
        for method in methods:
            request = json.dumps([method, [str(f) for f in folders], str(folder / "out")])
            results = []
            for _ in range(runs):
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, __file__, "one", request],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                seconds = time.perf_counter() - start
                results.append({"seconds": seconds, **json.loads(done.stdout)})
                shutil.rmtree(folder / "out")
            work = [method_flops(method, *shape) for shape in shapes]
            share = sum(flops for flops in work if flops is not None) / core_work
            print(
                f"  {method:16} {min(result['seconds'] for result in results):6.2f} s   "
                f"{min(result['cpu_seconds'] for result in results):6.2f} s of processor time   "
                f"peak {max(result['peak_mb'] for result in results):5.0f} MB"
                + (f"   {share:4.2f} of the QRs' flops" if share else "")
            )


def benchmark_extract(size: int, rank: int) -> None:
    """Randomized against full SVD of one matrix on one thread, on spectra of several kinds."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    from fusekit.adapters.linalg import exact_svd, randomized_svd

    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((size, size)))[0]
    v = np.linalg.qr(rng.standard_normal((size, size)))[0]
    index = np.arange(size)
    spectra = {
        "1/j decay": 1 / (1 + index),
        "exponential decay": np.exp(-index / rank),
        "noisy rank 16": np.where(index < 16, 1.0, 0.02),
        "flat to 2 x rank": np.where(index < 2 * rank, 1.0, 0.0),
    }
    print(f"{size} x {size}, rank {rank}")
    for label, spectrum in spectra.items():
        matrix = ((u * spectrum) @ v.T).astype(np.float32)
        with threadpool_limits(1, user_api="blas"):
            start = time.process_time()
            best = exact_svd(matrix, rank)
            full_seconds = time.process_time() - start
            start = time.process_time()
            rough = randomized_svd(matrix, rank)
            seconds = time.process_time() - start
        errors = [np.linalg.norm(matrix - (d.U * d.S) @ d.Vt) for d in (best, rough)]
        print(
            f"  {label:18} full {full_seconds:6.2f} s   randomized {seconds:6.3f} s   "
            f"{full_seconds / seconds:5.0f} x faster   residual {errors[1] / errors[0] - 1:+.2%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge")
    merge.add_argument("--targets", choices=TARGETS, default="all")
    merge.add_argument("--method", nargs="+", default=METHODS)
    merge.add_argument("--count", type=int, default=8)
    merge.add_argument("--rank", type=int, default=16)
    merge.add_argument("--runs", type=int, default=3)
    extract = commands.add_parser("extract")
    extract.add_argument("--size", type=int, default=2048)
    extract.add_argument("--rank", type=int, default=32)
    one = commands.add_parser("one")
    one.add_argument("request")
    arguments = parser.parse_args()
    if arguments.command == "merge":
        benchmark_merge(
            arguments.targets, arguments.method, arguments.count, arguments.rank, arguments.runs
        )
    elif arguments.command == "extract":
        benchmark_extract(arguments.size, arguments.rank)
    else:
        print(json.dumps(run_merge(*json.loads(arguments.request))))


if __name__ == "__main__":
    main()
