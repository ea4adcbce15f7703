"""LoRA adapters: read, write, merge, extract, compress, share.

Merge two adapters at rank 16 and write what PEFT loads:

>>> from fusekit.adapters import MergeOptions, load_adapter, merge_adapters, write_adapter
>>> sources = [load_adapter("maths"), load_adapter("code")]  # doctest: +SKIP
>>> merged = merge_adapters(sources, "svd", [0.5, 0.5], MergeOptions(rank=16))  # doctest: +SKIP
>>> write_adapter(merged, "both")  # doctest: +SKIP

Names load on first use; those of parameter sharing (MoS, Polyhistor) need PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusekit.adapters.adapter import Adapter, LoraModule
    from fusekit.adapters.extract import ExtractOptions, ExtractReport, extract_adapter
    from fusekit.adapters.info import AdapterInfo, Overlap, compare_adapters, describe_adapter
    from fusekit.adapters.lego import LegoOptions
    from fusekit.adapters.merge import METHODS, MergeOptions, merge_adapters
    from fusekit.adapters.mos import MosConfig, attach_mos, export_mos, load_mos, save_mos
    from fusekit.adapters.peft_format import adapter_from_tensors, load_adapter
    from fusekit.adapters.peft_writer import AdapterWriter, write_adapter
    from fusekit.adapters.polyhistor import (
        PolyhistorConfig,
        attach_polyhistor,
        load_polyhistor,
        save_polyhistor,
    )
    from fusekit.adapters.provenance import Provenance
    from fusekit.adapters.recipe import AdapterPlan, plan_adapters
    from fusekit.adapters.reversible import (
        Pack,
        PackReport,
        open_pack,
        pack_adapters,
        truncate_adapter,
    )

_HOMES = {
    "Adapter": "adapter",
    "AdapterInfo": "info",
    "AdapterPlan": "recipe",
    "AdapterWriter": "peft_writer",
    "ExtractOptions": "extract",
    "ExtractReport": "extract",
    "LegoOptions": "lego",
    "LoraModule": "adapter",
    "METHODS": "merge",
    "MergeOptions": "merge",
    "MosConfig": "mos",
    "Overlap": "info",
    "Pack": "reversible",
    "PackReport": "reversible",
    "PolyhistorConfig": "polyhistor",
    "Provenance": "provenance",
    "adapter_from_tensors": "peft_format",
    "attach_mos": "mos",
    "attach_polyhistor": "polyhistor",
    "compare_adapters": "info",
    "describe_adapter": "info",
    "export_mos": "mos",
    "extract_adapter": "extract",
    "load_adapter": "peft_format",
    "load_mos": "mos",
    "load_polyhistor": "polyhistor",
    "merge_adapters": "merge",
    "open_pack": "reversible",
    "pack_adapters": "reversible",
    "plan_adapters": "recipe",
    "save_mos": "mos",
    "save_polyhistor": "polyhistor",
    "truncate_adapter": "reversible",
    "write_adapter": "peft_writer",
}

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterInfo",
    "AdapterPlan",
    "AdapterWriter",
    "ExtractOptions",
    "ExtractReport",
    "LegoOptions",
    "LoraModule",
    "MergeOptions",
    "MosConfig",
    "Overlap",
    "Pack",
    "PackReport",
    "PolyhistorConfig",
    "Provenance",
    "adapter_from_tensors",
    "attach_mos",
    "attach_polyhistor",
    "compare_adapters",
    "describe_adapter",
    "export_mos",
    "extract_adapter",
    "load_adapter",
    "load_mos",
    "load_polyhistor",
    "merge_adapters",
    "open_pack",
    "pack_adapters",
    "plan_adapters",
    "save_mos",
    "save_polyhistor",
    "truncate_adapter",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fusekit.adapters.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fusekit.adapters' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
