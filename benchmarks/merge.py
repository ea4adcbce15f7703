"""Merge benchmarks: every method through the CLI in a fresh process, against copying the bytes.

    python -m benchmarks.merge --parameters 0.5e9 --models 3 --threads 2 --out bench-out

For every method the inputs it reads are first copied through a buffer (read all, write one output,
by as many threads), then merged; both costs are CPU seconds of user and system time. Start-up
(interpreter, imports, loading cached kernels) is measured by the same command on a tiny checkpoint
and reported apart.
Writes `results.json` and `results.md`, anew after every method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.checkpoints import write_family, write_sparse_family
from fusekit.errors import FusekitError, RecipeError, did_you_mean

COPY_BUFFER = 1 << 18

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 1.0}},
    "model_soups": {},
    "unival": {},
    "varm": {},
    "slerp": {"parameters": {"t": 0.4}},
    "nuslerp": {"parameters": {"weight": 1.0}},
    "multislerp": {"parameters": {"weight": 1.0}},
    "karcher": {},
    "model_stock": {},
    "task_arithmetic": {"parameters": {"weight": 1.0, "lambda": 0.4}},
    "task_arithmetic@lines": {
        "parameters": {"lambda": 0.4},
        "layer_scaling": {"method": "lines", "alpha": 0.2, "beta": 0.8},
    },
    "nearswap": {"parameters": {"t": 0.001}},
    "ram": {},
    "ramplus": {},
    "ramplus_tl": {},
    "dare_linear": {"parameters": {"weight": 1.0, "density": 0.5}},
    "dare_linear@inverse": {"parameters": {"density": 0.5, "rescale": "inverse"}},
    "dare_ties": {"parameters": {"weight": 1.0, "density": 0.5}},
    "ties": {"parameters": {"weight": 1.0, "density": 0.2}},
    "ties@model": {"parameters": {"density": 0.2}, "granularity": "model"},
    "breadcrumbs": {"parameters": {"density": 0.2, "weight": 1.0}},
    "breadcrumbs_ties": {"parameters": {"density": 0.2, "weight": 1.0}},
    "della": {"parameters": {"density": 0.5, "weight": 1.0}},
    "della_linear": {"parameters": {"density": 0.5, "weight": 1.0}},
    "sce": {"parameters": {"select_topk": 0.1}},
    "arcee_fusion": {},
    "widen": {},
    "pcb": {"parameters": {"ratio": 0.1}},
    "pcb@model": {"parameters": {"ratio": 0.1}, "granularity": "model"},
    "consensus": {},
    "tall_masks": {},
    "emr": {},
    "localize_and_stitch": {"parameters": {"density": 0.1}},
    "task_vectors": {
        "parameters": {"prune": "two_sided", "density": 0.2, "weighting": "energy"},
    },
    "passthrough": {},
}
"""Recipe settings per benchmark; `method@label` runs a method under other settings."""


PEER = {
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "task_arithmetic",
    "nearswap", "dare_linear", "dare_ties", "ties", "breadcrumbs", "della", "sce", "arcee_fusion",
    "passthrough",
}  # fmt: skip
"""What mergekit-yaml has under the same name."""


@dataclass(frozen=True)
class Cost:
    """What one process used: seconds and bytes."""

    wall: float
    user: float
    system: float
    peak_rss: int

    @property
    def cpu(self) -> float:
        return self.user + self.system


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    models: int
    merge: Cost
    start_up: Cost
    copy: Cost

    @property
    def cpu(self) -> float:
        """CPU seconds of the merge without start-up."""
        return max(self.merge.cpu - self.start_up.cpu, 0.0)

    @property
    def user(self) -> float:
        """The part of a merge's CPU seconds that its own code took."""
        return max(self.merge.user - self.start_up.user, 0.0)

    @property
    def system(self) -> float:
        """The part that the kernel took for its files and memory."""
        return max(self.merge.system - self.start_up.system, 0.0)

    @property
    def ratio(self) -> float:
        return self.cpu / self.copy.cpu

    def as_dict(self) -> dict[str, Any]:
        """All figures, those of the table included."""
        derived = {key: getattr(self, key) for key in ("cpu", "user", "system", "ratio")}
        return {**asdict(self), **derived}


