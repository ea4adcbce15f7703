"""Merges in processes of their own, so that CPU time and memory are their own.

Every one is forked from a worker that has the libraries loaded: a merge of small models would
otherwise be measured by how long Python, Numba and torch take to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fusekit.errors import FusekitError, RecipeError
from fusekit.memory import peak_memory, resident_memory

if TYPE_CHECKING:
    from fusekit.methods.base import Method

REHEARSED_SECONDS = 10.0
"""Merges of less CPU time are done twice and measured the second time, with kernels loaded."""


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a merge, and its memory in bytes at its peak, above that of the libraries."""

    cpu_seconds: float
    peak_bytes: int


class Workers:
    """The processes that merge: one for methods that need torch, one for all others.

    A context manager; leaving it ends them.
    """

    def __init__(self, threads: int | None = 1) -> None:
        self._made = {
            torch: MeasuredMerges(torch=torch, threads=threads) for torch in (False, True)
        }

    def of(self, method: Method) -> MeasuredMerges:
        """The worker for a method."""
        return self._made[method.matrix is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._made.values():
            worker.close()


class MeasuredMerges:
    """A worker that merges and measures, started when it is first needed.

    Args:
        torch: whether to load torch, for methods that merge whole matrices.
        threads: of every merge; on one, CPU seconds are seconds.
    """

    def __init__(self, *, torch: bool = False, threads: int | None = 1) -> None:
        self._command = [sys.executable, "-m", "fusekit.evaluate.measured_merge"]
        self._command += ["torch"] if torch else []
        self._threads = threads
        self._worker: subprocess.Popen[str] | None = None

    def merge(self, recipe: Mapping[str, Any], out: Path) -> Cost:
        """Merge a recipe into a new folder.

        Raises:
            FusekitError: what the merge raised, or that its process died.
        """
        order = {"recipe": dict(recipe), "out": str(out), "threads": self._threads}
        try:
            answer = json.loads(self._ask(json.dumps(order)) or '{"error": "the worker ended"}')
        except BaseException:
            self._kill()  # its answer must not be taken for that to the next order
            raise
        if "error" in answer:
            raise (RecipeError if answer.get("recipe") else FusekitError)(answer["error"])
        return Cost(**answer)

    def _ask(self, order: str) -> str:
        if self._worker is None:
            pipe = subprocess.PIPE
            self._worker = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        assert self._worker.stdin is not None and self._worker.stdout is not None
        try:
            self._worker.stdin.write(order + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:
            raise FusekitError("the worker ended") from None
        return self._worker.stdout.readline()

    def _kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self.close()

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            assert self._worker.stdin is not None and self._worker.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it ended before it was told to
                self._worker.stdin.close()
            self._worker.wait()
            self._worker.stdout.close()
            self._worker = None


def main() -> None:
    """The worker: an order per line of standard input, an answer per line of standard output."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    _load_libraries()
    if sys.argv[1:] == ["torch"]:
        import torch  # noqa: F401

        import fusekit.methods.matrix  # noqa: F401
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(answers, _answer(json.loads(line)))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            reason = f"the merge's process ended with {os.waitstatus_to_exitcode(status)}"
            os.write(answers, _line({"error": reason}))


def _load_libraries() -> None:
    """Everything a merge needs before its own kernels; no thread may run when merges are forked."""
    import numpy as np

    import fusekit.engine.run  # noqa: F401
    from fusekit import kernels
    from fusekit.methods import available

    available()
    row = np.zeros((1, 1), np.float32)
    kernels.stitch.mean_of_kept(row, row[0], np.empty_like(row[0]))  # starts Numba


def _answer(order: Mapping[str, Any]) -> bytes:
    try:
        cost = _measure(order["recipe"], Path(order["out"]), order["threads"])
    except FusekitError as error:
        return _line({"error": str(error), "recipe": isinstance(error, RecipeError)})
    return _line(asdict(cost))


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _measure(recipe: Mapping[str, Any], out: Path, threads: int | None) -> Cost:
    before = resident_memory()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        seconds = _merge(recipe, Path(folder) / out.name, threads)
        if seconds >= REHEARSED_SECONDS:
            for made in Path(folder).iterdir():
                made.rename(out.parent / made.name)
            return Cost(seconds, peak_memory() - before)
    seconds = _merge(recipe, out, threads)
    return Cost(seconds, peak_memory() - before)


def _merge(recipe: Mapping[str, Any], out: Path, threads: int | None) -> float:
    from fusekit.engine.run import merge

    began = time.process_time()
    merge(dict(recipe), out, threads=threads, resume=False)
    return time.process_time() - began


if __name__ == "__main__":
    main()
