"""Reading PEFT LoRA adapters, and kohya's and diffusers' naming.

Every header is checked before any tensor is loaded; then one module is loaded at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusekit.adapters.adapter import Adapter, Array, Kind, LoraModule, StoredModules, to_float32
from fusekit.adapters.foreign_names import DORA_SCALE, to_peft_keys
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.pickles import PickleFile
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.checkpoint.source import TensorSource
from fusekit.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_mid|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")
_SAVED_COPY = re.compile(r"\.modules_to_save\.[^.]+(?=\.)|\.modules_to_save(?=\.[^.]+$)")
_REPEATED_COPY = re.compile(r"\.modules_to_save\.[^.]+$")
"""What PEFT writes of a saved embedding besides the embedding, beside its `original_module`."""

_FORWARD_CHANGING = (
    "layer_replication",
    "trainable_token_indices",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
)
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, slots=True)
class _Spec:
    """Where a module's tensors are, and what the config says of them."""

    kind: Kind
    keys: Mapping[str, str]
    alpha: float
    rslora: bool
    transposed: bool
    kernel: tuple[int, ...]
    experts: int
    magnitude_axis: Literal["output", "input"]


class _Modules(StoredModules):
    """Modules read at each access, so that an adapter never is in memory whole."""

    def __init__(self, source: TensorSource, specs: Mapping[str, _Spec]) -> None:
        self._source = source
        self._specs = specs

    def __getitem__(self, name: str) -> LoraModule:
        return self._module(name, read_finite)

    def outline(self, name: str) -> LoraModule:
        return self._module(name, _hollow)

    def _module(self, name: str, read: Callable[[TensorSource, str], Array]) -> LoraModule:
        spec = self._specs[name]
        tensors = {part: read(self._source, key) for part, key in spec.keys.items()}
        A, B = tensors["A"], tensors["B"]
        if "mid" in tensors:
            A = _with_middle(A, tensors["mid"])
        magnitude = tensors.get("magnitude")
        return LoraModule(
            name=name,
            A=A.reshape(A.shape[0], -1),
            B=B.reshape(B.shape[0], -1),
            alpha=spec.alpha,
            rslora=spec.rslora,
            kind=spec.kind,
            transposed=spec.transposed,
            kernel=spec.kernel,
            experts=spec.experts,
            magnitude=None if magnitude is None else magnitude.reshape(-1),
            magnitude_axis=spec.magnitude_axis,
            bias=tensors.get("bias"),
        )

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class _Replacements(Mapping[str, Array]):
    """Full tensors read from their source at each access."""

    def __init__(self, source: TensorSource, keys: Mapping[str, str]) -> None:
        self._source = source
        self._keys = keys

    def __getitem__(self, name: str) -> Array:
        return read_finite(self._source, self._keys[name])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def load_adapter(
    path: str | Path, base_names: Iterable[str] | None = None, component: str | None = None
) -> Adapter:
    """The adapter in a PEFT folder, or in a kohya, diffusers or PEFT weights file.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors (or .bin), or one
            weights file. Without a config beside it, a module's scaling is its `.alpha` over its
            rank, or 1.
        base_names: names of the base model's tensors. Needed only to undo kohya's flattened names
            (`lora_unet_down_blocks_0_...`), and used to tell a component prefix from a module.
        component: which part to take of a file that holds LoRA for several models of a pipeline
            (`unet`, `te1`, `text_encoder`). None takes the part whose names are all the base's.

    Raises:
        CheckpointError: missing files, a PEFT type other than LoRA, options that change the
            forward pass in ways a weight update cannot express, factors that are missing or do not
            fit each other or the config. NaN or Inf is reported when its module is read.

    Example:
        >>> adapter = load_adapter("adapter")  # doctest: +SKIP
        >>> list(adapter.modules)[:1]  # doctest: +SKIP
        ['model.layers.0.self_attn.q_proj.weight']
    """
    weights, config_path = _files(Path(path))
    config = _read_config(config_path) if config_path is not None else None
    source = _open_weights(weights)
    return _build(source, config, str(path), base_names, component)


