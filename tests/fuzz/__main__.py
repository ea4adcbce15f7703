"""`python -m tests.fuzz TARGET --seconds 60`: fuzz one target, with atheris where it is installed.

Half of the changes are to bytes, half to the structure of documents. Without atheris they are made
at random. Input that is neither read nor refused is written to a file and the exception raised.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GUIDED = importlib.util.find_spec("atheris") is not None

if GUIDED:
    import atheris

    instrumented = atheris.instrument_imports(include=["fusekit"])
else:
    instrumented = contextlib.nullcontext()

with (
    instrumented
):  # only fusekit's own functions: instrumenting all of NumPy and numba takes minutes
    from tests.fuzz.structured import DOCUMENTS, as_bytes, changed
    from tests.fuzz.targets import SEEDS, TARGETS


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Atheris' own changes of bytes, or one of a document's structure."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            made = as_bytes(changed(json.loads(data), chance))
            if len(made) <= most:
                return made
    own: bytes = atheris.Mutate(data, len(data))
    return own


def guided(target: Callable[[bytes], None], seeds: list[bytes], seconds: int) -> None:
    """Coverage-guided, by atheris."""
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds):
            (Path(corpus) / str(i)).write_bytes(seed)
        options = [sys.argv[0], f"-max_total_time={seconds}", corpus]
        atheris.Setup(options, target, custom_mutator=mutated)
        atheris.Fuzz()


def blind(
    target: Callable[[bytes], None], seeds: list[bytes], documents: list[Any], seconds: int
) -> int:
    """Random changes of the corpus; how many inputs were tried."""
    chance = random.Random(time.time_ns())
    end = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < end:
        if documents and chance.random() < 0.5:
            data = bytearray(as_bytes(changed(chance.choice(documents), chance)))
        else:
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
        tried = blind(target, seeds, DOCUMENTS.get(arguments.target, []), arguments.seconds)
        print(f"{arguments.target}: {tried} inputs")


if __name__ == "__main__":
    main()