def run_measured(command: list[str], errors: int | None = None) -> Cost:
    """Run a command to its end and read its usage from the kernel; `errors` is for its stderr."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with status {process.returncode}: {' '.join(command)}")
    wall = time.monotonic() - begun
    return Cost(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024)


def copy_cost(inputs: list[Path], out: Path, threads: int = 1) -> Cost:
    """Read all inputs and write one output of the size of one of them, by as many threads."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    out.unlink(missing_ok=True)
    fds = [os.open(path, os.O_RDONLY) for path in inputs]
    target = os.open(out, os.O_WRONLY | os.O_CREAT)
    size = os.fstat(fds[0]).st_size

    def copy(thread: int) -> None:
        buffer = memoryview(bytearray(COPY_BUFFER))
        for offset in range(thread * COPY_BUFFER, size, threads * COPY_BUFFER):
            for fd in fds:
                os.preadv(fd, [buffer], offset)
            os.pwrite(target, buffer[: min(COPY_BUFFER, size - offset)], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, range(threads)))
    for fd in (*fds, target):
        os.close(fd)
    after = resource.getrusage(resource.RUSAGE_SELF)
    out.unlink()
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Cost(time.monotonic() - begun, user, system, after.ru_maxrss * 1024)


def check_names(names: list[str], tiny: Path, models: int) -> None:
    """Refuse benchmarks that do not exist or cannot run, before the first one takes its time.

    Raises:
        FusekitError: a name that is neither in SETTINGS nor a method, or a method that plans no
            merge of the models there are.
    """
    import fusekit

    for name in names:
        if name not in SETTINGS and name not in fusekit.methods.available():
            known = {*SETTINGS, *fusekit.methods.available()}
            raise RecipeError(f"unknown benchmark {name!r}{did_you_mean(name, known)}")
        recipe, _ = recipe_for(name, tiny, models)
        try:
            fusekit.plan(recipe).close()
        except FusekitError as error:
            raise FusekitError(f"benchmark {name!r}: {error}") from None


def recipe_for(name: str, family: Path, models: int) -> tuple[dict[str, Any], list[Path]]:
    """The recipe of a benchmark and the folders it reads."""
    from fusekit.methods import find

    method = find(name.partition("@")[0])
    count = models if method.max_models is None else min(models, method.max_models)
    if method.base == "first" and method.max_models == 2:
        count = 1
    folders = [family / f"model{i}" for i in range(count)]
    recipe: dict[str, Any] = {"merge_method": method.name, **SETTINGS.get(name, {})}
    if method.base == "origin" or (method.base == "first" and method.max_models != 1):
        recipe["base_model"] = str(family / "base")
        read = [family / "base", *folders]
    else:
        read = folders
    recipe["models"] = [{"model": str(folder)} for folder in folders]
    return recipe, read


def merge_cost(recipe: dict[str, Any], work: Path, threads: int) -> Cost:
    """One merge through the command line in a fresh process."""
    path, out = work / "recipe.yml", work / "out"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "fusekit", "merge", str(path), str(out), "--no-resume"]
    cost = run_measured([*command, "--threads", str(threads)])
    shutil.rmtree(out)
    return cost


def measure(
    name: str, family: Path, tiny: Path, work: Path, models: int, threads: int, repeat: int
) -> Row:
    """All costs of one benchmark; the tiny run also warms the kernel cache."""
    recipe, read = recipe_for(name, family, models)
    small, _ = recipe_for(name, tiny, models)
    merge_cost(small, work, threads)
    start_ups = [merge_cost(small, work, threads) for _ in range(3)]
    start_up = min(start_ups, key=lambda cost: cost.cpu)
    files = [folder / "model.safetensors" for folder in read]
    copies, merges = [], []
    for _ in range(repeat):  # in turn, so that both meet the same state of the machine
        # What the last output occupied is given back to a virtual machine's host within seconds,
        # and costs time when it is touched again: nobody starts earlier than a merge does.
        time.sleep(start_up.wall)
        copies.append(copy_cost(files, work / "copy.bin", threads))
        merges.append(merge_cost(recipe, work, threads))
    best = min(merges, key=lambda cost: cost.cpu)
    return Row(name, len(read), best, start_up, min(copies, key=lambda cost: cost.cpu))


def peer_cost(recipe: dict[str, Any], small: dict[str, Any], work: Path) -> float:
    """CPU seconds of the same recipe through mergekit-yaml, without its start-up."""
    merge, start_up = _run_peer(recipe, work), _run_peer(small, work)
    return merge.cpu - start_up.cpu


