"""Models of the transformers library, loaded from a folder to be scored or fine-tuned."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusekit.errors import CheckpointError, FusekitError, MissingExtraError


def require_transformers(what: str) -> None:
    """Refuse early, and by the extra's name, where torch or transformers is absent.

    Raises:
        MissingExtraError: `what` cannot be done without them.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtraError(what, "torch") from None


def load_pretrained(kind: str, checkpoint: Path, dtype: str = "float32") -> Any:
    """A model in evaluation mode; nothing is fetched, no code of the folder is run.

    Args:
        kind: a class of transformers with `from_pretrained`, such as `AutoModelForCausalLM`.
        checkpoint: folder with config.json and weights.
        dtype: torch's name of a type, or `auto` for that of the checkpoint.

    Raises:
        CheckpointError: the folder cannot be loaded, or lacks weights of the architecture.
    """
    require_transformers("loading a transformers model")
    import transformers

    try:
        with quiet():
            model, info = getattr(transformers, kind).from_pretrained(
                checkpoint,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,  # None would ask whoever sits at the terminal
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        sentence = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint}: transformers cannot load it: {sentence}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{checkpoint}: {len(missing)} weights of {type(model).__name__} are missing, "
            f"the first is {missing[0]!r}"
        )
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor notes of transformers, for as long as the context lasts."""
    from transformers.utils import logging as notes

    verbosity, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity(logging.ERROR)
    notes.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        notes.set_verbosity(verbosity)
        if bars:
            notes.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums, and with them scores, do not depend on the number of processors.

    Models as small as those of the suites gain little from more.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, for an evaluator's identity.

    Raises:
        FusekitError: there is no such file.
    """
    if not path.is_file():
        raise FusekitError(f"{path}: no such file")
    return hashlib.sha256(path.read_bytes()).hexdigest()
