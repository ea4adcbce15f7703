"""Recipes whose models are LoRA adapters: checked, described, and merged into one adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from fusekit.adapters.adapter import Adapter
from fusekit.adapters.lego import LegoOptions
from fusekit.adapters.merge import (
    METHODS,
    MergeOptions,
    Settings,
    check_adapters,
    checked_weights,
    default_weight,
    merge_adapters,
)
from fusekit.adapters.peft_format import CONFIG_NAME, load_adapter
from fusekit.adapters.peft_writer import AdapterWriter, write_modules, writer_for
from fusekit.adapters.provenance import (
    Provenance,
    adapter_files,
    file_identities,
    merge_citations,
    merge_method_text,
    short_name,
)
from fusekit.checkpoint.folder import Checkpoint, adapter_folder, open_checkpoint
from fusekit.checkpoint.layers import infer_layers
from fusekit.checkpoint.references import exists, parse_reference
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.errors import FusekitError, RecipeError, did_you_mean
from fusekit.memory import peak_memory
from fusekit.methods.base import Parameter
from fusekit.methods.registry import available
from fusekit.progress import Progress
from fusekit.recipe.parameters import Lookup, read_level
from fusekit.recipe.schema import ModelEntry, Recipe

if TYPE_CHECKING:
    from fusekit.engine.run import MergeReport

ALIASES = {"task_arithmetic": "cat"}
"""Names of the recipe language for what an adapter method does exactly."""

NOT_FOR_ADAPTERS = (
    "slices",
    "modules",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "layer_scaling",
)

_WEIGHT = Parameter(
    "weight", "float", "Multiplier of the adapter's update; may be negative.", None, per_model=True
)
_DENSITY = Parameter(
    "density",
    "float",
    "Fraction of entries kept.",
    None,
    per_model=True,
    minimum=0.0,
    maximum=1.0,
)


def _choice(name: str, source: type, help_text: str) -> Parameter:
    """A parameter that takes the words of a field of the options, with its default."""
    field = next(field for field in dataclasses.fields(source) if field.name == name)
    words = get_args(get_type_hints(source)[name])
    return Parameter(name, "choice", help_text, field.default, choices=words)


_COMMON = (
    _WEIGHT,
    Parameter("lambda", "float", "Scale of the merged update.", 1.0),
    Parameter("normalize", "bool", "Divide the weights by their sum.", None),
    Parameter("rank", "int", "Rank of the result.", None, minimum=1),
    Parameter("parameter_budget", "int", "Factor entries for all modules.", None, minimum=1),
    _choice("convention", MergeOptions, "peft: as PEFT's add_weighted_adapter."),
    _choice("replacements", MergeOptions, "Tensors that several adapters save whole."),
)
_SVD = _choice("svd", MergeOptions, "Decomposition of dense results.")
_MAJORITY = _choice("majority_sign_method", MergeOptions, "What TIES counts.")
_BASIS = _choice("knots_basis", MergeOptions, "Side whose common basis KnOTS takes.")
_LEGO = (
    Parameter("iterations", "int", "Rounds of k-means.", 10, minimum=1),
    Parameter("restarts", "int", "Runs of k-means, of which the best is used.", 1, minimum=1),
    _choice("feature", LegoOptions, "Cluster pieces at unit length, or raw."),
    _choice("norm", LegoOptions, "The norm that parameter reweighting restores."),
    Parameter("parameter_reweighting", "bool", "Give centres their members' mean norm.", True),
    Parameter("output_reweighting", "bool", "Scale by sqrt(source rank / output rank).", True),
    Parameter("canonicalize", "bool", "Align signs and sizes of pieces first.", False),
)


def parameters_of(method: str) -> tuple[Parameter, ...]:
    """The parameters a recipe may give an adapter method.

    >>> [p.name for p in parameters_of("cat")][:3]
    ['weight', 'lambda', 'normalize']
    """
    found = list(_COMMON)
    if method.startswith(("ties", "dare", "magnitude_prune", "knots")):
        found.append(_DENSITY)
    if "ties" in method and not method.startswith("knots"):
        found.append(_MAJORITY)
    if method.endswith("svd"):
        found.append(_SVD)
    if method.startswith("knots"):
        found.append(_BASIS)
    if method == "lora_lego":
        found += _LEGO
    return tuple(found)


def _of_the_whole(method: str) -> tuple[str, ...]:
    """Parameters that cannot differ from tensor to tensor."""
    return ("parameter_budget", *(("density", "knots_basis") if method.startswith("knots") else ()))


@dataclass(frozen=True, slots=True)
class _AdapterMethod:
    """A method of merging adapters, as recipes' settings are read for it."""

    method: str
    parameters: tuple[Parameter, ...]

    @property
    def name(self) -> str:
        return f"{self.method} of adapters"

    def parameter(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name), None)


