"""MoS: LoRA factors assembled from shards of pools that all layers of a type share (PyTorch)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusekit.adapters.adapter import LoraModule
from fusekit.adapters.peft_writer import AdapterWriter
from fusekit.adapters.shared_format import SharedFormat
from fusekit.errors import CheckpointError, FusekitError, MissingExtraError

try:
    import torch
    from torch import Tensor, nn
except ImportError:
    raise MissingExtraError("parameter sharing between adapters", "torch") from None

CONFIG_NAME = "mos_config.json"
WEIGHTS_NAME = "mos.safetensors"

_FORMAT = SharedFormat("a mixture of shards", "fusekit-mos-1", CONFIG_NAME, WEIGHTS_NAME)


@dataclass(frozen=True, slots=True)
class MosConfig:
    """Sizes of a mixture of shards.

    Attributes:
        target_modules: last components of the names of linear layers to adapt.
        rank: rank every layer sees.
        equivalent_rank: the budget: as many parameters as LoRA of this rank.
        private_rank: of each layer's vectors, how many no other layer uses.
        shards: pieces per vector; divides all in and out sizes.
        alpha: the update is scaled by `alpha / rank`.
        dropout: on the layer's input, in training.
        dissociate: draw the shards of A and of B independently.
        seed: of the shards each layer draws; they do not depend on the order of layers.
    """

    target_modules: tuple[str, ...]
    rank: int
    equivalent_rank: int
    private_rank: int = 0
    shards: int = 1
    alpha: float = 16.0
    dropout: float = 0.0
    dissociate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.private_rank <= min(self.equivalent_rank, self.rank):
            raise FusekitError(
                f"private_rank is {self.private_rank}, expected 0 to "
                f"{min(self.equivalent_rank, self.rank)} (equivalent_rank and rank)"
            )
        if self.shards < 1 or self.rank < 1:
            raise FusekitError(
                f"rank {self.rank} and shards {self.shards}: expected 1 or more of each"
            )


class MosPool(nn.Module):
    """Shards shared by `layers` layers: A's (e L l, in / l) and B's (e L l, out / l)."""

    def __init__(self, config: MosConfig, layers: int, inputs: int, outputs: int) -> None:
        super().__init__()
        count = config.equivalent_rank * layers * config.shards
        bound = 1 / math.sqrt(inputs)
        generator = torch.Generator().manual_seed(config.seed)
        drawn = torch.rand(count, inputs // config.shards, generator=generator)
        self.A = nn.Parameter((2 * drawn - 1) * bound)
        self.B = nn.Parameter(torch.zeros(count, outputs // config.shards))


class MosLinear(nn.Module):
    """A frozen linear layer plus `alpha / rank * B A`, the factors gathered from a pool.

    References:
        "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
        arXiv 2410.00938.
    """

    index_a: Tensor
    index_b: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        pool: MosPool,
        config: MosConfig,
        index_a: Tensor,
        index_b: Tensor,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.pool = pool
        self.rank = config.rank
        self.scaling = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("index_a", index_a)
        self.register_buffer("index_b", index_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank): rows are shards set end to end."""
        A = self.pool.A[self.index_a].reshape(self.rank, -1)
        B = self.pool.B[self.index_b].reshape(self.rank, -1).T
        return A, B

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        result: Tensor = self.base_layer(x)
        hidden = nn.functional.linear(self.dropout(x).to(A.dtype), A)
        update = nn.functional.linear(hidden, B) * self.scaling
        return result + update.to(result.dtype)


def draw_indices(config: MosConfig, layers: int, layer: int, name: str) -> tuple[Tensor, Tensor]:
    """The shards of one layer for A and for B: drawn public ones, then its private ones in order.

    Public shards are drawn without replacement from the first `(e - p) L l`.
    """
    public = (config.equivalent_rank - config.private_rank) * layers * config.shards
    shared = (config.rank - config.private_rank) * config.shards
    private = config.private_rank * config.shards
    own = torch.arange(private) + public + layer * private
    drawn = []
    for factor in ("A", "B") if config.dissociate else ("both",):
        digest = hashlib.blake2b(f"{config.seed}/{name}/{factor}".encode(), digest_size=8)
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        drawn.append(torch.cat([torch.randperm(public, generator=generator)[:shared], own]))
    return drawn[0], drawn[-1]


