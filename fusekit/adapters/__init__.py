"""LoRA adapters: read, write, merge, extract, compress, share."""

from fusekit.adapters.adapter import Adapter, LoraModule
from fusekit.adapters.peft_format import adapter_from_tensors, load_adapter
from fusekit.adapters.peft_writer import AdapterWriter, write_adapter

__all__ = [
    "Adapter",
    "AdapterWriter",
    "LoraModule",
    "adapter_from_tensors",
    "load_adapter",
    "write_adapter",
]