class _Values:
    """Weights and options of every tensor, from settings that may depend on depth and name.

    Args:
        positions: depth of every tensor within a numbered block, 0 to 1.
    """

    def __init__(self, recipe: Recipe, method: str, positions: Mapping[str, float]) -> None:
        known = _AdapterMethod(method, parameters_of(method))
        common = read_level(recipe.parameters, known, "parameters")
        levels = {"parameters": common}
        for i, entry in enumerate(recipe.models or ()):
            place = f"models[{i}].parameters"
            levels[place] = read_level(entry.parameters, known, place)
            for name in levels[place]:
                if not _PARAMETERS[name].per_model:
                    raise RecipeError(
                        f"{place}.{name}: belongs to the whole merge, under parameters"
                    )
        for place, level in levels.items():
            for name in _of_the_whole(method):
                if name in level and not level[name].is_constant:
                    raise RecipeError(
                        f"{place}.{name}: holds for the whole merge, expected a single value"
                    )
        own = list(levels.values())[1:]
        self._recipe, self._method, self._positions = recipe, method, positions
        self._shared = Lookup(known, [common], per_model=False)
        self._own = [Lookup(known, [level, common], per_model=True) for level in own]

    @property
    def is_constant(self) -> bool:
        return all(lookup.is_constant for lookup in (self._shared, *self._own))

    def __call__(self, tensor: str) -> Settings:
        depth = self._positions.get(tensor, 0.0)
        common = self._shared.values(tensor=tensor, position=depth, whose="parameters")
        own = [
            lookup.values(tensor=tensor, position=depth, whose=f"models[{i}]")
            for i, lookup in enumerate(self._own)
        ]
        place = "" if self.is_constant else f" in tensor {tensor!r}"
        weights = _complete("weight", [values["weight"] for values in own], place)
        densities = _complete("density", [values.get("density") for values in own], place)
        return self._weights(common, weights, place), _options(self._recipe, common, densities)

    def _weights(
        self, common: Mapping[str, Any], given: Sequence[float], place: str
    ) -> tuple[float, ...]:
        """The adapters' weights, normalised if asked for, times lambda."""
        count = len(self._own)
        weights = list(given) or [default_weight(self._method, count)] * count
        if common["normalize"]:
            total = sum(weights)
            if total == 0:
                raise RecipeError(f"parameters.normalize: the weights sum to 0{place}")
            weights = [weight / total for weight in weights]
        return tuple(weight * common["lambda"] for weight in weights)


def _complete(what: str, given: Sequence[float | None], place: str) -> list[float]:
    """Every adapter's value, or nothing if none has one."""
    found = [value for value in given if value is not None]
    if found and len(found) < len(given):
        raise RecipeError(
            f"models[{given.index(None)}]: has no {what} while others have one{place}"
        )
    return found


