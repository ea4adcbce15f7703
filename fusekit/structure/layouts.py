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
    model_type: str
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
    fusable: bool = True
    """Whether programs read the experts of a layer as `mlp.experts.gate_up_proj` and
    `mlp.experts.down_proj`, with the router in `mlp.gate.weight`."""
    correction: str | None = None
    """The name of per-expert corrections of scores, which are made zero. Their routers score by
    sigmoids, which would saturate for rows of length 1: the rows get the length 1 / sqrt(H)."""


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
        "n_shared_experts": shared,
        "num_experts_per_tok": k,
        "moe_intermediate_size": config["intermediate_size"],
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
    }


def _deepseek_v1(config: Mapping[str, Any], experts: int, k: int, shared: int) -> dict[str, Any]:
    settings = _deepseek(config, experts, k, shared)
    return {
        **settings,
        "n_shared_experts": shared or None,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    }


def _glm(config: Mapping[str, Any], experts: int, k: int, shared: int) -> dict[str, Any]:
    whole: dict[str, Any] = {"partial_rotary_factor": 1.0}
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        whole["rope_parameters"] = {**rope, "partial_rotary_factor": 1.0}
    return {
        **_deepseek(config, experts, k, shared),
        **whole,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": config["model_type"] == "qwen3",
        "attention_bias": config["model_type"] == "qwen2",
        "num_nextn_predict_layers": 0,
    }


_SAME = {name: name for name in PROJECTIONS}

LAYOUTS = {
    layout.name: layout
    for layout in (
        MoeLayout(
            "mixtral",
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
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            ("qwen3",),
            "mlp.experts.{expert}.{projection}.weight",
            "mlp.gate.weight",
            _SAME,
            _qwen,
        ),
        # DeepSeek's experts with the attention of dense models: transformers' class for both.
        MoeLayout(
            "deepseek",
            "glm4_moe",
            "Glm4MoeForCausalLM",
            ("llama", "mistral", "qwen2", "qwen3"),
            "mlp.experts.{expert}.{projection}.weight",
            "mlp.gate.weight",
            _SAME,
            _glm,
            shared="mlp.shared_experts.{projection}.weight",
            shared_counts=(0, 1),
            correction="mlp.gate.e_score_correction_bias",
        ),
        MoeLayout(
            "deepseek_v1",
            "deepseek",
            "DeepseekForCausalLM",
            ("llama",),
            "mlp.experts.{expert}.{projection}.weight",
            "mlp.gate.weight",
            _SAME,
            _deepseek_v1,
            shared="mlp.shared_experts.{projection}.weight",
            shared_counts=(0, 1),
            fusable=False,
        ),
    )
}

_OTHER_NAMES = {"qwen": "qwen2_moe", "qwen_moe": "qwen2_moe", "deepseek_moe": "deepseek"}
"""What else recipes call layouts."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
"""What the dense families' configs leave out, since mixtures have other defaults."""


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dense model's config with everything said that its family takes for granted."""
    defaults = {
        "num_key_value_heads": config.get("num_attention_heads"),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **_DEFAULTS.get(str(config.get("model_type")), {}),
    }
    if "rope_parameters" not in config:
        defaults["rope_theta"] = 10000.0
    missing = {key: value for key, value in defaults.items() if config.get(key) is None}
    return {**config, **missing}


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
    plain = name.lower().replace(" ", "_").replace("-", "_")
    known_as = _OTHER_NAMES.get(plain, plain)
    if known_as not in LAYOUTS:
        raise RecipeError(f"architecture: unknown layout {name!r}{did_you_mean(name, LAYOUTS)}")
    layout = LAYOUTS[known_as]
    if model_type not in layout.inputs:
        raise RecipeError(
            f"architecture: {layout.name} takes models of type {' or '.join(layout.inputs)}, "
            f"base_model is {model_type!r}"
        )
    if shared not in layout.shared_counts:
        expected = " or ".join(map(str, layout.shared_counts))
        raise RecipeError(f"shared_experts: found {shared}, expected {expected} for {layout.name}")
    return layout
