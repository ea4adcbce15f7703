"""Merges that are measured: their own cost, the same result, refusals that come back as such."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fusekit
from fusekit.errors import FusekitError, RecipeError
from fusekit.evaluate import digits
from fusekit.evaluate.cells import content_hash
from fusekit.evaluate.measured_merge import MeasuredMerges


def recipe(**changes: Any) -> dict[str, Any]:
    models = [{"model": str(path)} for path in digits.experts().values()]
    base = {"merge_method": "ties", "base_model": str(digits.base()), "models": models}
    return {**base, "parameters": {"density": 0.5}, **changes}


@pytest.fixture(scope="module")
def merges() -> Iterator[MeasuredMerges]:
    made = MeasuredMerges()
    yield made
    made.close()


def test_the_merge_is_the_ordinary_one_and_start_up_does_not_count(
    merges: MeasuredMerges, tmp_path: Path
) -> None:
    costs = [merges.merge(recipe(), tmp_path / str(i)) for i in range(2)]
    fusekit.merge(recipe(), tmp_path / "ordinary")
    assert content_hash(tmp_path / "0") == content_hash(tmp_path / "ordinary")
    for cost in costs:
        assert 0 < cost.cpu_seconds < 1.0
        assert 0 < cost.peak_bytes < 200e6


def test_what_a_merge_leaves_beside_its_folder_is_left_once(
    merges: MeasuredMerges, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    merges.merge(recipe(merge_method="opcm", parameters={}), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert all(path.name.startswith("merged") for path in tmp_path.iterdir())


def test_refusals_come_back_and_the_worker_goes_on(merges: MeasuredMerges, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="density"):
        merges.merge(recipe(parameters={"density": 7.0}), tmp_path / "refused")
    with pytest.raises(FusekitError, match="nowhere"):
        merges.merge(recipe(models=[{"model": str(tmp_path / "nowhere")}]), tmp_path / "absent")
    merges.merge(recipe(), tmp_path / "after")
    assert (tmp_path / "after" / "model.safetensors").is_file()


def test_a_merge_that_breaks_down_is_reported_and_the_worker_goes_on(
    merges: MeasuredMerges, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(FusekitError):
        merges.merge(recipe(), in_the_way / "out")
    broken = {"merge_method": ["no", "name"]}
    with pytest.raises(FusekitError):
        merges.merge(broken, tmp_path / "out")
    merges.merge(recipe(), tmp_path / "after")


def test_a_worker_that_ended_is_reported(tmp_path: Path) -> None:
    merges = MeasuredMerges()
    merges.merge(recipe(), tmp_path / "first")
    assert merges._worker is not None
    merges._worker.kill()
    merges._worker.wait()
    with pytest.raises(FusekitError, match="the worker ended"):
        merges.merge(recipe(), tmp_path / "second")
    merges.close()
    merges.close()