@dataclass(frozen=True, eq=False, slots=True)
class AdapterPlan:
    """A recipe of adapters, checked: what is merged, and how.

    Attributes:
        method: one of `fusekit.adapters.METHODS`.
        folders: the adapters' folders or files, in the order of the recipe.
        weights: what each adapter counts, `normalize` and `lambda` included.
        options: see `MergeOptions`.
        vary: weights and options by tensor name where they differ, else None; `weights` and
            `options` are then those of the first tensor.
    """

    recipe: Recipe
    method: str
    folders: tuple[Path, ...]
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    options: MergeOptions
    base: Checkpoint | None
    vary: Callable[[str], Settings] | None = None

    def settings(self, tensor: str) -> Settings:
        """Weights and options of one tensor."""
        return (self.weights, self.options) if self.vary is None else self.vary(tensor)

    @property
    def references(self) -> list[str]:
        return [entry.model for entry in self.recipe.models or ()]

    @property
    def modules(self) -> list[str]:
        """Names of the base tensors that the merged adapter updates."""
        return list(dict.fromkeys(name for adapter in self.adapters for name in adapter.modules))

    def module_bytes(self) -> dict[str, int]:
        """Size of all adapters' factors of every module."""
        sizes = dict.fromkeys(self.modules, 0)
        for adapter in self.adapters:
            for name in adapter.modules:
                module = adapter.outline(name) or adapter.modules[name]
                sizes[name] += module.A.nbytes + module.B.nbytes
        return sizes

    def input_bytes(self) -> list[int]:
        """Size of every adapter on the disk."""
        return [sum(f.stat().st_size for f in adapter_files(folder)) for folder in self.folders]


def merges_adapters(recipe: Recipe) -> bool:
    """Whether a recipe merges adapters with each other, rather than models.

    It does if its method only exists for adapters, or if its models are folders with an
    adapter_config.json. `model+adapter` is a model.

    Raises:
        RecipeError: both adapters and models, or adapters where a recipe cannot have them.
    """
    for stage in recipe.stages:
        if merges_adapters(stage):
            raise RecipeError(
                f"document {stage.name!r} merges adapters: a recipe of adapters stands alone, "
                "merge them first and name the folder"
            )
    entries = recipe.models or []
    kinds = [_kind(entry.model, recipe.folder) for entry in entries]
    own = recipe.merge_method in METHODS and recipe.merge_method not in available()
    if not own and "adapter" not in kinds:
        return False
    if recipe.stages:
        raise RecipeError("a recipe of adapters has one document: merge the others first")
    if "model" in kinds:
        i = kinds.index("model")
        reason = (
            f"merge_method {recipe.merge_method!r} merges adapters"
            if own
            else f"{entries[kinds.index('adapter')].model!r} is an adapter"
        )
        raise RecipeError(
            f"models[{i}]: {entries[i].model!r} is a full model, but {reason}: the two do not "
            "merge with each other; write base+adapter to fold an adapter into its base"
        )
    return True


def plan_adapters(recipe: Recipe, component: str | None = None) -> AdapterPlan:
    """Check a recipe of adapters and open them. Reads headers only.

    Args:
        component: the part of files that hold LoRA for several models, see `load_adapter`.

    Raises:
        RecipeError: unknown method or parameters, values out of range, keys of the recipe that mean
            nothing for adapters.
        CheckpointError: an adapter that cannot be read.

    Example:
        >>> plan_adapters(fusekit.load_recipe("recipe.yml")).weights  # doctest: +SKIP
        (0.5, 0.5)
    """
    method = _method(recipe.merge_method)
    _refuse_keys(recipe)
    folders = tuple(_folder(entry, recipe.folder) for entry in recipe.models or ())
    base = None if recipe.base_model is None else open_checkpoint(recipe.base_model, recipe.folder)
    names = None if base is None else list(base.source.tensors)
    adapters = tuple(load_adapter(folder, names, component) for folder in folders)
    tensors = dict.fromkeys(t for a in adapters for t in (*a.modules, *a.replacements))
    layers = infer_layers(tensors if names is None else names)
    depth = {name: layer.position for name, layer in layers.items() if layer is not None}
    values = _Values(recipe, method, depth)
    varying = [next(iter(tensors), "")] if values.is_constant else list(tensors)
    for tensor in varying:
        settings = values(tensor)
        try:
            checked_weights(adapters, method, *settings)
        except FusekitError as error:
            where = "" if values.is_constant else f"tensor {tensor!r}: "
            raise RecipeError(f"{where}{error}") from None
    source = None if base is None else base.source
    check_adapters(adapters, method, values, source)
    weights, options = values(varying[0])
    vary = None if values.is_constant else values
    return AdapterPlan(recipe, method, folders, adapters, tuple(weights), options, base, vary)