def adapter_from_tensors(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    label: str = "memory",
    base_names: Iterable[str] | None = None,
) -> Adapter:
    """The adapter in a state dict (NumPy arrays or torch tensors) with its config, as on disk."""
    return _build(MemorySource(tensors, label), config, label, base_names)


def _build(
    source: TensorSource,
    config: Mapping[str, Any] | None,
    label: str,
    base_names: Iterable[str] | None,
    component: str | None = None,
) -> Adapter:
    names = to_peft_keys(source, config is None, base_names, label, component)
    if config is not None:
        _refuse_unsupported(config, label)
    grouped, replacements = _group(names.keys, label)
    if not grouped and not replacements:
        raise CheckpointError(f"{label}: holds no tensors, expected the factors of a LoRA adapter")
    specs = {}
    for module, keys in grouped.items():
        name, spec = _spec(source, module, keys, config, names.alphas.get(module), label)
        if config and config.get("use_dora") and "magnitude" not in spec.keys:
            raise CheckpointError(
                f"{label}: module {module!r} has no lora_magnitude_vector, although "
                "adapter_config.json sets use_dora"
            )
        specs[name] = spec
    return Adapter(
        label=label,
        modules=_Modules(source, specs),
        replacements=_Replacements(source, replacements),
        config=dict(config or {}),
        left_out=names.left_out,
        flattened=names.flattened,
        dora=any("magnitude" in spec.keys for spec in specs.values()),
    )


