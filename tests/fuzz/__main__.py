"""`python -m tests.fuzz TARGET --seconds 60`: fuzz one target, with atheris where it is installed.

Without it bytes of the corpus are changed at random. Input that is neither read nor refused is
written to a file and the exception raised.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GUIDED = importlib.util.find_spec("atheris") is not None

if GUIDED:
    import atheris

    instrumented = atheris.instrument_imports(include=["fusekit"])
else:
    instrumented = contextlib.nullcontext()

with (
    instrumented
):  # only fusekit's own functions: instrumenting all of NumPy and numba takes minutes
    from tests.fuzz.targets import SEEDS, TARGETS


def guided(target: Callable[[bytes], None], seeds: list[bytes], seconds: int) -> None:
    """Coverage-guided, by atheris."""
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds):
            (Path(corpus) / str(i)).write_bytes(seed)
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", corpus], target)
        atheris.Fuzz()


def blind(target: Callable[[bytes], None], seeds: list[bytes], seconds: int) -> int:
    """Random changes of the corpus; how many inputs were tried."""
    chance = random.Random(time.time_ns())
    end = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < end:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            at, length = chance.randint(0, len(data)), chance.randint(0, 4)
            data[at : at + length] = chance.randbytes(chance.randint(0, 4))
        try:
            target(bytes(data))
        except BaseException:
            name = f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
            Path(name).write_bytes(data)
            print(f"input written to {name}", file=sys.stderr)
            raise
        tried += 1
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    target, seeds = TARGETS[arguments.target], SEEDS[arguments.target]
    if GUIDED:
        guided(target, seeds, arguments.seconds)
    else:
        print(f"{arguments.target}: {blind(target, seeds, arguments.seconds)} inputs")


if __name__ == "__main__":
    main()
