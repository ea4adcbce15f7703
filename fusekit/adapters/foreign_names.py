"""LoRA files of other tools: kohya's and diffusers' tensor names in PEFT's terms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError

_KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_transformer_")
_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.")
_FACTORS = (
    (".lora_down.weight", "A"),
    (".lora_up.weight", "B"),
    (".lora_linear_layer.down.weight", "A"),
    (".lora_linear_layer.up.weight", "B"),
    (".lora.down.weight", "A"),
    (".lora.up.weight", "B"),
    ("_lora.down.weight", "A"),
    ("_lora.up.weight", "B"),
)
_ATTENTION_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)$")
_UNSUPPORTED = {
    ".lora_mid.weight": "a LoCon convolution with a middle factor",
    ".dora_scale": "kohya's DoRA, whose axis the file does not record",
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
}


def to_peft_keys(
    source: TensorSource, without_config: bool, base_names: Iterable[str] | None, label: str
) -> tuple[dict[str, str], dict[str, float]]:
    """PEFT's name of every tensor of an adapter file, and the alphas stored as tensors.

    Args:
        source: the adapter's tensors.
        without_config: no adapter_config.json came with them, so a first component
            (`unet.`, `transformer.`) may be a pipeline's, not the model's.
        base_names: names of the base model's tensors, to undo flattened names.

    Returns:
        `{PEFT name: name in the source}` and `{module: alpha}`.

    Raises:
        CheckpointError: a LoRA relative that is not a plain product of two factors, or a flattened
            name that no base tensor has.
    """
    modules = _Modules(base_names, without_config, label)
    names: dict[str, str] = {}
    alphas: dict[str, float] = {}
    for key in source.tensors:
        for suffix, what in _UNSUPPORTED.items():
            if key.endswith(suffix):
                raise CheckpointError(f"{label}: tensor {key!r} belongs to {what}: not supported")
        if key.endswith(".alpha"):
            alphas[modules.resolve(key.removesuffix(".alpha"))] = _scalar(source, key, label)
            continue
        suffix, factor = next(((s, f) for s, f in _FACTORS if key.endswith(s)), ("", ""))
        if suffix:
            module = modules.resolve(key.removesuffix(suffix))
            name = f"{module}.lora_{factor}.weight"
        else:
            name = modules.without_component(key)
        if name in names:
            raise CheckpointError(f"{label}: tensors {names[name]!r} and {key!r} are one factor")
        names[name] = key
    return names, alphas


class _Modules:
    """Module names of a foreign file in the base model's terms."""

    def __init__(self, base_names: Iterable[str] | None, without_config: bool, label: str) -> None:
        known = None if base_names is None else {name.rpartition(".")[0] for name in base_names}
        self._known = known
        self._flattened: Mapping[str, str] = {name.replace(".", "_"): name for name in known or ()}
        self._strip = without_config
        self._label = label

    def resolve(self, raw: str) -> str:
        prefix = next((p for p in _KOHYA_PREFIXES if raw.startswith(p)), None)
        if prefix is None:
            processed = _ATTENTION_PROCESSOR.sub(_attention_module, raw)
            return self.without_component(processed)
        flat = raw.removeprefix(prefix)
        if self._known is None:
            return flat
        if flat not in self._flattened:
            raise CheckpointError(f"{self._label}: no tensor of the base is named like {raw!r}")
        return self._flattened[flat]

    def without_component(self, name: str) -> str:
        component = next((c for c in _COMPONENTS if name.startswith(c)), None)
        if not self._strip or component is None:
            return name
        inner = name.removeprefix(component)
        if self._known is not None:
            path = re.split(r"\.(?:lora_|alpha$)", inner)[0]
            return inner if path in self._known else name
        return inner


def _attention_module(match: re.Match[str]) -> str:
    return ".to_out.0" if match[1] == "out" else f".to_{match[1]}"


def _scalar(source: TensorSource, key: str, label: str) -> float:
    info = source.tensors[key]
    if info.size != 1:
        raise CheckpointError(f"{label}: tensor {key!r} has {info.size} elements, expected 1")
    value = np.empty(1, dtype=info.dtype.numpy)
    source.read_into(key, 0, 1, value.view(np.uint8).data)
    return float(value[0])