def _files(path: Path) -> tuple[Path, Path | None]:
    if not path.exists():
        raise CheckpointError(f"adapter {str(path)!r}: no such file or folder")
    if path.is_file():
        config = path.parent / CONFIG_NAME
        beside = path.name.startswith("adapter_model.") and config.is_file()
        return path, config if beside else None
    config = path / CONFIG_NAME
    has_config = config.is_file()
    candidates = [path / WEIGHTS_NAME, path / "adapter_model.bin"]
    if not has_config:
        candidates += [path / "pytorch_lora_weights.safetensors"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate, config if has_config else None
    raise CheckpointError(
        f"{path}: not an adapter: expected {WEIGHTS_NAME} or adapter_model.bin "
        f"{'beside' if has_config else 'with'} {CONFIG_NAME}"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    _check_fields(config, path)
    return config


def _check_fields(config: Mapping[str, Any], path: Path) -> None:
    """Refuse fields of a type that PEFT does not write."""
    for field, least in (("r", 1), ("lora_alpha", None)):
        if field in config and not _is_number(config[field], least):
            raise CheckpointError(f"{path}: {field} is {config[field]!r}, expected a number")
    for field, least in (("rank_pattern", 1), ("alpha_pattern", None)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {field} is {patterns!r}, expected an object")
        for pattern, value in patterns.items():
            if not _is_number(value, least) or not _is_pattern(pattern):
                raise CheckpointError(
                    f"{path}: {field} has {pattern!r}: {value!r}, expected a pattern of module "
                    "names and a number"
                )
    for field in ("target_parameters", "modules_to_save"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: {field} is {names!r}, expected a list of names")


def _is_number(value: Any, least: int | None) -> bool:
    """A finite number; where there is a least one, of a size that shapes have."""
    if type(value) not in (int, float) or not abs(value) < 1 << 60:
        return False
    return least is None or value >= least


def _is_pattern(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _open_weights(path: Path) -> TensorSource:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def _refuse_unsupported(config: Mapping[str, Any], label: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{label}: peft_type is {kind!r}, expected 'LORA'")
    for field in _FORWARD_CHANGING:
        if config.get(field):
            raise CheckpointError(
                f"{label}: {field} is set: its effect is not a weight update of the base, "
                "so the adapter cannot be read as one"
            )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INIT):
        raise CheckpointError(
            f"{label}: init_lora_weights is {init!r}: such an adapter is relative to a modified "
            "base; save it with PEFT's path_initial_model_for_weight_conversion first"
        )


def _group(
    names: Mapping[str, str], label: str
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Source keys by module and part, and source keys of full tensors by base tensor name."""
    modules: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for name, key in names.items():
        plain = name.removeprefix(KEY_PREFIX).removeprefix("_orig_mod.")
        if ".original_module." in plain:
            continue
        match = _FACTOR.fullmatch(plain)
        if match is not None:
            part = match["part"].removeprefix("lora_")
            if match["leaf"] == "bias":
                if part != "B":
                    raise CheckpointError(f"{label}: tensor {key!r} has an unknown suffix")
                part = "bias"
            slots, slot = modules.setdefault(match["module"], {}), part
        elif ".lora_" in plain:
            raise CheckpointError(f"{label}: tensor {key!r} has an unknown suffix")
        else:
            slots, slot = replacements, _SAVED_COPY.sub("", _BASE_LAYER.sub("", plain))
        if slot in slots and slots is replacements:
            if _REPEATED_COPY.search(key):
                continue
            if _REPEATED_COPY.search(slots[slot]):
                del slots[slot]
        if slot in slots:
            raise CheckpointError(
                f"{label}: tensors {slots[slot]!r} and {key!r} are the same part of one module"
            )
        slots[slot] = key
    return modules, replacements


def _spec(
    source: TensorSource,
    module: str,
    parts: Mapping[str, str],
    config: Mapping[str, Any] | None,
    alpha: float | None,
    label: str,
) -> tuple[str, _Spec]:
    """The base tensor a module changes and its checked description."""
    embedding = "embedding_A" in parts or "embedding_B" in parts
    keys = {
        part.removeprefix("embedding_").removesuffix("_vector"): key for part, key in parts.items()
    }
    for factor in ("A", "B"):
        if factor not in keys:
            raise CheckpointError(f"{label}: module {module!r} has no lora_{factor}")
    shape_a = source.tensors[keys["A"]].shape
    shape_b = source.tensors[keys["B"]].shape
    for key in (keys["A"], keys["B"]):
        shape = source.tensors[key].shape
        if len(shape) < 2 or 0 in shape:
            raise CheckpointError(
                f"{label}: tensor {key!r} has shape {list(shape)}: saved under ZeRO-3 or FSDP "
                "without gathering its shards, so the adapter is incomplete"
            )
    if shape_b[1] != shape_a[0]:
        raise CheckpointError(
            f"{label}: module {module!r} has rank {shape_a[0]} in lora_A and {shape_b[1]} in lora_B"
            + (" (grouped convolutions cannot be merged)" if len(shape_a) > 2 else "")
        )
    fields: Mapping[str, Any] = config or {}
    parameter = _target_parameter(module, fields, label)
    name = f"{module}.weight" if parameter is None else parameter
    pattern_name = module if parameter is None else parameter
    rows = shape_a[0]
    experts = 1
    if config is not None:
        rank = _pattern_value(fields.get("rank_pattern"), pattern_name, fields.get("r", 8))
        if parameter is not None and rows % int(rank) == 0:
            experts = rows // int(rank)
        elif rows != rank:
            raise CheckpointError(
                f"{label}: module {module!r} has rank {rows} in its tensors, "
                f"{CONFIG_NAME} says {rank}"
            )
        alpha = _pattern_value(
            fields.get("alpha_pattern"), pattern_name, fields.get("lora_alpha", 8)
        )
    if "mid" in keys:
        shape_a = _shape_with_middle(source, keys, module, label)
    kind: Kind = "linear"
    if parameter is not None:
        kind = "parameter"
    elif embedding:
        kind = "embedding"
    elif len(shape_a) > 2:
        kind = "conv"
    axis = _magnitude_axis(source, keys, shape_b[0], shape_a[1])
    sizes = {"magnitude": shape_b[0] if axis == "output" else shape_a[1], "bias": shape_b[0]}
    _check_vectors(source, keys, sizes, module, label)
    return name, _Spec(
        kind=kind,
        keys=keys,
        alpha=float(rows if alpha is None else alpha),
        rslora=bool(fields.get("use_rslora", False)),
        transposed=embedding or (kind == "linear" and bool(fields.get("fan_in_fan_out", False))),
        kernel=shape_a[1:] if kind == "conv" else (),
        experts=experts,
        magnitude_axis=axis,
    )


def _check_vectors(
    source: TensorSource,
    keys: Mapping[str, str],
    sizes: Mapping[str, int],
    module: str,
    label: str,
) -> None:
    for part, size in sizes.items():
        if part in keys and source.tensors[keys[part]].size != size:
            raise CheckpointError(
                f"{label}: module {module!r}: tensor {keys[part]!r} has shape "
                f"{list(source.tensors[keys[part]].shape)}, expected {size} elements"
            )


def _magnitude_axis(
    source: TensorSource, keys: Mapping[str, str], rows: int, columns: int
) -> Literal["output", "input"]:
    """Whose norms DoRA's magnitudes are: PEFT's always of output features; kohya's are shaped to
    multiply the weight, (out, 1, ..) or (1, in, ..)."""
    key = keys.get("magnitude", "")
    shape = source.tensors[key].shape if key.endswith(DORA_SCALE) else ()
    of_input = len(shape) > 1 and shape[:2] == (1, columns) and shape[0] != rows
    return "input" if of_input else "output"


def _shape_with_middle(
    source: TensorSource, keys: Mapping[str, str], module: str, label: str
) -> tuple[int, ...]:
    """Shape of a convolution's A with its middle factor multiplied in."""
    down, middle = source.tensors[keys["A"]].shape, source.tensors[keys["mid"]].shape
    if len(middle) < 3 or middle[:2] != (down[0], down[0]) or set(down[2:]) - {1}:
        raise CheckpointError(
            f"{label}: module {module!r}: tensor {keys['mid']!r} has shape {list(middle)}, "
            f"expected [{down[0]}, {down[0]}, kernel] between factors of rank {down[0]}"
        )
    return (down[0], down[1], *middle[2:])


def _with_middle(down: Array, middle: Array) -> Array:
    """`sum_j middle[i, j, ..] down[j, c]`: a convolution with kernel A instead of two in a row."""
    flat = to_float32(down).reshape(len(down), -1)
    return np.asarray(np.einsum("ij...,jc->ic...", to_float32(middle), flat))


def _target_parameter(module: str, config: Mapping[str, Any], label: str) -> str | None:
    """The base tensor when the module stands for a raw parameter (`target_parameters`)."""
    targets = config.get("target_parameters") or ()
    owners = [
        t for t in targets if is_dotted_suffix(t.rpartition(".")[0], _BASE_LAYER.sub("", module))
    ]
    if not owners:
        return None
    if len(owners) > 1:
        raise CheckpointError(
            f"{label}: module {module!r} has several adapted parameters ({', '.join(owners)}): "
            "the file does not say which factors belong to which"
        )
    return f"{module}.{owners[0].rpartition('.')[2]}"


def is_dotted_suffix(tail: str, name: str) -> bool:
    """Whether `name` is `tail` or ends in `.tail`, PEFT's rule for lists of module names."""
    return name == tail or name.endswith(f".{tail}")


def _pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole name or a dotted suffix of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_array(source: TensorSource, name: str) -> Array:
    """A whole tensor of a source, in its own element type."""
    info = source.tensors[name]
    array = np.empty(info.shape, dtype=info.dtype.numpy)
    if info.size:
        source.read_into(name, 0, info.size, array.reshape(-1).view(np.uint8).data)
    return array


def _hollow(source: TensorSource, name: str) -> Array:
    """Zeros of a tensor's shape and type that take no memory."""
    info = source.tensors[name]
    return np.broadcast_to(np.zeros((), info.dtype.numpy), info.shape)


def read_finite(source: TensorSource, name: str) -> Array:
    """A whole tensor of a source.

    Raises:
        CheckpointError: it holds NaN or Inf.
    """
    array = read_array(source, name)
    bad = _count_non_finite(array)
    if bad:
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} holds {bad} NaN or Inf values of {array.size}"
        )
    return array


def _count_non_finite(array: Array) -> int:
    if array.dtype.name == "bfloat16":
        # The exponent's bits, because element-wise bfloat16 functions are slow.
        return int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    return array.size - int(np.count_nonzero(np.isfinite(array)))
