"""Inspection gives back what was planted: norms, cosines, signs, ranks, copies, strangers."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fusekit
from fusekit.errors import CheckpointError, FusekitError
from fusekit.inspection import measure
from fusekit.inspection.result import Inspection
from fusekit.inspection.run import inspect
from fusekit.inspection.text import summary
from tests.inspection.support import base_model, low_rank, mixed, moved, noise, save

BASE = base_model()
FIRST, SECOND = noise(BASE, 1), noise(BASE, 2)


def subjects(found: Inspection) -> dict[str, tuple[str, ...]]:
    return {finding.subject: finding.models for finding in found.findings}


def methods(found: Inspection) -> list[str]:
    return [
        advice.recipe["merge_method"]
        for advice in found.advice
        if advice.recipe and "merge_method" in advice.recipe
    ]


def flat(deltas: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([deltas[name].ravel() for name in BASE]).astype(np.float64)


def test_one_model_needs_no_list(tmp_path: Path) -> None:
    model = moved(BASE, FIRST)
    save(tmp_path / "model", model)
    for given in (model, str(tmp_path / "model"), tmp_path / "model"):
        found = inspect(given, base=BASE)
        assert len(found.models) == 1
        assert found.whole is not None


@pytest.mark.parametrize("cosine", [-0.6, 0.0, 0.3, 0.9])
def test_planted_cosines_and_norms_come_back_exactly(cosine: float) -> None:
    deltas = [FIRST, mixed(FIRST, SECOND, cosine)]
    models = [moved(BASE, delta) for delta in deltas]
    found = inspect(models, base=BASE)
    assert found.whole is not None
    known = found.whole.statistics
    stored = [flat(model) - flat(BASE) for model in models]
    norms = [np.linalg.norm(delta) for delta in stored]
    np.testing.assert_allclose(known.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(
        known.relative_norms, np.array(norms) / np.linalg.norm(flat(BASE)), rtol=1e-6
    )
    expected = stored[0] @ stored[1] / norms[0] / norms[1]
    assert abs(known.cosine[0, 1] - expected) < 1e-6
    assert abs(known.cosine[0, 1] - cosine) < 0.02


def test_planted_sign_conflicts_come_back_overall_and_among_the_largest() -> None:
    rng = np.random.default_rng(5)
    flips, other = {}, {}
    for name, delta in FIRST.items():
        size = np.abs(delta)
        largest = size >= np.quantile(size, 0.8)
        rate = np.where(largest, 0.1, 0.5)
        flips[name] = rng.random(delta.shape) < rate
        other[name] = np.where(flips[name], -delta, delta)
    found = inspect([moved(BASE, FIRST), moved(BASE, other)], base=BASE)
    assert found.whole is not None
    known = found.whole.statistics
    assert abs(known.conflict_rate - 0.42) < 0.01
    assert abs(known.top_conflict_rate - 0.1) < 0.02
    assert known.overlap[0, 1] > 0.95
    magnitudes, flipped = np.abs(flat(FIRST)), flat(flips) > 0
    cancelled = magnitudes[flipped].sum() / magnitudes.sum()
    assert abs(known.cancellation - cancelled) < 0.01
    np.testing.assert_allclose(known.sign_agreement[0, 1], 1 - known.conflict_rate, atol=1e-12)


def test_large_tensors_are_sampled_within_the_sampling_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = {"layers.0.w.weight": (900, 300), "layers.1.w.weight": (300, 900)}
    rng = np.random.default_rng(0)
    base = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    first = {k: 0.01 * rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    second = {k: np.where(rng.random(s) < 0.3, -first[k], first[k]) for k, s in shapes.items()}
    models = [moved(base, first), moved(base, second)]
    sampled = inspect(models, base=base)
    monkeypatch.setattr(measure, "SAMPLE_ELEMENTS", 1 << 30)
    exact = inspect(models, base=base)
    assert all(tensor.sampled for tensor in sampled.tensors)
    assert not any(tensor.sampled for tensor in exact.tensors)
    assert sampled.whole is not None and exact.whole is not None
    one, other = sampled.whole.statistics, exact.whole.statistics
    np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12)
    assert abs(one.conflict_rate - 0.3) < 0.006
    np.testing.assert_allclose(one.conflict_rate, other.conflict_rate, atol=0.006)
    np.testing.assert_allclose(one.overlap, other.overlap, atol=0.02)
    np.testing.assert_allclose(one.density, other.density, atol=0.002)
    np.testing.assert_allclose(one.energy_profile, other.energy_profile, atol=0.02)
    np.testing.assert_allclose(one.kurtosis, other.kurtosis, atol=0.15)
    np.testing.assert_allclose(sampled.whole.effective_rank, exact.whole.effective_rank, rtol=0.1)
    # The power step bounds the largest singular value from below, the stable rank from above.
    assert (sampled.whole.stable_rank >= exact.whole.stable_rank * 0.999).all()
    assert (sampled.whole.stable_rank <= exact.whole.stable_rank * 2).all()


def test_samples_do_not_favour_columns() -> None:
    shape = (2048, 128)
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal(shape).astype(np.float32)}
    scale = np.where(np.arange(128) % 4 == 0, 0.05, 0.01)
    delta = {"w": (scale * rng.standard_normal(shape)).astype(np.float32)}
    found = inspect([moved(base, delta)], base=base)
    assert found.whole is not None and found.tensors[0].sampled
    squares = np.sort(np.square(moved(base, delta)["w"] - base["w"]).ravel())[::-1]
    exact = [squares[: round(share * squares.size)].sum() for share in (0.01, 0.05, 0.2)]
    np.testing.assert_allclose(
        found.whole.statistics.energy_profile[0], exact / squares.sum(), rtol=0.05
    )


@pytest.mark.parametrize("shape", [(64, 48), (700, 500)])
def test_planted_ranks_come_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    base = {"w": np.zeros(shape, np.float32)}
    left = np.linalg.qr(rng.standard_normal((shape[0], 8)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], 8)))[0]
    equal = {"w": (left @ right.T).astype(np.float32)}
    spiked = {"w": (left @ np.diag([10.0, *[1.0] * 7]) @ right.T).astype(np.float32)}
    found = inspect([equal, spiked], base=base)
    assert found.whole is not None
    tolerance = 0.01 if shape[0] * shape[1] <= measure.SAMPLE_ELEMENTS else 0.3
    np.testing.assert_allclose(found.whole.stable_rank, [8.0, 1.07], rtol=tolerance)
    # (sum s^2)^2 / sum s^4 = (100 + 7)^2 / (10000 + 7)
    np.testing.assert_allclose(found.whole.effective_rank, [8.0, 107**2 / 10007], rtol=tolerance)


def test_a_model_of_another_origin_is_named_and_left_out() -> None:
    stranger = base_model(seed=99)
    found = inspect([moved(BASE, FIRST), stranger], base=BASE)
    assert subjects(found)["unrelated"] == ("model 2",)
    assert found.advice[0].text.startswith("Leave out model 2")
    assert "unrelated" not in subjects(inspect([moved(BASE, FIRST)], base=BASE))


def test_nonfinite_values_are_counted_and_keep_out_of_the_statistics() -> None:
    broken = moved(BASE, FIRST)
    name = "model.layers.1.mlp.up_proj.weight"
    broken[name] = broken[name].copy()
    broken[name][3, :4] = [np.nan, np.inf, -np.inf, np.nan]
    found = inspect([broken, moved(BASE, SECOND)], base=BASE)
    (finding,) = [f for f in found.findings if f.subject == "nonfinite"]
    assert finding.severity == "stop"
    assert "4 NaN or infinite values in 1 tensor" in finding.text
    assert name in finding.text
    assert {t.name for t in found.tensors if t.group is None} == {name}
    assert found.whole is not None
    assert np.isfinite(found.whole.statistics.cosine).all()
    json.dumps(found.to_dict(), allow_nan=False)


def test_copies_are_found_within_and_across_models() -> None:
    copied = moved(BASE, FIRST)
    copied["model.layers.2.self_attn.q_proj.weight"] = copied[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    found = inspect([copied, dict(copied), dict(BASE)], base=BASE)
    duplicates = [f for f in found.findings if f.subject == "duplicate_model"]
    assert [f.models for f in duplicates] == [("model 2", "model 1"), ("model 3", "base")]
    (within,) = [
        f for f in found.findings if f.subject == "duplicate_tensors" and "model 1" in f.models
    ]
    assert "layers.0.self_attn.q_proj" in within.text
    assert "layers.2.self_attn.q_proj" in within.text


def test_unchanged_tensors_and_folded_loras_are_recognised() -> None:
    wide = {
        "layers.0.q_proj.weight": np.random.default_rng(0).standard_normal((256, 192)) * 0.05,
        "layers.0.norm.weight": np.ones(192),
        "layers.1.q_proj.weight": np.random.default_rng(1).standard_normal((256, 192)) * 0.05,
    }
    base = {k: v.astype(ml_dtypes.bfloat16) for k, v in wide.items()}
    exact = {k: v.astype(np.float32) for k, v in base.items()}
    adapted = moved(exact, low_rank(exact, 8, 4, scale=1.0))
    tuned = moved(exact, noise(exact, 7, 0.01))
    models = [{k: v.astype(ml_dtypes.bfloat16) for k, v in m.items()} for m in (adapted, tuned)]
    found = inspect(models, base=base)
    assert subjects(found)["lora"] == ("model 1",)
    (lora,) = [f for f in found.findings if f.subject == "lora"]
    assert "rank 8" in lora.text and "2 of 2 matrices" in lora.text
    (same,) = [f for f in found.findings if f.subject == "unchanged"]
    assert same.models == ("model 1",) and "1 of 3 tensors" in same.text
    assert any("adapter" in advice.text for advice in found.advice)


def test_longer_vocabularies_are_compared_on_common_rows(tmp_path: Path) -> None:
    longer = moved(BASE, FIRST)
    extra = np.full((5, 96), 0.5, np.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = np.concatenate([longer[name], extra])
    found = inspect([longer, moved(BASE, SECOND)], base=BASE)
    (finding,) = [f for f in found.findings if f.subject == "vocabulary"]
    assert "base 300, model 1 305, model 2 300" in finding.text
    embedding = next(t for t in found.tensors if t.name == "model.embed_tokens.weight")
    assert embedding.shape == (300, 96)
    assert embedding.group is not None
    expected = np.linalg.norm(FIRST["model.embed_tokens.weight"])
    np.testing.assert_allclose(embedding.group.statistics.norms[0], expected, rtol=1e-4)
    assert any(a.recipe == {"tokenizer_source": "union"} for a in found.advice)


def test_tokenizers_that_disagree_are_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabularies = {
        "base": ["a", "b", "c", "d"],
        "same": ["a", "b", "c", "d"],
        "other": ["b", "a", "c", "e", "f"],
    }
    for name, words in vocabularies.items():
        save(tmp_path / name, moved(BASE, FIRST) if name != "base" else BASE)
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    found = inspect([tmp_path / "same", tmp_path / "other"], base=tmp_path / "base")
    (finding,) = [f for f in found.findings if f.subject == "tokenizer"]
    assert finding.models == ("other",)
    assert "2 tokens more, 1 fewer, 2 with another id" in finding.text
    assert any(a.recipe == {"tokenizer_source": "union"} for a in found.advice)


def test_tying_is_compared_with_what_config_says(tmp_path: Path) -> None:
    tied = dict(BASE, **{"lm_head.weight": BASE["model.embed_tokens.weight"]})
    base = save(tmp_path / "base", tied, {"tie_word_embeddings": True})
    same = save(tmp_path / "same", moved(tied, {}), {"tie_word_embeddings": True})
    apart = save(tmp_path / "apart", moved(tied, FIRST), {"tie_word_embeddings": True})
    agreed = inspect([same], base=base)
    assert [f.severity for f in agreed.findings if f.subject == "tying"] == ["note"]
    (warned,) = [f for f in inspect([apart], base=base).findings if f.subject == "tying"][:1]
    assert warned.severity == "warning" and "loading will drop one" in warned.text


def test_missing_and_misshapen_tensors_are_named() -> None:
    lacking = {k: v for k, v in BASE.items() if k != "lm_head.weight"}
    odd = dict(BASE, **{"model.layers.0.mlp.up_proj.weight": np.zeros((160, 95), np.float32)})
    found = inspect([lacking, odd], base=BASE)
    texts = {f.subject: f.text for f in found.findings}
    assert "model 1 lacks 1 tensor" in texts["missing"]
    assert "[160, 95]" in texts["shapes"]


def test_checkpoints_without_a_common_tensor_cannot_be_merged() -> None:
    other = {f"transformer.h.0.{name}": value for name, value in BASE.items()}
    findings = inspect([moved(BASE, FIRST), other], base=BASE).findings
    (found,) = [finding for finding in findings if finding.subject == "disjoint"]
    assert found.severity == "stop"
    assert "model 2 and base have no tensor name in common" in found.text
    alone = inspect([BASE, other]).findings
    assert [finding.text for finding in alone if finding.subject == "disjoint"] == [
        "model 2 and model 1 have no tensor name in common: not the same architecture"
    ]


def test_groups_add_up_to_the_whole_model() -> None:
    found = inspect([moved(BASE, FIRST), moved(BASE, SECOND)], base=BASE)
    assert found.whole is not None
    for groups in (found.layers, found.kinds):
        total = sum(group.statistics.gram for group in groups)
        np.testing.assert_allclose(total, found.whole.statistics.gram, rtol=1e-12)
    assert [group.name for group in found.layers] == [
        "outside the blocks",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    assert "self_attn.q_proj" in {group.name for group in found.kinds}


def test_threads_and_files_do_not_change_a_number(tmp_path: Path) -> None:
    models = [moved(BASE, FIRST), moved(BASE, SECOND)]
    in_memory = inspect(models, base=BASE, threads=1).to_dict()
    folders = [save(tmp_path / f"model {i + 1}", model) for i, model in enumerate(models)]
    on_disk = inspect(folders, base=save(tmp_path / "base", BASE), threads=3).to_dict()
    for result in (in_memory, on_disk):
        del result["cost"]
    assert in_memory == on_disk


def test_dtypes_of_checkpoints_are_honoured() -> None:
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        base = {k: v.astype(dtype) for k, v in BASE.items()}
        model = {k: v.astype(dtype) for k, v in moved(BASE, FIRST).items()}
        found = inspect([model], base=base)
        assert found.whole is not None
        delta = flat({k: v.astype(np.float64) for k, v in model.items()}) - flat(
            {k: v.astype(np.float64) for k, v in base.items()}
        )
        np.testing.assert_allclose(found.whole.statistics.norms, [np.linalg.norm(delta)], rtol=1e-6)


def test_integer_and_empty_tensors_pass_through() -> None:
    extra = {"steps": np.arange(3), "none": np.empty((0, 4), np.float32), "one": np.float32(2)}
    found = inspect([dict(moved(BASE, FIRST), **extra)], base=dict(BASE, **extra))
    groups = {tensor.name: tensor.group for tensor in found.tensors}
    assert groups["steps"] is None and groups["none"] is None and groups["one"] is not None


def test_without_a_base_the_weights_themselves_are_compared() -> None:
    found = inspect([moved(BASE, FIRST), moved(BASE, SECOND)])
    assert found.base is None and found.whole is not None
    assert found.whole.statistics.cosine[0, 1] > 0.9
    assert methods(found) == ["slerp"]
    assert "Give --base" in summary(found)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("width", [80, 110])
def test_the_summary_fits_a_screen(count: int, width: int, tmp_path: Path) -> None:
    models = [
        save(
            tmp_path / f"a-model-with-a-rather-long-name-{i}-of-{count}",
            moved(BASE, noise(BASE, i)),
        )
        for i in range(1, count + 1)
    ]
    text = summary(inspect(models, base=BASE), width)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= width
    assert "Start with task arithmetic" in text
    assert " ".join(text.split()).startswith(f"{count} models against base: ")
    table = [line for line in text.splitlines() if line.startswith(f"{count} a-mod")]
    assert len(table) == 1 and f"{count}-of-{count} " in table[0]


def test_wrong_input_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FusekitError, match="expected at least one model"):
        inspect([])
    with pytest.raises(CheckpointError, match="no such file or folder"):
        inspect([tmp_path / "nowhere"])


def test_inspect_is_part_of_the_public_api() -> None:
    assert fusekit.inspect is inspect
    assert fusekit.Inspection is Inspection
