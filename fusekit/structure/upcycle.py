"""Dense models of one shape into a mixture of experts: each model's MLPs become an expert.

Everything but the MLPs comes from the base. Weights stream from the models to the output.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusekit.checkpoint.dtypes import DType, dtype_named
from fusekit.checkpoint.folder import Checkpoint, open_checkpoint
from fusekit.checkpoint.layout import DEFAULT_SHARD_BYTES
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.safetensors import ShardedSource
from fusekit.checkpoint.source import TensorInfo, TensorSource
from fusekit.checkpoint.views import RenamedSource
from fusekit.checkpoint.writer import check_target
from fusekit.engine.operands import choose_operands
from fusekit.engine.plan import Plan
from fusekit.engine.planner import plan_checkpoints
from fusekit.engine.run import MergeReport, run_plan
from fusekit.errors import CheckpointError, RecipeError, did_you_mean
from fusekit.methods.registry import find
from fusekit.recipe.documents import read_documents
from fusekit.recipe.schema import Reference, load_recipe
from fusekit.structure.fused import StackedSource
from fusekit.structure.layouts import PROJECTIONS, MoeLayout, choose_layout, complete_config
from fusekit.structure.prompts import GateMode, prompt_rows
from fusekit.structure.routers import Array, degenerate_layers

_MLP = re.compile(r"^(?P<layer>.*\blayers\.(?P<index>\d+))\.mlp\.(?P<name>\w+)\.weight$")
_RANDOM = ("random", "uniform_random")
_NOISE_ELEMENTS = 1 << 16
_ROUTER = "mlp.gate.weight"
"""A router's name beside fused experts."""