def attach_mos(model: nn.Module, config: MosConfig) -> list[str]:
    """Freeze a model and put a `MosLinear` in the place of every targeted linear layer.

    Layers whose names end in the same component and whose shapes are equal share a pool. Trainable
    afterwards: the pools alone, `e * L * (in + out)` parameters per type.

    Returns:
        The names of the adapted layers.

    Raises:
        FusekitError: no layer matches, shards do not divide a size, or a budget too small for the
            rank: `rank - private_rank` must not exceed `(equivalent_rank - private_rank) * L`.
    """
    groups: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in config.target_modules and _sizes(module) is not None:
            inputs, outputs = _sizes(module) or (0, 0)
            groups[last, inputs, outputs].append(name)
    if not groups:
        raise FusekitError(f"no linear layer is named {', '.join(config.target_modules)}")
    for (_, inputs, outputs), names in groups.items():
        _check_group(config, names, inputs, outputs)
    model.requires_grad_(False)
    for (_, inputs, outputs), names in groups.items():
        first = next(model.get_submodule(names[0]).parameters())
        pool = MosPool(config, len(names), inputs, outputs).to(first.device)
        for layer, name in enumerate(names):
            indices = draw_indices(config, len(names), layer, name)
            base = model.get_submodule(name)
            adapted = MosLinear(base, pool, config, *(i.to(first.device) for i in indices))
            _set_submodule(model, name, adapted)
    return [name for names in groups.values() for name in names]


def save_mos(model: nn.Module, config: MosConfig, folder: str | Path) -> None:
    """Write pools and index sets (the compact form) to a new folder."""
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    layers: dict[str, str] = {}
    for name, module in _mos_layers(model):
        owner = owners.setdefault(id(module.pool), name)
        layers[name] = owner
        if owner == name:
            tensors[f"{name}.pool_A"] = module.pool.A.detach().contiguous()
            tensors[f"{name}.pool_B"] = module.pool.B.detach().contiguous()
        tensors[f"{name}.index_a"] = module.index_a.to(torch.int32)
        tensors[f"{name}.index_b"] = module.index_b.to(torch.int32)
    _FORMAT.save(folder, tensors, {**dataclasses.asdict(config), "layers": layers})


def load_mos(model: nn.Module, folder: str | Path) -> MosConfig:
    """Attach a saved mixture to its base model, pools and index sets as they were.

    Raises:
        CheckpointError: not such a folder, a damaged one, or another base model.
    """
    facts, tensors = _FORMAT.load(folder)
    config, owners = _FORMAT.made(folder, lambda: (_config(facts), dict(facts["layers"])))
    attached = attach_mos(model, config)
    if set(attached) != set(owners):
        odd = sorted(set(attached) ^ set(owners))[0]
        raise CheckpointError(f"{folder}: layer {odd!r} is in the file or in the model, not both")

    def restore(name: str, target: Tensor, largest: int | None = None) -> None:
        stored = tensors.get(name)
        if stored is None or stored.shape != target.shape:
            found = "no tensor" if stored is None else f"shape {list(stored.shape)}"
            raise CheckpointError(
                f"{folder}: {name} has {found}, the model needs shape {list(target.shape)}"
            )
        if largest is not None and not bool(((stored >= 0) & (stored <= largest)).all()):
            raise CheckpointError(f"{folder}: {name} has indices beyond 0 to {largest}")
        target.copy_(stored)

    with torch.no_grad():
        for name, module in _mos_layers(model):
            pool = module.pool
            restore(f"{name}.index_a", module.index_a, len(pool.A) - 1)
            restore(f"{name}.index_b", module.index_b, len(pool.B) - 1)
            restore(f"{owners[name]}.pool_A", pool.A)
            restore(f"{owners[name]}.pool_B", pool.B)
    return config


def _config(facts: Mapping[str, Any]) -> MosConfig:
    fields = {field.name: facts[field.name] for field in dataclasses.fields(MosConfig)}
    return MosConfig(**{**fields, "target_modules": tuple(fields["target_modules"])})


def export_mos(
    model: nn.Module, folder: str | Path, adapter_config: dict[str, Any] | None = None
) -> None:
    """Write the assembled factors as a plain PEFT LoRA of rank `rank`."""
    with AdapterWriter(folder, adapter_config) as writer:
        for name, module in _mos_layers(model):
            A, B = (factor.detach().cpu().float().numpy() for factor in module.factors())
            writer.add(
                LoraModule(
                    name=f"{name}.weight",
                    A=A,
                    B=B,
                    alpha=module.scaling * module.rank,
                    transposed=not isinstance(module.base_layer, nn.Linear),
                )
            )


def _mos_layers(model: nn.Module) -> list[tuple[str, MosLinear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, MosLinear)]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer; transformers' Conv1D keeps its weight as (in, out)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def _check_group(config: MosConfig, names: list[str], inputs: int, outputs: int) -> None:
    if inputs % config.shards or outputs % config.shards:
        raise FusekitError(
            f"{names[0]}: {config.shards} shards do not divide its sizes {inputs} and {outputs}"
        )
    wanted = config.rank - config.private_rank
    offered = (config.equivalent_rank - config.private_rank) * len(names)
    if wanted > offered:
        raise FusekitError(
            f"{names[0]}: {wanted} shared vectors per layer are more than the {offered} that "
            f"{len(names)} layers pool; raise equivalent_rank or lower rank"
        )


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