def merge_recipe(
    recipe: Recipe,
    out: Path,
    *,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge the adapters of a recipe into a new PEFT folder with a manifest.

    Until it is complete, the folder is called `<out>.partial`. Whatever takes more than seconds
    notes there what is finished; with `resume` the same merge goes on from that, another one
    starts over. `on_progress` is called after every module, counting the bytes of the adapters'
    factors.

    Raises:
        RecipeError, CheckpointError, FusekitError: see `plan_adapters` and `merge_adapters`.
    """
    from fusekit.checkpoint.writer import check_target

    check_target(out, overwrite)
    from fusekit.engine.run import MergeReport

    written = merge_planned(
        plan_adapters(recipe),
        out,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        on_progress=on_progress,
    )
    return MergeReport(out=out, peak_rss=peak_memory(), **dataclasses.asdict(written))


@dataclass(frozen=True, slots=True)
class Written:
    """What a merge of adapters did: bytes are those of tensors, times in seconds."""

    tensors: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    cpu_seconds: float
    warnings: tuple[str, ...]


def merge_planned(
    plan: AdapterPlan,
    out: Path,
    *,
    threads: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Carry out a plan; arguments as of `merge_recipe`. Closes the plan's base."""
    begun, cpu = time.monotonic(), time.process_time()
    base = None if plan.base is None else plan.base.source
    told_of: dict[tuple[str, str], None] = {}

    def tell(remark: str, module: str) -> None:
        told_of[remark, module] = None

    try:
        merged = merge_adapters(
            plan.adapters, plan.method, plan.weights, plan.options, base, plan.vary, tell
        )
        options = {"provenance": _provenance(plan), "overwrite": overwrite, "resume": resume}
        with writer_for(merged, out, **options) as writer:
            told = None if on_progress is None else _telling(plan, writer, begun, on_progress)
            write_modules(merged, writer, threads, told)
    finally:
        if base is not None:
            base.close()
    with contextlib.closing(open_checkpoint(str(out)).source) as written:
        sizes = [info.nbytes for info in written.tensors.values()]
    return Written(
        tensors=len(sizes),
        resumed=writer.resumed_tensors,
        bytes_read=sum(plan.input_bytes()),
        bytes_written=sum(sizes),
        seconds=time.monotonic() - begun,
        cpu_seconds=time.process_time() - cpu,
        warnings=(*_left_out(plan), *_redone(writer), *_remarks(told_of)),
    )


def _remarks(told_of: Collection[tuple[str, str]]) -> tuple[str, ...]:
    """What methods had to say, each once, whatever the order in which modules were merged."""
    if not told_of:
        return ()
    from fusekit.engine.executor import with_tensors

    return with_tensors(sorted(told_of))


def _left_out(plan: AdapterPlan) -> list[str]:
    """What files that hold LoRA for several models have besides what was read."""
    return [
        f"{adapter.label}: {count} tensors of {component} were left out"
        for adapter in plan.adapters
        for component, count in adapter.left_out.items()
    ]


def _redone(writer: AdapterWriter) -> list[str]:
    if not writer.redone_modules:
        return []
    return [
        f"merged {writer.redone_modules} module(s) again that an interrupted run had finished, as "
        "bytes had changed since"
    ]


def _telling(
    plan: AdapterPlan,
    writer: AdapterWriter,
    begun: float,
    on_progress: Callable[[Progress], None],
) -> Callable[[str], None]:
    """What to call after every module so that `on_progress` is told how far the merge is."""
    sizes = plan.module_bytes()
    total = sum(sizes.values())
    done = sum(sizes[name] for name in writer.finished)

    def merged(module: str) -> None:
        nonlocal done
        done += sizes[module]
        on_progress(Progress(done, total, time.monotonic() - begun))

    return merged


def _method(name: str) -> str:
    method = ALIASES.get(name, name)
    if method not in METHODS:
        near = did_you_mean(name, [*METHODS, *ALIASES])
        raise RecipeError(f"merge_method {name!r} does not merge adapters{near}")
    return method


def _refuse_keys(recipe: Recipe) -> None:
    for key in NOT_FOR_ADAPTERS:
        if getattr(recipe, key) is not None:
            raise RecipeError(f"{key}: does not apply to adapters, whose recipes have models")
    for key, plain in (("missing", "error"), ("granularity", "tensor")):
        if getattr(recipe, key) != plain:
            raise RecipeError(f"{key}: does not apply to adapters")


def _options(recipe: Recipe, common: Mapping[str, Any], densities: Sequence[float]) -> MergeOptions:
    lego = {name: value for name, value in common.items() if name in _LEGO_FIELDS}
    plain = {name: value for name, value in common.items() if name in _MERGE_FIELDS}
    return dataclasses.replace(
        MergeOptions(**{**plain, "density": list(densities) or None}),
        dtype=recipe.out_dtype or recipe.dtype,
        seed=recipe.seed,
        lego=LegoOptions(**lego),
    )


_PARAMETERS = {p.name: p for p in (*_COMMON, _DENSITY, _MAJORITY, _SVD, _BASIS, *_LEGO)}
_LEGO_FIELDS = {field.name for field in dataclasses.fields(LegoOptions)}
_MERGE_FIELDS = {field.name for field in dataclasses.fields(MergeOptions)}


def _candidates(text: str, folder: Path | None) -> list[Path]:
    path = Path(text).expanduser()
    return [path] if folder is None else [path, folder / path]


def _kind(reference: str, folder: Path | None) -> Literal["adapter", "model", "unknown"]:
    """What a reference names, as far as a look at the disk tells."""
    path = next((p for p in _candidates(reference, folder) if exists(p)), None)
    if path is None:
        return "unknown" if parse_reference(reference).lora is None else "model"
    if path.is_file():
        if path.suffix != ".safetensors":
            return "unknown"
        return "adapter" if _holds_factors(path) else "model"
    return "adapter" if (path / CONFIG_NAME).is_file() else "model"


def _holds_factors(path: Path) -> bool:
    """Whether a safetensors file is an adapter's, as its tensors' names say."""
    with contextlib.closing(SafetensorsFile(path)) as file:
        return any(
            ".lora_" in name or "_lora." in name or ".lora." in name for name in file.tensors
        )


def _folder(entry: ModelEntry, folder: Path | None) -> Path:
    """Where an adapter is: on this disk, or fetched from the hub."""
    for path in _candidates(entry.model, folder):
        if exists(path):
            return path
    parsed = parse_reference(entry.model)
    return adapter_folder(entry.model, parsed.model, parsed.revision, folder)


def _provenance(plan: AdapterPlan) -> Provenance:
    names = [short_name(reference) for reference in plan.references]
    several = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    inputs = [
        file_identities(reference, adapter_files(folder))
        for reference, folder in zip(plan.references, plan.folders, strict=True)
    ]
    if plan.base is not None:
        inputs.append({"reference": plan.base.reference, **plan.base.source.identity()})
    return Provenance(
        title=f"Merge of {several}",
        text=f"`{plan.method}`: {merge_method_text(plan.method)}",
        record={"recipe": plan.recipe.model_dump(exclude_defaults=True, mode="json")},
        inputs=inputs,
        tags=("merge", plan.method),
        citations=merge_citations(plan.method),
    )
