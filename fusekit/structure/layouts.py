"""How mixture-of-experts checkpoints are laid out: tensor names and config of every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusekit.errors import CheckpointError, RecipeError, did_you_mean

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoeLayout:
    """One family's names and settings.

    `expert`, `router`, `shared` and `shared_gate` are names within a layer, with `{expert}` and
    `{projection}` left open; `projections` renames the dense model's projections.
    """

    name: str
    architecture: str
    inputs: tuple[str, ...]
    expert: str
    router: str
    projections: Mapping[str, str]
    settings: Callable[[Mapping[str, Any], int, int, int], dict[str, Any]]
    shared: str | None = None
    shared_gate: str | None = None
    shared_counts: tuple[int, ...] = (0,)
    attention_biases: bool = False
    """Whether q, k and v have biases, which are made zero where the base has none."""


def _mixtral(config: Mapping[str, Any], experts: int, k: int, _shared: int) -> dict[str, Any]:
    return {"num_local_experts": experts, "num_experts_per_tok": k, "sliding_window": None}


def _qwen(config: Mapping[str, Any], experts: int, k: int, shared: int) -> dict[str, Any]:
    settings = {
        "num_experts": experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if shared:
        settings["shared_expert_intermediate_size"] = config["intermediate_size"]
    return settings


def _deepseek(config: Mapping[str, Any], experts: int, k: int, shared: int) -> dict[str, Any]:
    return {
        "n_routed_experts": experts,
        "n_shared_experts": shared or None,
        "num_experts_per_tok": k,
        "moe_intermediate_size": config["intermediate_size"],
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
    }


_SAME = {name: name for name in PROJECTIONS}

LAYOUTS = {
    layout.name: layout
    for layout in (
        MoeLayout(
            "mixtral",
            "MixtralForCausalLM",
            ("llama", "mistral"),
            "block_sparse_moe.experts.{expert}.{projection}.weight",
            "block_sparse_moe.gate.weight",
            {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
            _mixtral,
        ),
        MoeLayout(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            ("qwen2", "llama", "mistral"),
            "mlp.experts.{expert}.{projection}.weight",
            "mlp.gate.weight",
            _SAME,
            _qwen,
            shared="mlp.shared_expert.{projection}.weight",
            shared_gate="mlp.shared_expert_gate.weight",
            shared_counts=(1,),
            attention_biases=True,
        ),
        MoeLayout(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ("qwen3",),
            "mlp.experts.{expert}.{projection}.weight",
            "mlp.gate.weight",
            _SAME,
            _qwen,
        ),
        MoeLayout(
            "deepseek",
            "DeepseekForCausalLM",
            ("llama",),
            "mlp.experts.{expert}.{projection}.weight",
            "mlp.gate.weight",
            _SAME,
            _deepseek,
            shared="mlp.shared_experts.{projection}.weight",
            shared_counts=(0, 1),
        ),
    )
}


def choose_layout(name: str | None, model_type: str | None, shared: int) -> MoeLayout:
    """The layout asked for, or the first that takes such a base and so many shared experts.

    Raises:
        RecipeError: no such layout, or one that does not take them.
        CheckpointError: a base of a family that no layout is for.
    """
    if name is None:
        for layout in LAYOUTS.values():
            if model_type in layout.inputs and shared in layout.shared_counts:
                return layout
        known = sorted({family for layout in LAYOUTS.values() for family in layout.inputs})
        if model_type not in known:
            raise CheckpointError(
                f"base_model: a model of type {model_type!r}, expected one of {', '.join(known)}"
            )
        raise RecipeError(
            f"shared_experts: found {shared}, and no layout takes them from "
            f"a model of type {model_type!r}"
        )
    if name not in LAYOUTS:
        raise RecipeError(f"architecture: unknown layout {name!r}{did_you_mean(name, LAYOUTS)}")
    layout = LAYOUTS[name]
    if model_type not in layout.inputs:
        raise RecipeError(
            f"architecture: {name} takes models of type {' or '.join(layout.inputs)}, "
            f"base_model is {model_type!r}"
        )
    if shared not in layout.shared_counts:
        expected = " or ".join(map(str, layout.shared_counts))
        raise RecipeError(f"shared_experts: found {shared}, expected {expected} for {name}")
    return layout
