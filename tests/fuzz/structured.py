"""Documents that are right, and changes of their structure: what lies beyond a parser's syntax."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "a", "*", "../up", "/etc/passwd", "a+b", "a@b@c", "\0", "\ud7ff", "x" * 300,
    [], [1], [0, 1], [[]], ["a"], [None], {}, {"a": 1}, {"": {}}, {"filter": "x", "value": 1},
)  # fmt: skip
"""Values of every kind, to be put where another is expected."""

_MODELS = [
    {"model": "a", "parameters": {"weight": [0.2, 0.8], "density": 0.5}},
    {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 1}]}},
]
_SLICES = [
    {
        "sources": [
            {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.2}},
            {"model": "b", "layer_range": [1, 3]},
        ],
        "parameters": {"weight": [0.5, 1.0]},
    },
    {"sources": [{"model": "c", "layer_range": [2, 3]}], "base_model": "a"},
]

DOCUMENTS: dict[str, list[Any]] = {
    "recipe": [
        {"merge_method": "linear", "models": _MODELS, "parameters": {"normalize": False}},
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": _MODELS,
            "parameters": {"density": 0.3, "lambda": 1.0, "int8_mask": True},
            "dtype": "bfloat16",
            "out_dtype": "float16",
            "granularity": "layer",
            "missing": "base",
            "seed": 3,
        },
        {"merge_method": "linear", "slices": _SLICES, "parameters": {"weight": 1.0}},
        {
            "merge_method": "passthrough",
            "modules": {
                "model": {"slices": _SLICES[1:], "parameters": {"scale": [1, 0.5]}},
                "default": {"models": [{"model": "a"}]},
            },
        },
        {
            "merge_method": "slerp",
            "base_model": {"model": {"path": "a", "revision": "main"}},
            "models": [{"model": "a+lora"}, {"model": {"model": {"path": "b"}}}],
            "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.5}]},
            "tokenizer": {
                "source": "union",
                "tokens": {"<x>": {"source": "a", "force": True}},
                "pad_to_multiple_of": 8,
            },
            "chat_template": "chatml",
        },
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": _MODELS,
            "layer_scaling": {"alpha": 0.3, "beta": 0.7, "outside": [{"value": "last"}]},
        },
        {
            "base_model": "a",
            "experts": [
                {"source_model": "a", "positive_prompts": ["x"], "noise_scale": 0.1},
                {"source_model": "b", "negative_prompts": ["y"], "residual_scale": 0.1},
            ],
            "shared_experts": [{"source_model": "c"}],
            "gate_mode": "random",
            "experts_per_token": 1,
            "architecture": "deepseek",
        },
    ],
    "index": [
        {
            "metadata": {"total_size": 48},
            "weight_map": {"v": "model-1.safetensors", "w": "model-2.safetensors"},
        }
    ],
    "config": [
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 3,
            "vocab_size": 8,
            "hidden_size": 4,
            "layer_types": ["s", "f", "s"],
            "moe_layers": [0, 2],
            "first_k_dense_replace": 0,
            "sliding_window_pattern": 1,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
        },
        {
            "text_config": {"num_hidden_layers": 3, "tie_word_embeddings": True},
            "vision_config": {"depth": 3, "depths": [1, 1, 1]},
            "encoder": {"num_layers": 3},
        },
    ],
    "pipeline": [
        {
            "model_index.json": {
                "_class_name": "P",
                "unet": ["diffusers", "U"],
                "none": [None, None],
            }
        },
        {
            "modules.json": [{"idx": 0, "path": "", "type": "T"}, {"idx": 1, "path": "unet"}],
            "router_config.json": {"types": {"unet": "T"}, "parameters": {}},
        },
    ],
    "tokenizer": [
        {
            "tokenizer.json": {
                "version": "1.0",
                "added_tokens": [{"id": 7, "content": "<s>", "special": True, "lstrip": False}],
                "pre_tokenizer": {"type": "ByteLevel"},
                "model": {
                    "type": "BPE",
                    "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "d": 5, "e": 6},
                    "merges": ["a b", ["ab", "c"]],
                },
            },
            "tokenizer_config.json": {
                "bos_token": "<s>",
                "eos_token": {"content": "<s>"},
                "added_tokens_decoder": {"7": {"content": "<s>", "special": True}},
                "chat_template": "{{ messages }} and more",
            },
            "special_tokens_map.json": {"bos_token": "<s>"},
            "generation_config.json": {"bos_token_id": 7, "eos_token_id": [7, 1]},
        },
        {
            "tokenizer.json": {
                "added_tokens": [],
                "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.5]]},
            }
        },
        {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<s>": 2}},
    ],
    "adapter": [
        {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["up_proj"],
            "rank_pattern": {"0.mlp": 2},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "bias": "none",
            "modules_to_save": None,
            "task_type": "CAUSAL_LM",
        }
    ],
    "manifest": [
        {
            "format": "fusekit-manifest/1",
            "fusekit": "0.1.0",
            "recipe": {"merge_method": "linear"},
            "inputs": [{"reference": "a", "path": "/a", "size": 3}],
            "checksum": "xxh3-128/1Mi-elements",
            "tensors": {
                "w": {
                    "file": "model.safetensors",
                    "dtype": "F32",
                    "shape": [2, 3],
                    "checksum": "0" * 32,
                }
            },
            "side_tensors": {},
        }
    ],
}
"""Per target documents that it reads to its end; several files of a folder by name."""


def as_bytes(document: Any) -> bytes:
    """JSON, which is YAML as well."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


def places(document: Any) -> list[tuple[Any, ...]]:
    """The path of every value, from the outside in."""
    found: list[tuple[Any, ...]] = [()]
    inside = ()
    if isinstance(document, dict):
        inside = tuple(document.items())
    elif isinstance(document, list):
        inside = tuple(enumerate(document))
    for key, value in inside:
        found += [(key, *path) for path in places(value)]
    return found


def changed(document: Any, chance: random.Random) -> Any:
    """A copy of a document with one to three values replaced, removed, repeated or renamed."""
    made = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(places(made)[1:] or [()])
        if not path:
            return chance.choice(ODD)
        *outer, key = path
        holder = made
        for step in outer:
            holder = holder[step]
        action = chance.randrange(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif action == 1:
            holder[str(chance.choice(ODD))] = holder.pop(key)
        elif action == 2:
            other = chance.choice(places(made))
            value = made
            for step in other:
                value = value[step]
            holder[key] = copy.deepcopy(value)
        elif action == 3:
            holder[key] = [holder[key]] if chance.random() < 0.5 else {"value": holder[key]}
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return made
