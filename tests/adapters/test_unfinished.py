"""Merges that were interrupted: nothing that looks complete, and nothing done twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import pytest

import fusekit
from fusekit.adapters import Adapter, ExtractOptions, extract_adapter, write_adapter
from fusekit.adapters import extract as extract_module
from fusekit.adapters import unfinished as unfinished_module
from fusekit.adapters.provenance import Provenance
from fusekit.checkpoint.layout import JOURNAL
from fusekit.checkpoint.memory import MemorySource

from .support import random_adapter

SHAPES = {f"m.{i}.weight": (6, 5) for i in range(6)}
MADE_BY = Provenance("a merge", "text", {"recipe": {"merge_method": "svd"}}, [])


class Counted(Mapping):
    """Modules that note which are asked for, and fail when the time has come."""

    def __init__(self, modules, fails_at=None):
        self.modules, self.fails_at, self.asked = modules, fails_at, []

    def __getitem__(self, name):
        self.asked.append(name)
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        return self.modules[name]

    def __iter__(self):
        return iter(self.modules)

    def __len__(self):
        return len(self.modules)


def counted(fails_at=None, seed=0):
    whole = random_adapter(seed, SHAPES)
    replacements = {"head.bias": whole.modules["m.0.weight"].A[0]}
    return Adapter("counted", Counted(whole.modules, fails_at), replacements, {})


@pytest.fixture(autouse=True)
def every_module_is_noted(monkeypatch):
    monkeypatch.setattr(unfinished_module, "SYNC_SECONDS", 0.0)


def interrupted(folder, fails_at=4):
    with pytest.raises(KeyboardInterrupt):
        write_adapter(counted(fails_at), folder, 1, provenance=MADE_BY)
    assert not folder.exists()
    return folder.with_name(folder.name + ".partial")


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_merge_goes_on_where_it_stopped(tmp_path):
    interrupted(tmp_path / "out")
    rest = counted()
    write_adapter(rest, tmp_path / "out", 1, provenance=MADE_BY, resume=True)
    done = len(SHAPES) - len(rest.modules.asked)
    assert 0 < done < 4
    assert rest.modules.asked == list(SHAPES)[done:]
    write_adapter(counted(), tmp_path / "whole", 1, provenance=MADE_BY)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert fusekit.verify(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_it_may_be_interrupted_again(tmp_path):
    for fails_at in (3, 3):
        with pytest.raises(KeyboardInterrupt):
            write_adapter(counted(fails_at), tmp_path / "out", 1, provenance=MADE_BY, resume=True)
    rest = counted()
    write_adapter(rest, tmp_path / "out", 1, provenance=MADE_BY, resume=True)
    assert len(rest.modules.asked) <= len(SHAPES) - 2
    write_adapter(counted(), tmp_path / "whole", 1, provenance=MADE_BY)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    ("damage", "again"), [("cut line", 4), ("short data", 6), ("no journal", 6), ("a bit", 5)]
)
def test_what_a_kill_cut_short_is_made_again(damage, again, tmp_path):
    partial = interrupted(tmp_path / "out")
    journal, data = partial / JOURNAL, partial / "adapter_model.safetensors"
    if damage == "cut line":
        journal.write_text(journal.read_text()[:-20])
    elif damage == "short data":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "a bit":
        last_of_second = json.loads(journal.read_text().splitlines()[2])["end"] - 1
        content = bytearray(data.read_bytes())
        content[last_of_second] ^= 1
        data.write_bytes(content)
    else:
        journal.unlink()
    rest = counted()
    write_adapter(rest, tmp_path / "out", 1, provenance=MADE_BY, resume=True)
    assert len(rest.modules.asked) == again
    write_adapter(counted(), tmp_path / "whole", 1, provenance=MADE_BY)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


@pytest.mark.parametrize(
    ("provenance", "resume"),
    [
        (dataclasses.replace(MADE_BY, record={"recipe": {"merge_method": "cat"}}), True),
        (dataclasses.replace(MADE_BY, inputs=[{"reference": "other"}]), True),
        (MADE_BY, False),
    ],
)
def test_another_merge_starts_over(provenance, resume, tmp_path):
    interrupted(tmp_path / "out")
    other = counted(seed=1)
    write_adapter(other, tmp_path / "out", 1, provenance=provenance, resume=resume)
    assert other.modules.asked == list(SHAPES)
    write_adapter(counted(seed=1), tmp_path / "whole", 1, provenance=provenance)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_merges_of_seconds_keep_no_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished_module, "SYNC_SECONDS", 60.0)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(counted(4), tmp_path / "out", 1, provenance=MADE_BY)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_adapters_resumes_unless_told_not_to(tmp_path, monkeypatch):
    for i in range(2):
        write_adapter(random_adapter(i, SHAPES), tmp_path / f"task{i}")
    recipe = {
        "merge_method": "svd",
        "models": [{"model": str(tmp_path / f"task{i}")} for i in range(2)],
    }
    from fusekit.adapters import merge as merge_module

    whole, asked = merge_module._MergedModules.__getitem__, []

    def failing(self, name):
        asked.append(name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return whole(self, name)

    monkeypatch.setattr(merge_module._MergedModules, "__getitem__", failing)
    with pytest.raises(KeyboardInterrupt):
        fusekit.merge(recipe, tmp_path / "out", threads=1)
    assert json.loads((tmp_path / "out.partial" / JOURNAL).read_text().splitlines()[0])
    seen = []
    report = fusekit.merge(recipe, tmp_path / "out", threads=1, on_progress=seen.append)
    assert (report.resumed, report.warnings) == (6, ())
    assert [at.written * 6 / at.total for at in seen] == [4, 5, 6]
    assert fusekit.verify(tmp_path / "out").ok
    assert fusekit.merge(recipe, tmp_path / "again", resume=False).resumed == 0
    same = "adapter_model.safetensors"
    assert written(tmp_path / "out")[same] == written(tmp_path / "again")[same]


def test_a_merge_tells_what_it_has_made_again(tmp_path):
    write_adapter(random_adapter(0, SHAPES), tmp_path / "task")
    recipe = {"merge_method": "svd", "models": [{"model": str(tmp_path / "task")}] * 2}
    stopped = [None] * 3

    def on_progress(_):
        stopped.pop()
        if not stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusekit.merge(recipe, tmp_path / "out", threads=1, on_progress=on_progress)
    data = tmp_path / "out.partial/adapter_model.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    report = fusekit.merge(recipe, tmp_path / "out")
    assert report.resumed == 4
    assert [text.partition(" again")[0] for text in report.warnings] == ["merged 1 module(s)"]
    fusekit.merge(recipe, tmp_path / "whole")
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def models(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed_tokens.weight": (9, 4), "norm.weight": (7,), "same.weight": (5, 5), **SHAPES}
    base = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    tuned = {
        n: x + rng.normal(size=x.shape).astype("f4") * (n[:4] != "same") for n, x in base.items()
    }
    return MemorySource(base, "base"), MemorySource(tuned, f"model {seed}")


@pytest.fixture
def decomposed(monkeypatch):
    """The shapes that were decomposed; the third decomposition is interrupted once."""
    asked, whole = [], extract_module.decompose

    def failing(delta, *arguments):
        asked.append(delta.shape)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(delta, *arguments)

    monkeypatch.setattr(extract_module, "decompose", failing)
    return asked


@pytest.mark.parametrize("options", [{}, {"parameter_budget": 90}, {"energy": 0.9}])
def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path, decomposed, options):
    chosen = ExtractOptions(rank=4, exclude=("m.1",), **options)
    with pytest.raises(KeyboardInterrupt):
        extract_adapter(*models(), tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()
    report = extract_adapter(*models(), tmp_path / "out", chosen, resume=True)
    assert len(decomposed) == 3 + 3  # five differ and are chosen: two were done, the third was not
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert extract_adapter(*models(), tmp_path / "whole", chosen) == report
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert fusekit.verify(tmp_path / "out").ok


@pytest.mark.parametrize("change", ["options", "model", "no resume"])
def test_another_extraction_starts_over(tmp_path, decomposed, change):
    with pytest.raises(KeyboardInterrupt):
        extract_adapter(*models(), tmp_path / "out", ExtractOptions(rank=4))
    options = ExtractOptions(rank=3 if change == "options" else 4)
    sources = models(1) if change == "model" else models()
    extract_adapter(*sources, tmp_path / "out", options, resume=change != "no resume")
    assert len(decomposed) == 3 + 6
    extract_adapter(*sources, tmp_path / "whole", options)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_extractions_of_seconds_leave_nothing_behind(tmp_path, decomposed, monkeypatch):
    monkeypatch.setattr(unfinished_module, "SYNC_SECONDS", 60.0)
    with pytest.raises(KeyboardInterrupt):
        extract_adapter(*models(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