def _run_peer(recipe: dict[str, Any], work: Path) -> Cost:
    path, out = work / "peer.yml", work / "peer"
    path.write_text(yaml.safe_dump({**recipe, "dtype": "bfloat16"}), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    command = ["mergekit-yaml", str(path), str(out), "--no-copy-tokenizer"]
    cost = run_measured(command, subprocess.DEVNULL)
    shutil.rmtree(out)
    return cost


def table(rows: list[Row], peers: dict[str, float], about: str) -> str:
    """The results as a Markdown table."""
    lines = [
        about,
        "",
        "| method | models read | copy CPU s | merge CPU s | user | system | ratio | wall s "
        "| peak MB | start-up CPU s |" + (" peer CPU s |" if peers else ""),
        "|---|---|---|---|---|---|---|---|---|---|" + ("---|" if peers else ""),
    ]
    for row in rows:
        peer = f" {peers[row.name]:.1f} |" if row.name in peers else " - |" if peers else ""
        lines.append(
            f"| {row.name} | {row.models} | {row.copy.cpu:.2f} | {row.cpu:.2f} | {row.user:.2f} | "
            f"{row.system:.2f} | {row.ratio:.2f} | {row.merge.wall:.2f} | "
            f"{row.merge.peak_rss / 1e6:.0f} | {row.start_up.cpu:.2f} |{peer}"
        )
    return "\n".join(lines) + "\n"


def write_results(rows: list[Row], peers: dict[str, float], about: str, out: Path) -> str:
    """`results.md`, which is returned, and `results.json`; either is old or new, never half."""
    text = table(rows, peers, about)
    content = {"about": about, "rows": [row.as_dict() for row in rows], "peers": peers}
    written = {"results.md": text, "results.json": json.dumps(content, indent=2)}
    for name, content_of in written.items():
        draft = out / f"{name}.new"
        draft.write_text(content_of, encoding="utf-8")
        draft.replace(out / name)
    return text


def checkpoints(out: Path, parameters: float, models: int, sparse: bool = False) -> Path:
    """The folder of a family of that size, written unless it is there."""
    kind = "sparse" if sparse else "dense"
    family = out / (f"{kind}-{parameters / 1e6:.0f}M-{models}" if parameters else f"tiny-{models}")
    if not family.exists():
        draft = family.with_name(f"{family.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        write = write_sparse_family if sparse else write_family
        write(draft, parameters, models)
        draft.rename(family)
    return family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=_positive(float), default=0.5e9)
    parser.add_argument("--models", type=_positive(int), default=3)
    parser.add_argument("--threads", type=_positive(int), default=2)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), metavar="METHOD")
    parser.add_argument(
        "--repeat",
        type=_positive(int),
        default=3,
        help="copies and merges, in turn, of which the best count",
    )
    parser.add_argument("--sparse", action="store_true", help="files without blocks on disk")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()

    tiny = checkpoints(options.out, 0, options.models)
    try:
        check_names(options.methods, tiny, options.models)
    except FusekitError as error:
        parser.error(str(error))
    family = checkpoints(options.out, options.parameters, options.models, options.sparse)
    size = (family / "model0" / "model.safetensors").stat().st_size
    about = (
        f"{options.models} models (+ base where the method has one), {size / 1e9:.2f} GB each, "
        f"bfloat16, {options.threads} threads, {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}."
    )
    rows: list[Row] = []
    peers: dict[str, float] = {}
    for name in options.methods:
        row = measure(
            name, family, tiny, options.out, options.models, options.threads, options.repeat
        )
        rows.append(row)
        write_results(rows, peers, about, options.out)
        print(f"{name}: {row.ratio:.2f} x copying, {row.merge.peak_rss / 1e6:.0f} MB", flush=True)
        if name in PEER and shutil.which("mergekit-yaml"):
            recipe, _ = recipe_for(name, family, options.models)
            small, _ = recipe_for(name, tiny, options.models)
            try:
                peers[name] = peer_cost(recipe, small, options.out)
            except SystemExit as failure:
                print(failure, flush=True)
                continue
            print(f"{name}: {row.cpu:.2f} CPU s, mergekit {peers[name]:.2f}", flush=True)
    print(write_results(rows, peers, about, options.out))


def _positive(kind: type[float]) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    return positive


if __name__ == "__main__":
    main()
