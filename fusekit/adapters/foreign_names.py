"""LoRA files of other tools: kohya's and diffusers' tensor names in PEFT's terms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError, did_you_mean

_KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_transformer_")
_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.")
DORA_SCALE = ".dora_scale"
"""Suffix of kohya's DoRA magnitudes, whose shape says of which features they are."""

_FACTORS = (
    (".lora_down.weight", "A"),
    (".lora_up.weight", "B"),
    (".lora_mid.weight", "mid"),
    (".lora_linear_layer.down.weight", "A"),
    (".lora_linear_layer.up.weight", "B"),
    (".lora.down.weight", "A"),
    (".lora.up.weight", "B"),
    ("_lora.down.weight", "A"),
    ("_lora.up.weight", "B"),
)
_ATTENTION_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)$")
_SUFFIX = re.compile(r"\.lora_|\.lora\.|_lora\.|\.alpha$|\.dora_scale$")
_UNSUPPORTED = {
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
}


@dataclass(frozen=True, slots=True)
class PeftNames:
    """What the tensors of an adapter file are called in PEFT's terms.

    Attributes:
        keys: PEFT name -> name in the file.
        alphas: module -> the alpha stored as a tensor.
        left_out: component left out -> number of tensors.
        flattened: a module whose name is still kohya's, as no base was there to undo it, or empty.
    """

    keys: dict[str, str]
    alphas: dict[str, float]
    left_out: dict[str, int]
    flattened: str


def to_peft_keys(
    source: TensorSource,
    without_config: bool,
    base_names: Iterable[str] | None,
    label: str,
    component: str | None = None,
) -> PeftNames:
    """PEFT's name of every tensor of an adapter file, and the alphas stored as tensors.

    Args:
        source: the adapter's tensors.
        without_config: no adapter_config.json came with them, so a first component
            (`unet.`, `transformer.`) may be a pipeline's, not the model's.
        base_names: names of the base model's tensors, to undo flattened names.
        component: which model of a pipeline to take (`unet`, `te1`, `text_encoder`), in a file that
            holds parts for several; None takes the one whose names are all the base's.

    Raises:
        CheckpointError: a LoRA relative that is not a plain product of two factors, a flattened
            name that no base tensor has, or several components of which none can be told to be the
            base's.
    """
    modules = _Modules(base_names, without_config, label)
    names: dict[str, str] = {}
    alphas: dict[str, float] = {}
    chosen, left_out = modules.choose(source.tensors, component)
    for key in chosen:
        for suffix, what in _UNSUPPORTED.items():
            if key.endswith(suffix):
                raise CheckpointError(f"{label}: tensor {key!r} belongs to {what}: not supported")
        if key.endswith(".alpha"):
            alphas[modules.resolve(key.removesuffix(".alpha"))] = _scalar(source, key, label)
            continue
        suffix, factor = next(((s, f) for s, f in _FACTORS if key.endswith(s)), ("", ""))
        if key.endswith(DORA_SCALE):
            name = f"{modules.resolve(key.removesuffix(DORA_SCALE))}.lora_magnitude_vector"
        elif suffix:
            module = modules.resolve(key.removesuffix(suffix))
            name = f"{module}.lora_{factor}.weight"
        else:
            name = modules.without_component(key)
        if name in names:
            raise CheckpointError(f"{label}: tensors {names[name]!r} and {key!r} are one factor")
        names[name] = key
    return PeftNames(names, alphas, left_out, modules.flattened)


class _Modules:
    """Module names of a foreign file in the base model's terms."""

    def __init__(self, base_names: Iterable[str] | None, without_config: bool, label: str) -> None:
        known = None if base_names is None else {name.rpartition(".")[0] for name in base_names}
        self._known = known
        self._flattened: Mapping[str, str] = {name.replace(".", "_"): name for name in known or ()}
        self._strip = without_config
        self._label = label
        self.flattened = ""

    def choose(
        self, keys: Iterable[str], component: str | None
    ) -> tuple[list[str], dict[str, int]]:
        """The tensors that belong to the base, and how many were left out, by component."""
        groups: dict[str, list[str]] = {}
        for key in keys:
            groups.setdefault(self._component(key), []).append(key)
        named = [name for name in groups if name]
        taken = component
        if component is not None and component not in named:
            raise CheckpointError(
                f"{self._label}: no component {component!r}{did_you_mean(component, named)}"
            )
        if component is None and len(named) > 1:
            fitting = [name for name in named if all(map(self._fits, groups[name]))]
            if len(fitting) != 1:
                fits = f"; the base's names fit {', '.join(fitting) or 'none of them'}"
                raise CheckpointError(
                    f"{self._label}: holds LoRA of several models ({', '.join(named)})"
                    f"{fits if self._known is not None else ''}: give the base model of one of "
                    f"them, or choose one with component={named[0]!r}"
                )
            taken = fitting[0]
        left = {name: len(groups[name]) for name in named if taken is not None and name != taken}
        return [key for name, group in groups.items() if name not in left for key in group], left

    def _component(self, key: str) -> str:
        """The model of a pipeline that a tensor belongs to, as its name says, or nothing."""
        prefix = next((p for p in _KOHYA_PREFIXES if key.startswith(p)), None)
        if prefix is not None:
            return prefix.removeprefix("lora_").rstrip("_")
        component = next((c for c in _COMPONENTS if key.startswith(c)), None)
        if not self._strip or component is None or _path(key) in (self._known or ()):
            return ""
        return component.rstrip(".")

    def _fits(self, key: str) -> bool:
        """Whether the base has the module of a tensor of some component."""
        prefix = next((p for p in _KOHYA_PREFIXES if key.startswith(p)), None)
        if prefix is not None:
            return _path(key.removeprefix(prefix)) in self._flattened
        component = next((c for c in _COMPONENTS if key.startswith(c)), "")
        return _path(key.removeprefix(component)) in (self._known or ())

    def resolve(self, raw: str) -> str:
        prefix = next((p for p in _KOHYA_PREFIXES if raw.startswith(p)), None)
        if prefix is None:
            processed = _ATTENTION_PROCESSOR.sub(_attention_module, raw)
            return self.without_component(processed)
        flat = raw.removeprefix(prefix)
        if self._known is None:
            self.flattened = flat
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
            return inner if _path(inner) in self._known else name
        return inner


def _path(key: str) -> str:
    """The module in a tensor's name."""
    return _ATTENTION_PROCESSOR.sub(_attention_module, _SUFFIX.split(key)[0])


def _attention_module(match: re.Match[str]) -> str:
    return ".to_out.0" if match[1] == "out" else f".to_{match[1]}"


def _scalar(source: TensorSource, key: str, label: str) -> float:
    info = source.tensors[key]
    if info.size != 1:
        raise CheckpointError(f"{label}: tensor {key!r} has {info.size} elements, expected 1")
    value = np.empty(1, dtype=info.dtype.numpy)
    source.read_into(key, 0, 1, value.view(np.uint8).data)
    return float(value[0])