METHOD = replace(
    find("passthrough"),
    name="moe",
    title="Mixture of experts from dense models",
    summary="Attention, norms and embeddings of a base model, MLPs of every model as experts.",
    formula="y = sum_e softmax_top-k(R h)_e MLP_e(h)",
    references=(
        "Komatsuzaki et al., Sparse Upcycling: Training Mixture-of-Experts from Dense "
        "Checkpoints, ICLR 2023, arXiv 2212.05055",
        "Sukhbaatar et al., Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM, "
        "2024, arXiv 2403.07816",
    ),
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expert(_Strict):
    """A model whose MLPs become one expert, and prompts that should be routed to it."""

    source_model: Reference
    positive_prompts: list[str] = Field(default_factory=list)
    negative_prompts: list[str] = Field(default_factory=list)
    noise_scale: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    residual_scale: float | None = Field(default=None, allow_inf_nan=False)


class MoeRecipe(_Strict):
    """Which models make up a mixture of experts, and how its routers begin."""

    base_model: Reference
    experts: list[Expert] = Field(min_length=1)
    shared_experts: list[Expert] = Field(default_factory=list)
    gate_mode: GateMode = "hidden"
    experts_per_token: int = Field(default=2, ge=1)
    architecture: str | None = None
    fused_experts: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class UpcycleReport:
    """What was written, and what the user should know about it."""

    report: MergeReport
    layout: str
    warnings: tuple[str, ...]


def load_moe_recipe(source: str | Path | Mapping[str, Any]) -> MoeRecipe:
    """A checked recipe from a YAML file or a mapping.

    Raises:
        RecipeError: not YAML, unknown keys, wrong values, settings that cannot work.
    """
    label = "recipe" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_documents(Path(source))[0]
    try:
        recipe = MoeRecipe.model_validate(dict(content))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        hint = ""
        if problem["type"] == "extra_forbidden":
            inside = Expert if len(problem["loc"]) > 1 else MoeRecipe
            hint = did_you_mean(str(problem["loc"][-1]), inside.model_fields)
            raise RecipeError(f"{label}: unknown key {place!r}{hint}") from None
        raise RecipeError(f"{label}: {place}: {problem['msg'].lower()}") from None
    _check_experts(recipe)
    return recipe


def _check_experts(recipe: MoeRecipe) -> None:
    count = len(recipe.experts)
    if recipe.experts_per_token > count:
        raise RecipeError(
            f"experts_per_token: found {recipe.experts_per_token}, expected at most the "
            f"{count} experts"
        )
    if recipe.gate_mode in _RANDOM:
        return
    for i, expert in enumerate(recipe.experts):
        if not expert.positive_prompts:
            raise RecipeError(
                f"experts[{i}].positive_prompts is missing: gate_mode {recipe.gate_mode} makes "
                "routers from prompts; write some, or use gate_mode: random and train"
            )
    prompts = {(*e.positive_prompts, None, *e.negative_prompts) for e in recipe.experts}
    if count > 1 and len(prompts) == 1:
        raise RecipeError(
            "experts: all have the same prompts, so the router cannot tell them apart"
        )
    made = {(expert.source_model, expert.residual_scale) for expert in recipe.experts}
    if count > 1 and len(made) == 1 and not any(expert.noise_scale for expert in recipe.experts):
        raise RecipeError(
            "experts: all are the same model, so the mixture equals it; use different models, a "
            "noise_scale, or gate_mode: random and train"
        )


def upcycle(
    recipe: str | Path | Mapping[str, Any] | MoeRecipe,
    out: str | Path,
    *,
    threads: int | None = None,
    out_shard_size: int = DEFAULT_SHARD_BYTES,
    resume: bool = True,
    overwrite: bool = False,
    device: str = "cpu",
) -> UpcycleReport:
    """Build a mixture-of-experts checkpoint from dense models.

    `R_l` (experts, H), the router of layer `l`, has one row of length 1 per expert: what its
    positive prompts look like in the base, less what its negative prompts do. `hidden`: the layer's
    input at the last position; `hidden_avg`: averaged over the prompt; `gate_input`: what the
    router itself will see (the MLP's input, after the norm); `cheap_embed`: the sum of token
    embeddings; `random`: N(0, 1); `uniform_random`: U(-1/sqrt(H), 1/sqrt(H)).

    Args:
        recipe: path of a YAML file, a mapping, or a recipe.
        out: the folder to create.
        threads: worker threads.
        out_shard_size: largest size of a weight file in bytes.
        resume: continue a run that was interrupted; False starts over.
        overwrite: replace `out` if it exists, once the new one is complete.
        device: where the base model is run, for modes that run it.

    Raises:
        RecipeError, CheckpointError: settings or models that do not go together.

    References:
        Sparse Upcycling, arXiv 2212.05055. Branch-Train-MiX, arXiv 2403.07816.
    """
    folder = None
    if isinstance(recipe, (str, Path)):
        folder = Path(recipe).absolute().parent
    parsed = recipe if isinstance(recipe, MoeRecipe) else load_moe_recipe(recipe)
    target = Path(out).resolve()
    check_target(target, overwrite)
    with _opened(parsed, folder) as models:
        mixture = _Mixture(parsed, models)
        routers = mixture.routers(device)
        plan = _plan(parsed, mixture, routers, out_shard_size)
        report = run_plan(plan, target, threads=threads, resume=resume, overwrite=overwrite)
    return UpcycleReport(report, mixture.layout.name, mixture.warnings(routers))


@contextlib.contextmanager
def _opened(recipe: MoeRecipe, folder: Path | None) -> Iterator[dict[str, Checkpoint]]:
    models: dict[str, Checkpoint] = {}
    try:
        for expert in (None, *recipe.experts, *recipe.shared_experts):
            reference = recipe.base_model if expert is None else expert.source_model
            if reference not in models:
                models[reference] = open_checkpoint(reference, folder)
        yield models
    finally:
        for checkpoint in models.values():
            checkpoint.source.close()


class _Mixture:
    """The tensors of a mixture, as views of those of the dense models."""

    def __init__(self, recipe: MoeRecipe, models: Mapping[str, Checkpoint]) -> None:
        self.recipe = recipe
        self.base = models[recipe.base_model]
        self._models = models
        self.config = complete_config(self.base.config() or {})
        self.layout: MoeLayout = choose_layout(
            recipe.architecture, self.config.get("model_type"), len(recipe.shared_experts)
        )
        if recipe.fused_experts and not self.layout.fusable:
            raise RecipeError(
                f"fused_experts: no program reads fused experts of {self.layout.name}; leave it out"
            )
        self._mlp = {
            name: match
            for name in self.base.source.tensors
            if (match := _MLP.match(name)) and match["name"] in PROJECTIONS
        }
        found = {match["layer"] for match in self._mlp.values()}
        self.layers = sorted(found, key=lambda layer: int(layer.rpartition(".")[2]))
        if not self.layers or len(self._mlp) != 3 * len(self.layers):
            raise CheckpointError(
                f"{self.base.source.label}: expected gate_proj, up_proj and down_proj in the mlp "
                "of every layer"
            )
        if self.layout.correction is not None and len(recipe.experts) < 2:
            raise RecipeError(f"experts: found 1, expected at least 2 for {self.layout.name}")
        gate = self.base.source.tensors[f"{self.layers[0]}.mlp.gate_proj.weight"]
        self.hidden = gate.shape[1]
        self.config.setdefault("intermediate_size", gate.shape[0])
        self.dtype = dtype_named(recipe.dtype) if recipe.dtype else gate.dtype

    def source(self, routers: tuple[Array, Array | None]) -> TensorSource:
        """Everything together, under the names of the layout."""
        kept = {name: name for name in self.base.source.tensors if name not in self._mlp}
        parts: list[TensorSource] = [RenamedSource(self.base.source, kept)]
        for i, expert in enumerate(self.recipe.experts):
            parts.append(self._expert(expert, self.layout.expert, i))
        for expert in self.recipe.shared_experts:
            assert self.layout.shared is not None
            parts.append(self._expert(expert, self.layout.shared, len(self.recipe.experts)))
        parts.append(MemorySource(self._made(routers), "routers"))
        whole = ShardedSource(self.base.source.label, parts)
        return self._fused(whole) if self.recipe.fused_experts else whole

    def _fused(self, source: TensorSource) -> TensorSource:
        """`gate_up_proj` (experts, 2 I, H), gate before up, and `down_proj` (experts, H, I)."""
        count = len(self.recipe.experts)
        stacks: dict[str, tuple[list[str], tuple[int, ...]]] = {}
        for layer in self.layers:
            inner, hidden = self.base.source.tensors[f"{layer}.mlp.gate_proj.weight"].shape
            for name, projections, shape in (
                ("gate_up_proj", ("gate_proj", "up_proj"), (count, 2 * inner, hidden)),
                ("down_proj", ("down_proj",), (count, hidden, inner)),
            ):
                parts = [
                    f"{layer}.{self._expert_name(i, projection)}"
                    for i in range(count)
                    for projection in projections
                ]
                stacks[f"{layer}.mlp.experts.{name}"] = parts, shape
        stacked = StackedSource(source, stacks, self.dtype)
        router = {f"{layer}.{self.layout.router}": f"{layer}.{_ROUTER}" for layer in self.layers}
        return RenamedSource(stacked, {router.get(name, name): name for name in stacked.tensors})

    def _expert_name(self, expert: int, projection: str) -> str:
        renamed = self.layout.projections[projection]
        return self.layout.expert.format(expert=expert, projection=renamed)

    def has_other_types(self) -> bool:
        """Whether experts come in another element type than the base's MLPs."""
        experts = (*self.recipe.experts, *self.recipe.shared_experts)
        offered = [self._models[expert.source_model].source.tensors for expert in experts]
        return any(tensors[name].dtype != self.dtype for tensors in offered for name in self._mlp)

    def _expert(self, expert: Expert, pattern: str, index: int) -> TensorSource:
        model = self._models[expert.source_model]
        names = {}
        for name, match in self._mlp.items():
            info, own = model.source.tensors.get(name), self.base.source.tensors[name]
            if info is None or info.shape != own.shape:
                found = "nothing" if info is None else f"shape {list(info.shape)}"
                raise CheckpointError(
                    f"{model.source.label}: tensor {name!r}: found {found}, expected shape "
                    f"{list(own.shape)} as in {self.base.source.label}"
                )
            inner = pattern.format(expert=index, projection=self.layout.projections[match["name"]])
            names[f"{match['layer']}.{inner}"] = name
        view = RenamedSource(model.source, names)
        if expert.noise_scale is None and expert.residual_scale is None:
            return view
        down = self.layout.projections["down_proj"]
        scaled = {
            name: 1.0 if expert.residual_scale is None else expert.residual_scale
            for name in names
            if name.endswith(f".{down}.weight")
        }
        return AdjustedSource(view, expert.noise_scale or 0.0, scaled, self.recipe.seed)

    def _made(self, routers: tuple[Array, Array | None]) -> dict[str, Array]:
        """Tensors that no dense model has: routers, gates of shared experts, zero biases."""
        kind = self.dtype.numpy
        made: dict[str, Array] = {}
        gates, shared = routers
        if self.layout.correction is not None:
            gates = gates * self.hidden**-0.5
        for i, layer in enumerate(self.layers):
            made[f"{layer}.{self.layout.router}"] = gates[i].astype(kind)
            if self.layout.correction is not None:
                made[f"{layer}.{self.layout.correction}"] = np.zeros(len(gates[i]), np.float32)
            if self.layout.correction is not None and not self.recipe.shared_experts:
                made |= self._empty_shared(layer)
            if self.layout.shared_gate is not None and shared is not None:
                made[f"{layer}.{self.layout.shared_gate}"] = shared[i].astype(kind)
            if self.layout.attention_biases:
                for name in ("q_proj", "k_proj", "v_proj"):
                    place = f"{layer}.self_attn.{name}"
                    if f"{place}.bias" not in self.base.source.tensors:
                        rows = self.base.source.tensors[f"{place}.weight"].shape[0]
                        made[f"{place}.bias"] = np.zeros(rows, kind)
        return made

    def _empty_shared(self, layer: str) -> dict[str, Array]:
        """Shared experts without a neuron, which the class has where there are none."""
        assert self.layout.shared is not None
        shapes = {"gate_proj": (0, self.hidden), "down_proj": (self.hidden, 0)}
        return {
            f"{layer}.{self.layout.shared.format(projection=name)}": np.zeros(
                shapes.get(name, shapes["gate_proj"]), self.dtype.numpy
            )
            for name in PROJECTIONS
        }

    def routers(self, device: str) -> tuple[Array, Array | None]:
        """(layers, experts, H) rows of the experts, and (layers, 1, H) of the shared one."""
        recipe, layers = self.recipe, len(self.layers)
        shape = (layers, len(recipe.experts), self.hidden)
        shared_shape = (layers, 1, self.hidden)
        if recipe.gate_mode in _RANDOM:
            rng = np.random.Generator(np.random.Philox(recipe.seed))
            bound = self.hidden**-0.5
            if recipe.gate_mode == "random":
                return rng.standard_normal(shape), rng.standard_normal(shared_shape)
            return rng.uniform(-bound, bound, shape), rng.uniform(-bound, bound, shared_shape)
        rows = prompt_rows(self.base, recipe.gate_mode, layers, device)

        def each(experts: Sequence[Expert]) -> Array:
            found = [rows(e.positive_prompts, e.negative_prompts) for e in experts]
            return np.stack(found, axis=1)

        prompted = [expert for expert in recipe.shared_experts if expert.positive_prompts]
        # Without prompts the shared expert's gate is zero, which lets half of it through.
        shared = each(prompted) if prompted else np.zeros(shared_shape)
        return each(recipe.experts), shared

    def output_config(self) -> dict[str, Any]:
        settings = self.layout.settings(
            self.config,
            len(self.recipe.experts),
            self.recipe.experts_per_token,
            len(self.recipe.shared_experts),
        )
        kept = {key: value for key, value in self.config.items() if key != "auto_map"}
        dtype_key = "torch_dtype" if "torch_dtype" in kept else "dtype"
        return {
            **kept,
            "model_type": self.layout.model_type,
            "architectures": [self.layout.architecture],
            **settings,
            **({dtype_key: self.recipe.dtype} if self.recipe.dtype else {}),
        }

    def warnings(self, routers: tuple[Array, Array | None]) -> tuple[str, ...]:
        """What may go wrong with a mixture that was made as asked."""
        found = []
        count = len(self.recipe.experts)
        if count & (count - 1):
            found.append(f"{count} experts: some runtimes expect a power of two")
        alike = degenerate_layers(routers[0]) if self.recipe.gate_mode not in _RANDOM else []
        if alike:
            named = ", ".join(map(str, alike[:8])) + (", ..." if len(alike) > 8 else "")
            found.append(
                f"the prompts are too similar for the routers of {len(alike)} layers to tell "
                f"experts apart (condition number above 5): layers {named}"
            )
        return tuple(found)


class AdjustedSource(TensorSource):
    """Tensors with Gaussian noise added, then scaled.

    The noise depends on the seed, the tensor and the element, not on how it is read.

    Args:
        source: where the tensors are.
        noise: standard deviation.
        scales: factors of single tensors, 1 for the others.
        seed: of the noise.
    """

    def __init__(
        self, source: TensorSource, noise: float, scales: Mapping[str, float], seed: int
    ) -> None:
        self.label = source.label
        self._source, self._noise, self._scales, self._seed = source, noise, scales, seed

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self._source.read_into(name, start, stop, out)
        kind: DType = self._source.tensors[name].dtype
        values = np.frombuffer(out, kind.numpy)
        wide = values.astype(np.float64)
        if self._noise:
            wide += self._noise * self._normals(name, start, stop)
        values[:] = (wide * self._scales.get(name, 1.0)).astype(kind.numpy)

    def _normals(self, name: str, start: int, stop: int) -> Array:
        first, last = start // _NOISE_ELEMENTS, -(-stop // _NOISE_ELEMENTS)
        chunks = []
        for chunk in range(first, last):
            key = xxhash.xxh3_64_intdigest(f"{self._seed}/{name}/{chunk}".encode())
            chunks.append(
                np.random.Generator(np.random.Philox(key)).standard_normal(_NOISE_ELEMENTS)
            )
        begin = first * _NOISE_ELEMENTS
        normals: Array = np.concatenate(chunks)[start - begin : stop - begin]
        return normals

    def where(self, name: str) -> str:
        return self._source.where(name)

    def identity(self) -> dict[str, Any]:
        return {**self._source.identity(), "noise": self._noise, "seed": self._seed}

    def close(self) -> None:
        self._source.close()


def _plan(
    recipe: MoeRecipe, mixture: _Mixture, routers: tuple[Array, Array | None], shard_bytes: int
) -> Plan:
    """The mixture as a plan that copies it, so that it is written, resumed and verified as any."""
    content: dict[str, Any] = {
        "merge_method": "passthrough",
        "models": [{"model": recipe.base_model}],
    }
    source = mixture.source(routers)
    if recipe.dtype is not None or mixture.has_other_types():
        content["dtype"] = mixture.dtype.torch_name
    copying = load_recipe(content)
    whole = replace(mixture.base, source=source)
    plan = plan_checkpoints(copying, METHOD, choose_operands(copying, METHOD), [whole], shard_bytes)
    return replace(
        plan,
        recipe=recipe.model_dump(mode="json", exclude_defaults=True),
        config=mixture.output_config(),
    )
