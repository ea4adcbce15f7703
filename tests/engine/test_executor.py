"""What the executor refuses, reports, copies and converts."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusekit import CheckpointError, FusekitError, RecipeError, merge_state_dicts
from fusekit.checkpoint.memory import MemorySource
from fusekit.checkpoint.safetensors import SafetensorsFile
from fusekit.engine.executor import Executor
from tests.engine.support import ArraySink, execute, plan_of, random_models, write_model

Array = np.ndarray[Any, np.dtype[Any]]

EQUAL = {"parameters": {"weight": 1.0}}
ENGINES = [
    {"threads": 1},
    {"threads": 2, "resident_bytes": 0},
    {"threads": 2, "resident_bytes": 0, "block_elements": 8192},
]
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=["default", "streaming", "small"])

# One pass, a Gram matrix, order statistics in one tensor and over the model.
WAYS = {
    "linear": ("linear", {"weight": 1.0}, "tensor"),
    "slerp": ("slerp", {"t": 0.5}, "tensor"),
    "ties": ("ties", {"density": 0.3}, "tensor"),
    "ties-model": ("ties", {"density": 0.3}, "model"),
}
every_way = pytest.mark.parametrize(
    ("method", "parameters", "granularity"), WAYS.values(), ids=WAYS.keys()
)


def with_nonfinite(size: int) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """A base and two models; the second's tensor `bad` has five NaN or infinite entries."""
    base, models = random_models({"good": (100,), "bad": (size,)}, 2)
    bad = models[1]["bad"]
    bad[[0, size // 2]] = np.nan
    bad[size // 3 : size // 3 + 2] = np.inf
    bad[-1] = -np.inf
    return base, models


# -- NaN and infinity --------------------------------------------------------------------------


@every_engine
@every_way
@pytest.mark.parametrize("size", [50, 20_000, (1 << 21) + 5])
def test_nonfinite_values_are_refused_with_tensor_and_exact_count(
    size: int, method: str, parameters: dict[str, Any], granularity: str, engine: dict[str, Any]
) -> None:
    base, models = with_nonfinite(size)
    origin = base if method == "ties" else None
    with pytest.raises(CheckpointError) as caught:
        execute(
            models,
            method,
            origin,
            parameters=parameters,
            granularity=granularity,
            engine=engine,
        )
    assert str(caught.value).startswith("model 1: tensor 'bad' has 5 NaN or infinite values")


@every_engine
@every_way
def test_nonfinite_values_that_are_allowed_are_reported_with_exact_count(
    method: str, parameters: dict[str, Any], granularity: str, engine: dict[str, Any]
) -> None:
    base, models = with_nonfinite(30_000)
    _, execution, _ = execute(
        models,
        method,
        base if method == "ties" else None,
        parameters=parameters,
        granularity=granularity,
        engine={**engine, "allow_nonfinite": True},
    )
    (found,) = execution.nonfinite
    assert (found.tensor, found.model, found.count) == ("bad", "model 1", 5)


def test_allowed_nonfinite_values_reach_the_output_and_nothing_else_changes() -> None:
    _, models = with_nonfinite(1000)
    clean = [dict(models[0]), {**models[1], "bad": np.nan_to_num(models[1]["bad"])}]
    merged, _, _ = execute(models, "linear", engine={"allow_nonfinite": True}, **EQUAL)
    expected, _, _ = execute(clean, "linear", **EQUAL)
    finite = np.isfinite(models[1]["bad"])
    assert np.count_nonzero(~np.isfinite(merged["bad"])) == 5
    np.testing.assert_array_equal(merged["bad"][finite], expected["bad"][finite])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_nonfinite_values_of_every_type_are_counted(dtype: str) -> None:
    values = np.ones(5000, np.float32)
    values[[3, 4000]] = np.nan
    model = {"w": values.astype(np.dtype(getattr(ml_dtypes, dtype, None) or dtype))}
    with pytest.raises(CheckpointError, match="tensor 'w' has 2 NaN"):
        execute([model], "linear", parameters={"weight": 0.5, "normalize": False})


def test_the_message_names_the_file(tmp_path: Any) -> None:
    path = write_model(tmp_path / "m", {"w": np.array([1, np.nan], np.float32)})
    source = SafetensorsFile(path / "model.safetensors")
    good = MemorySource({"w": np.ones(2, np.float32)})
    plan = plan_of([good, source], "linear", parameters={"weight": 1.0})
    with pytest.raises(CheckpointError) as caught:
        Executor(plan, ArraySink(plan)).run()
    assert str(path / "model.safetensors") in str(caught.value)


# -- integers, empty tensors, scalars -----------------------------------------------------------


@every_engine
@pytest.mark.parametrize(
    "dtype", ["int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]
)
def test_equal_integer_tensors_are_copied(dtype: str, engine: dict[str, Any]) -> None:
    ids = np.random.default_rng(0).integers(0, 2, (3, 40_000)).astype(dtype)
    merged, _, _ = execute([{"ids": ids}, {"ids": ids.copy()}], "linear", engine=engine, **EQUAL)
    np.testing.assert_array_equal(merged["ids"], ids)
    assert merged["ids"].dtype == ids.dtype


@every_engine
def test_different_integer_tensors_are_an_error(engine: dict[str, Any]) -> None:
    ids = np.arange(1 << 21)
    other = ids.copy()
    other[-1] = 0
    with pytest.raises(CheckpointError) as caught:
        execute([{"ids": ids}, {"ids": ids}, {"ids": other}], "linear", engine=engine, **EQUAL)
    assert str(caught.value).startswith(
        "model 2: tensor 'ids' (int64) differs from that of model 0"
    )


def test_an_integer_tensor_that_differs_from_the_base_is_an_error() -> None:
    w = np.ones(3, np.float32)
    one, two = {"w": w, "n": np.array(1)}, {"w": w, "n": np.array(2)}
    with pytest.raises(CheckpointError, match=r"model 0: tensor 'n' .* differs from that of base"):
        execute([two], "task_arithmetic", one)


@every_engine
@every_way
def test_empty_and_scalar_tensors(
    method: str, parameters: dict[str, Any], granularity: str, engine: dict[str, Any]
) -> None:
    def model(value: float) -> dict[str, Array]:
        return {
            "layers.0.empty": np.zeros((0, 4), np.float32),
            "layers.0.scalar": np.array(value, np.float32),
            "layers.0.w": np.full((2, 3), value, np.float32),
            "layers.0.steps": np.array(7),
            "none": np.zeros(0, np.float32),
        }

    base = model(0.0) if method == "ties" else None
    merged, _, _ = execute(
        [model(1.0), model(1.0)],
        method,
        base,
        parameters=parameters,
        granularity=granularity,
        engine=engine,
    )
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in model(1.0).items()}
    assert merged["layers.0.steps"] == 7
    if granularity == "tensor" and method != "ties":
        assert merged["layers.0.scalar"] == pytest.approx(1.0)


def test_a_model_of_nothing_but_integers_and_empty_tensors() -> None:
    model = {"n": np.array([1, 2]), "e": np.zeros((0,), np.float32)}
    merged, _, _ = execute([model, model], "ties", model, granularity="model")
    np.testing.assert_array_equal(merged["n"], [1, 2])
    assert merged["e"].shape == (0,)


# -- element types ------------------------------------------------------------------------------

TYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def numpy_type(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@pytest.mark.parametrize("out", TYPES)
@pytest.mark.parametrize("into", TYPES)
def test_every_type_converts_to_every_other_by_rounding_once(into: str, out: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(-200, 200, 20_000).astype(numpy_type(into))
    merged, execution, _ = execute([{"w": values}], "passthrough", out_dtype=out)
    assert merged["w"].dtype == numpy_type(out)
    wide = values.astype(np.float64)
    expected = wide.astype(numpy_type(out))
    if into == "float64" and out not in {"float64", "float32", "float16"}:
        # NumPy's extension types go through float32; look at the distance instead.
        step = np.abs(expected.astype(np.float64) - wide)
        assert (np.abs(merged["w"].astype(np.float64) - wide) <= step).all()
    else:
        np.testing.assert_array_equal(merged["w"], expected)
    assert not execution.overflows


def test_mixed_types_are_merged_into_the_first_models_type() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((4, 30_000))
    types = ["bfloat16", "float32", "float16", "float8_e5m2"]
    models = [{"w": v.astype(numpy_type(t))} for v, t in zip(values, types, strict=True)]
    merged, _, _ = execute(models, "linear", **EQUAL)
    mean = np.mean([m["w"].astype(np.float64) for m in models], axis=0)
    np.testing.assert_array_equal(
        merged["w"], mean.astype(np.float32).astype(numpy_type("bfloat16"))
    )


def test_task_vectors_of_mixed_types_are_taken_from_the_bases_values() -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal(5000).astype(numpy_type("bfloat16"))
    model = rng.standard_normal(5000).astype(np.float32)
    merged, _, _ = execute(
        [{"w": model}],
        "task_arithmetic",
        {"w": base},
        out_dtype="float32",
        parameters={"lambda": 0.5},
    )
    wide = base.astype(np.float64)
    np.testing.assert_allclose(merged["w"], wide + 0.5 * (model - wide), rtol=1e-6, atol=1e-7)


def test_float64_inputs_are_computed_in_float64() -> None:
    a, b = (np.random.default_rng(s).standard_normal(9000) for s in (1, 2))
    merged, _, _ = execute([{"w": a}, {"w": b}], "linear", **EQUAL)
    np.testing.assert_allclose(merged["w"], (a + b) / 2, rtol=1e-15)


@pytest.mark.parametrize(
    ("out", "beyond", "becomes"),
    [
        ("float16", 7e4, np.inf),
        ("float8_e4m3fn", 500.0, 448.0),
        ("float8_e5m2", 1e5, 57344.0),
        ("float8_e4m3fn", -500.0, -448.0),
    ],
)
@every_engine
def test_overflows_are_counted_per_tensor(
    engine: dict[str, Any], out: str, beyond: float, becomes: float
) -> None:
    w = np.ones(50_000, np.float32)
    w[[0, 10_000, 49_999]] = beyond
    model = {"w": w, "fine": np.ones(10, np.float32)}
    merged, execution, _ = execute([model], "passthrough", out_dtype=out, engine=engine)
    assert execution.overflows == {"w": 3}
    assert merged["w"].astype(np.float32)[0] == np.float32(becomes)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_sums_beyond_the_type_that_is_computed_in_are_counted(
    method: str, out: str, kind: Any
) -> None:
    model, base = {"w": np.ones(9000, kind)}, {"w": np.zeros(9000, kind)}
    model["w"][[0, 8999]] = 2e38
    settings = {"out_dtype": out, "parameters": {"density": 1.0, "normalize": False}}
    if method == "task_arithmetic":
        del settings["parameters"]
    merged, execution, _ = execute([model, model, model], method, base, **settings)
    assert execution.overflows == {"w": 2}
    assert np.count_nonzero(np.isinf(merged["w"].astype(np.float32))) == 2
    assert not execution.nonfinite


def test_infinite_values_that_are_let_through_do_not_count_as_overflows() -> None:
    model = {"w": np.array([np.inf, 1.0, np.nan], np.float32)}
    engine = {"allow_nonfinite": True}
    _, execution, _ = execute([model, model], "linear", engine=engine, **EQUAL)
    assert not execution.overflows
    assert [found.count for found in execution.nonfinite] == [2, 2]


@pytest.mark.parametrize(("out", "count"), [("float32", 2), ("bfloat16", 2), ("float64", 0)])
def test_overflows_of_float64_values(out: str, count: int) -> None:
    model = {"w": np.array([1e300, -1e39, 1.0])}
    _, execution, _ = execute([model], "passthrough", out_dtype=out)
    assert execution.overflows == ({"w": count} if count else {})


# -- granularity ----------------------------------------------------------------------------------


def trimmed(deltas: list[Array], density: float) -> list[Array]:
    """Each task vector's int(density * D) largest magnitudes (no ties in the data)."""
    kept = []
    for delta in deltas:
        count = max(1, int(density * delta.size))
        threshold = np.sort(np.abs(delta))[delta.size - count]
        kept.append(np.where(np.abs(delta) >= threshold, delta, 0))
    return kept


def ties_reference(deltas: list[Array], density: float) -> Array:
    """Trim, elect and take the disjoint mean of one group, in float64."""
    kept = np.array([d.astype(np.float64) for d in trimmed(deltas, density)])
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agree = kept * sign > 0
    return np.where(agree, kept, 0).sum(0) / np.maximum(agree.sum(0), 1)


GROUPS = {
    "tensor": [["embed.w"], ["h.0.a.w"], ["h.0.b.w"], ["h.1.a.w"], ["h.1.b.w"], ["norm.w"]],
    "layer": [["embed.w"], ["h.0.a.w", "h.0.b.w"], ["h.1.a.w", "h.1.b.w"], ["norm.w"]],
    "model": [["embed.w", "h.0.a.w", "h.0.b.w", "h.1.a.w", "h.1.b.w", "norm.w"]],
}


@every_engine
@pytest.mark.parametrize("granularity", GROUPS)
def test_ties_at_each_granularity_equals_a_plain_reference(
    granularity: str, engine: dict[str, Any]
) -> None:
    shapes = {
        "embed.w": (100, 30),
        "h.0.a.w": (50, 40),
        "h.0.b.w": (17,),
        "h.1.a.w": (300, 700),
        "h.1.b.w": (9000,),
        "norm.w": (64,),
    }
    rng = np.random.default_rng(0)
    base, models = random_models(shapes, 3)
    for i, name in enumerate(shapes):  # updates of different size per tensor
        for model in models:
            noise = rng.standard_normal(shapes[name]) * 0.02 * (i + 1)
            model[name] = (base[name] + noise).astype(np.float32)
    merged, _, _ = execute(
        models,
        "ties",
        base,
        parameters={"density": 0.3},
        granularity=granularity,
        engine=engine,
    )
    for group in GROUPS[granularity]:
        deltas = [np.concatenate([(m[k] - base[k]).ravel() for k in group]) for m in models]
        update = ties_reference(deltas, 0.3)
        origin = np.concatenate([base[k].ravel() for k in group])
        found = np.concatenate([merged[k].ravel() for k in group])
        np.testing.assert_allclose(found, origin + update, rtol=1e-6, atol=1e-7)


def test_granularity_does_change_the_result() -> None:
    base, models = random_models({"h.0.a": (100,), "h.0.b": (100,), "h.1.a": (100,)}, 2)
    for model in models:
        model["h.0.a"] = base["h.0.a"] + 10 * (model["h.0.a"] - base["h.0.a"])
    merged = {g: execute(models, "ties", base, granularity=g)[0] for g in GROUPS}
    assert not np.array_equal(merged["tensor"]["h.0.b"], merged["layer"]["h.0.b"])
    assert not np.array_equal(merged["layer"]["h.1.a"], merged["model"]["h.1.a"])


def test_tensors_that_share_a_summary_must_have_the_same_parameters() -> None:
    base, models = random_models({"a": (10,), "b": (10,)}, 2)
    density = [{"filter": "a", "value": 0.5}, {"value": 0.2}]
    with pytest.raises(RecipeError, match="granularity") as caught:
        execute(models, "ties", base, granularity="model", parameters={"density": density})
    assert "'a'" in str(caught.value)
    assert "'b'" in str(caught.value)
    execute(models, "ties", base, granularity="tensor", parameters={"density": density})


# -- errors while running -------------------------------------------------------------------------


class FailingSource(MemorySource):
    """Raises when the n-th read comes."""

    def __init__(self, arrays: dict[str, Array], reads: int, error: BaseException) -> None:
        super().__init__(arrays, "failing")
        self.left = reads
        self.error = error

    def read_into(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        super().read_into(name, start, stop, out)


def run_with_failure(
    method: str, granularity: str, reads: int, error: BaseException, threads: int
) -> None:
    shapes = {f"h.{i}.w": (40_000,) for i in range(30)}
    base, models = random_models(shapes, 2)
    sources = [MemorySource(models[0]), FailingSource(models[1], reads, error)]
    origin = MemorySource(base) if method == "ties" else None
    plan = plan_of(sources, method, origin, granularity=granularity, parameters=WAYS[method][1])
    Executor(plan, ArraySink(plan), threads=threads, resident_bytes=0).run()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("reads", [0, 9, 25])
@pytest.mark.parametrize(
    ("method", "granularity"), [("linear", "tensor"), ("ties", "tensor"), ("ties", "model")]
)
def test_an_error_in_one_worker_stops_all_of_them(
    method: str, granularity: str, reads: int, threads: int
) -> None:
    before = threading.active_count()
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            run_with_failure(method, granularity, reads, OSError(5, "Input/output error"), threads)
        except BaseException as error:
            outcome.append(error)

    runner = threading.Thread(target=run, daemon=True)
    runner.start()
    runner.join(timeout=20)
    assert not runner.is_alive(), "the executor hangs"
    (error,) = outcome
    assert isinstance(error, CheckpointError)
    assert "failing: tensor 'h." in str(error)
    assert "Input/output error" in str(error)
    assert threading.active_count() == before


def test_an_unexpected_error_comes_out_unchanged() -> None:
    with pytest.raises(ZeroDivisionError):
        run_with_failure("linear", "tensor", 3, ZeroDivisionError(), threads=3)


def test_an_interrupt_in_the_progress_callback_stops_the_run() -> None:
    _, models = random_models({f"w{i}": (50_000,) for i in range(20)}, 2)

    def interrupt(_written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(models, "linear", engine={"on_progress": interrupt}, **EQUAL)


def test_a_full_disk_stops_the_run() -> None:
    _, models = random_models({f"w{i}": (50_000,) for i in range(5)}, 2)
    plan = plan_of([MemorySource(m) for m in models], "linear", **EQUAL)

    class FullDisk(ArraySink):
        def write(self, name: str, offset: int, data: memoryview) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Executor(plan, FullDisk(plan), threads=2).run()


# -- what is reported -----------------------------------------------------------------------------


def test_bytes_read_and_written_are_counted() -> None:
    _, models = random_models({"a": (30_000,), "b": (5,)}, 3)
    _, execution, checksums = execute(models, "linear", engine={"resident_bytes": 0}, **EQUAL)
    assert execution.bytes_read == 3 * 30_005 * 4
    assert execution.bytes_written == 30_005 * 4
    assert set(checksums) == {"a", "b"}


def test_a_model_of_weight_one_is_copied_without_reading_the_others() -> None:
    _, models = random_models({"a": (30_000,)}, 3)
    merged, execution, _ = execute(
        models, "linear", model_parameters=[{"weight": 0.0}, {"weight": 1.0}, {"weight": 0.0}]
    )
    np.testing.assert_array_equal(merged["a"], models[1]["a"])
    assert execution.bytes_read == 30_000 * 4


def test_tensors_already_written_are_left_alone() -> None:
    _, models = random_models({"a": (30_000,), "b": (5,)}, 2)
    merged, execution, checksums = execute(models, "linear", engine={"written": {"a"}}, **EQUAL)
    assert set(checksums) == {"b"}
    assert not merged["a"].any()
    assert execution.bytes_written == 20


# -- state dicts ----------------------------------------------------------------------------------


def test_state_dicts_merge_into_arrays() -> None:
    a, b = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    merged = merge_state_dicts([a, b], method="linear", parameters={"weight": 1.0})
    np.testing.assert_array_equal(merged["w"], [0.5, 0.5])


def test_arrays_that_are_not_contiguous_or_of_the_other_byte_order() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    models = [{"w": values.T}, {"w": np.ascontiguousarray(values.T).astype(">f4")}]
    merged = merge_state_dicts(models, method="linear", parameters={"weight": 1.0})
    np.testing.assert_array_equal(merged["w"], values.T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"models": []}, "models: found an empty list"),
        ({"model_parameters": [{}]}, "found 1 mappings, expected one for each of the 2 models"),
        ({"method": "linar"}, "did you mean 'linear'?"),
        ({"models": [{"w": [1.0]}] * 2}, "tensor 'w': expected a NumPy array or a torch tensor"),
        ({"models": [{"w": np.zeros(1, "c8")}] * 2}, "unknown dtype 'complex64'"),
        ({"masks": [None]}, "masks: found 1"),
    ],
)
def test_wrong_calls_are_refused(call: dict[str, Any], message: str) -> None:
    given = {
        "models": [{"w": np.zeros(1, np.float32)}] * 2,
        "method": "linear",
        "parameters": {"weight": 1.0},
        **call,
    }
    with pytest.raises(FusekitError) as caught:
        merge_state_dicts(given.pop("models"), **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "model 1: tensor 'w' of model 0 is missing"),
        ({"v": np.zeros(2, np.float32)}, "model 1: tensor 'w' of model 0 is missing"),
        ({"w": np.zeros(3, np.float32)}, "has shape [3], expected [2] as in model 0"),
        ({"w": np.zeros(2, np.int32)}, "is int32, expected float32 as in model 0"),
        (
            {"w": np.zeros(2, np.float32), "x": np.zeros(1, np.float32)},
            "model 1: tensor 'x' is not in model 0",
        ),
    ],
)
def test_models_that_differ_in_their_tensors_are_refused(
    other: dict[str, Array], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        merge_state_dicts(
            [{"w": np.zeros(2, np.float32)}, other], method="linear", parameters={"weight": 1.0}
        )
    assert message in str(caught.value)
