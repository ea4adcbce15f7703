"""What an adapter folder says of its making: manifest.json and the model card README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fusekit.checkpoint.hub import is_hub_reference
from fusekit.engine.checksum import ALGORITHM

CARD = "README.md"

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Provenance:
    """How an adapter was made.

    Attributes:
        title: of the card.
        text: paragraphs of the card on what was done.
        record: what manifest.json holds of it, such as `{"recipe": ...}`.
        inputs: what pins every input: a reference, and sizes and hashes.
        tags: of the card, beside those of every adapter.
        citations: publications.
    """

    title: str
    text: str
    record: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    tags: Sequence[str] = ()
    citations: Sequence[str] = ()

    def manifest(self, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The manifest of a folder with these tensors, as `fusekit verify` reads it."""
        from fusekit import __version__
        from fusekit.engine.manifest import FORMAT

        return {
            "format": FORMAT,
            "fusekit": __version__,
            **self.record,
            "inputs": list(self.inputs),
            "checksum": ALGORITHM,
            "tensors": dict(tensors),
        }

    def card(self, base: str | None) -> str:
        """The card in the hub's format; `base` is the model the adapter is for."""
        import yaml

        from fusekit import __version__

        matter: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "fusekit", *self.tags]}
        if base is not None and is_hub_reference(base) and not Path(base).exists():
            matter = {"base_model": base, "base_model_relation": "adapter", **matter}
        record = yaml.safe_dump(dict(self.record), sort_keys=False, allow_unicode=True)
        parts = [
            f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---",
            f"# {self.title}",
            f"A LoRA adapter{f' for `{base}`' if base else ''}, made with fusekit {__version__}.",
            self.text,
            "## Made from",
            "\n".join(f"- `{each['reference']}`" for each in self.inputs),
            "## How",
            f"```yaml\n{record}```",
            "`manifest.json` holds the identity of every input and the checksum of every tensor; "
            "`fusekit verify` compares them with this folder.",
        ]
        if self.citations:
            parts += ["## Citations", "\n".join(f"- {each}" for each in self.citations)]
        return "\n\n".join(parts) + "\n"


def short_name(reference: str) -> str:
    """The last part of a path or of a hub id."""
    return reference.rstrip("/").rpartition("/")[2]


def file_identities(reference: str, files: Sequence[Path]) -> dict[str, Any]:
    """What pins an input of a few small files: their sizes and hashes."""
    return {
        "reference": reference,
        "files": {
            file.name: {"size": file.stat().st_size, "xxh3_128": _digest(file)} for file in files
        },
    }


def adapter_files(folder: Path) -> list[Path]:
    """The files an adapter consists of."""
    if folder.is_file():
        return [folder]
    return sorted(path for path in folder.glob("adapter_*") if path.is_file())


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


_PEFT = "PEFT's `add_weighted_adapter`, https://huggingface.co/docs/peft"
_TIES = "TIES-Merging: Resolving Interference When Merging Models (arXiv 2306.01708)"
_DARE = (
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch "
    "(arXiv 2311.03099)"
)
_LEGO = (
    "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise "
    "Clustering (arXiv 2409.16167)"
)
_KNOTS = "Model merging with SVD to tie the Knots (arXiv 2410.19735)"

_ENTRIES = {
    "magnitude_prune": "the entries of largest magnitude",
    "ties": "the entries of largest magnitude that agree with the elected sign",
    "dare_linear": "random entries, rescaled",
    "dare_ties": "random entries, rescaled, that agree with the elected sign",
}


def merge_method_text(method: str) -> str:
    """One sentence on a method of merging adapters."""
    known = {
        "cat": "Factors side by side: exactly the weighted sum of the updates.",
        "svd": "The weighted sum of the updates, cut to its best approximation of low rank.",
        "linear": "Weighted sums of the factors A and of the factors B.",
        "lora_lego": "Rank-one pieces of all adapters, clustered; the centres are the result.",
        "knots_linear": "The weighted sum of the updates in a basis they share.",
        "knots_ties": "Updates in a basis they share; entries that agree with the elected sign.",
        "knots_dare_ties": "Updates in a basis they share; random entries that agree in sign.",
    }
    if method in known:
        return known[method]
    entries = _ENTRIES[method.removesuffix("_svd")]
    if method.endswith("_svd"):
        return f"Sums of the updates over {entries}, cut to low rank."
    return f"Sums of the factors A and of the factors B over {entries}."


def merge_citations(method: str) -> list[str]:
    """Publications behind a method of merging adapters."""
    found = []
    if method.startswith("knots"):
        found.append(_KNOTS)
    if method == "lora_lego":
        found.append(_LEGO)
    if "ties" in method:
        found.append(_TIES)
    if "dare" in method:
        found.append(_DARE)
    return found or [_PEFT]
