"""LoRA adapters: read, write, merge, extract, compress, share."""

from fusekit.adapters.adapter import Adapter, LoraModule
from fusekit.adapters.extract import ExtractOptions, ExtractReport, extract_adapter
from fusekit.adapters.merge import MergeOptions, merge_adapters
from fusekit.adapters.peft_format import adapter_from_tensors, load_adapter
from fusekit.adapters.peft_writer import AdapterWriter, write_adapter

__all__ = [
    "Adapter",
    "AdapterWriter",
    "ExtractOptions",
    "ExtractReport",
    "LoraModule",
    "MergeOptions",
    "adapter_from_tensors",
    "extract_adapter",
    "load_adapter",
    "merge_adapters",
    "write_adapter",
]
