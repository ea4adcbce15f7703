"""LoRA adapters: read, write, merge, extract, compress, share."""

from fusekit.adapters.adapter import Adapter, LoraModule
from fusekit.adapters.merge import MergeOptions, merge_adapters
from fusekit.adapters.peft_format import adapter_from_tensors, load_adapter
from fusekit.adapters.peft_writer import AdapterWriter, write_adapter

__all__ = [
    "Adapter",
    "AdapterWriter",
    "LoraModule",
    "MergeOptions",
    "adapter_from_tensors",
    "load_adapter",
    "merge_adapters",
    "write_adapter",
]
