"""Images for the vision suite: MNIST's idx files, photographs in a zip, the embedded digits.

They are read once, when the suite is built; `Images` is what the suite's folder keeps.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.errors import FusekitError, MissingExtraError
from fusekit.evaluate import digits
from fusekit.evaluate.checkpoints import read_tensor

PHOTO_SIZE = 32
SPLITS = ("train", "validation", "test")
KINDS = ("numerals", "photos", "digits")

ORIGIN = (
    "numerals: MNIST (Y. LeCun, C. Cortes, C. J. C. Burges), idx files; "
    "photos: a subset of CIFAR-10 (A. Krizhevsky), JPEG in a zip; "
    "digits: Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak)"
)


@dataclass(frozen=True)
class Images:
    """Images of one kind in one split: `[n, height, width]` or `[n, height, width, 3]`, bytes."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of a gzipped idx file of unsigned bytes.

    Raises:
        FusekitError: not such a file, or one that is cut short.
    """
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise FusekitError(f"{path}: cannot be read: {error}") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise FusekitError(
            f"{path}: begins with {raw[:4].hex()}, expected 000008 (idx, unsigned bytes)"
        )
    begin = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, begin, 4)]
    if len(raw) != begin + math.prod(shape):
        raise FusekitError(
            f"{path}: holds {len(raw) - begin} values, expected {math.prod(shape)} for {shape}"
        )
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape)


def read_photos(path: Path) -> dict[str, dict[str, NDArray[np.uint8]]]:
    """`part -> class -> [n, 32, 32, 3]` of a zip with files `part/class/name.jpg`, in their order.

    Raises:
        FusekitError: not a zip, no photographs in it, or one that cannot be decoded.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingExtraError("reading photographs", "evaluate") from None
    found: dict[str, dict[str, list[NDArray[np.uint8]]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                part, _, rest = name.partition("/")
                kind, _, file = rest.partition("/")
                if not file.lower().endswith((".jpg", ".jpeg")):
                    continue
                with Image.open(io.BytesIO(archive.read(name)), formats=["JPEG"]) as image:
                    photo = image.convert("RGB").resize((PHOTO_SIZE, PHOTO_SIZE))
                found.setdefault(part, {}).setdefault(kind, []).append(np.asarray(photo))
    except (OSError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise FusekitError(f"{path}: cannot be read: {error}") from None
    if not found:
        raise FusekitError(f"{path}: holds no part/class/name.jpg")
    return {
        part: {kind: np.stack(each) for kind, each in classes.items()}
        for part, classes in found.items()
    }


def prepare(data: Path | None, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Everything the suite needs of a data folder, as `kind.split.pixels` and `kind.split.labels`.

    Raises:
        FusekitError: no folder given, or a file that is absent or unreadable.
    """
    if data is None:
        raise FusekitError(
            "suite 'vision' needs --data: a folder with MNIST's *-images-idx3-ubyte.gz and "
            "*-labels-idx1-ubyte.gz, and a zip of photographs (train/<class>/*.jpg, "
            "test/<class>/*.jpg, CIFAR-10's classes)"
        )
    generator = np.random.default_rng(seed)
    parts = {"numerals": _numerals(data, generator), "photos": _photos(data, generator)}
    parts["digits"] = {
        split: Images(
            np.round(known.images * 255).astype(np.uint8).reshape(-1, 8, 8),
            known.labels[digits.PRETRAINING_TASK],
        )
        for split in SPLITS
        for known in [digits.examples(split)]
    }
    return {
        f"{kind}.{split}.{field}": getattr(images, field)
        for kind, splits in parts.items()
        for split, images in splits.items()
        for field in ("pixels", "labels")
    }


class ImageFile:
    """What `prepare` gave, in a safetensors file: read kind by kind.

    Raises:
        FusekitError: the file is absent or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = SafetensorsFile(path)
        for kind in KINDS:
            if f"{kind}.test.pixels" not in self._file.tensors:
                raise FusekitError(f"{path}: holds no {kind}, expected the images of the suite")

    def images(self, kind: str, split: str) -> Images:
        """All images of a kind and split, in a fixed order."""
        pixels, labels = (
            read_tensor(self._file, f"{kind}.{split}.{field}") for field in ("pixels", "labels")
        )
        return Images(pixels, labels)


def _one(data: Path, pattern: str) -> Path:
    found = sorted(data.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FusekitError(f"{data}: expected one file {pattern}, found {names}")
    return found[0]


def _numerals(data: Path, generator: np.random.Generator) -> dict[str, Images]:
    """MNIST's 10,000 test images (or as many as there are), split 7 : 1 : 2."""
    images = read_idx(path := _one(data, "*-images-idx3-ubyte.gz"))
    labels = read_idx(_one(data, "*-labels-idx1-ubyte.gz"))
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise FusekitError(
            f"{path}: found images {list(images.shape)} and labels {list(labels.shape)}, "
            "expected [n, 28, 28] and [n]"
        )
    order = generator.permutation(len(images))
    return _split(images[order], labels[order], (0.7, 0.8))


def _photos(data: Path, generator: np.random.Generator) -> dict[str, Images]:
    """The zip's `test` as it is, a tenth of its `train` for validation."""
    found = read_photos(path := _one(data, "*.zip"))
    for part in ("train", "test"):
        names = sorted(found.get(part, {}))
        if names != sorted(PHOTO_CLASSES):
            raise FusekitError(
                f"{path}: {part} holds the classes {', '.join(names) or 'none'}, "
                f"expected {', '.join(PHOTO_CLASSES)}"
            )
    pixels, labels = _stacked(found["train"])
    order = generator.permutation(len(labels))
    splits = _split(pixels[order], labels[order], (0.9, 1.0))
    pixels, labels = _stacked(found["test"])
    order = generator.permutation(len(labels))
    return {**splits, "test": Images(pixels[order], labels[order])}


PHOTO_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def _stacked(classes: dict[str, NDArray[np.uint8]]) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = [np.full(len(classes[c]), i, np.uint8) for i, c in enumerate(PHOTO_CLASSES)]
    return np.concatenate([classes[c] for c in PHOTO_CLASSES]), np.concatenate(labels)


def _split(pixels: NDArray[Any], labels: NDArray[Any], at: Sequence[float]) -> dict[str, Images]:
    edges = [round(share * len(labels)) for share in at]
    return {
        split: Images(*both)
        for split, *both in zip(
            SPLITS, np.split(pixels, edges), np.split(labels, edges), strict=True
        )
    }
