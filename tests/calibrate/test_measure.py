"""Files of statistics: from data on disk, resumed, and taken up by merging."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from safetensors.torch import save_file  # noqa: E402

from fusekit import merge  # noqa: E402
from fusekit.calibrate import measure, measure_folder, read_documents, run, token_batches  # noqa: E402
from fusekit.calibrate.data import Document  # noqa: E402
from fusekit.checkpoint.statistics import Statistics  # noqa: E402
from fusekit.errors import FusekitError, MissingExtraError  # noqa: E402
from tests.calibrate.models import Classifier, tiny_llama  # noqa: E402

TEXTS = ["the cat sat on the mat", "the dog ran fast", "and the cat ran on"] * 4


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(TEXTS))
    return path


def entries(path: Path) -> dict[str, np.ndarray]:
    file = Statistics(path)
    return {name: file.read(name) for name in file.names}


@pytest.mark.parametrize("statistic", ["gram", "fisher"])
def test_an_interrupted_measurement_goes_on(
    statistic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batches = Classifier(3, 4, 3), list(torch.randn(6, 5, 3))
    options: dict[str, Any] = {"statistic": statistic, "estimator": "sampled"}
    measure(model, batches, tmp_path / "whole.safetensors", **options)
    monkeypatch.setattr(run, "SNAPSHOT_SECONDS", 0.0)
    out, seen = tmp_path / "cut.safetensors", []

    def stop(at: run.Progress) -> None:
        if at.batches == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, batches, out, on_progress=stop, **options)
    assert not out.exists()
    with pytest.raises(FusekitError, match="holds part of another measurement"):
        measure(model, batches[:5], out, **options)
    measure(model, batches, out, on_progress=lambda at: seen.append(at.batches), **options)
    assert seen == [5, 6]
    for name, values in entries(tmp_path / "whole.safetensors").items():
        np.testing.assert_allclose(entries(out)[name], values, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut.safetensors",
        "whole.safetensors",
    ]


def test_models_are_calibrated_and_merged(tmp_path: Path, texts: Path) -> None:
    for i in (0, 1):
        model = tiny_llama(tmp_path / f"m{i}")
        torch.manual_seed(i)
        for value in model.parameters():
            value.data += 0.02 * torch.randn_like(value)
        model.save_pretrained(tmp_path / f"m{i}")
    for method, statistic in (("regmean", "gram"), ("fisher", "fisher")):
        for i in (0, 1):
            command = [sys.executable, "-m", "fusekit", "calibrate", str(tmp_path / f"m{i}")]
            command += [str(texts), str(tmp_path / f"{statistic}{i}.safetensors")]
            command += ["--statistic", statistic, "--length", "16", "--batch", "2"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        recipe = {
            "merge_method": method,
            "models": [
                {
                    "model": str(tmp_path / f"m{i}"),
                    "parameters": {"statistics": str(tmp_path / f"{statistic}{i}.safetensors")},
                }
                for i in (0, 1)
            ],
        }
        report = merge(recipe, tmp_path / method)
        assert report.tensors > 10
    about = Statistics(tmp_path / "gram0.safetensors").about
    assert about["statistic"] == "gram"
    assert set(about["counts"].values()) == {72}


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    ids = torch.randint(2, 12, (5, 9))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, tmp_path / "ids.safetensors")
    options = {"samples": 4, "length": 8, "batch": 3}
    measure_folder(tmp_path / "model", tmp_path / "ids.safetensors", tmp_path / "found", **options)
    batches = [
        {"input_ids": ids[part, :8], "attention_mask": mask[part, :8]}
        for part in (slice(3), slice(3, 4))
    ]
    measure(tiny_llama(tmp_path / "same"), batches, tmp_path / "expected")
    for name, values in entries(tmp_path / "expected").items():
        np.testing.assert_array_equal(entries(tmp_path / "found")[name], values)
    assert set(Statistics(tmp_path / "found").about["counts"].values()) == {24}
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(FusekitError, match=r"tokenizer cannot be loaded: .* give token ids"):
        measure_folder(tmp_path / "model", tmp_path / "text.txt", tmp_path / "other")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.zeros(2, 3).long()}, "expected token ids as 'input_ids' of shape"),
        ({"input_ids": torch.zeros(3).long()}, "expected token ids as 'input_ids' of shape"),
        ({"input_ids": torch.zeros(2, 3)}, "'input_ids' is torch.float32 of shape"),
        (
            {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 4).long()},
            r"'attention_mask' is torch.int64 of shape \[2, 4\], expected integers of .*\[2, 3\]",
        ),
        (
            {"input_ids": torch.zeros(2, 3).long(), "label": torch.ones(2).long()},
            "unknown tensor 'label' .did you mean 'labels'",
        ),
        ({"input_ids": torch.zeros(0, 3).long()}, "holds no token ids"),
        ({"input_ids": torch.full((1, 3), 999)}, "go from 999 to 999, expected 0 to"),
        ({"input_ids": torch.full((1, 3), -1)}, "go from -1 to -1, expected 0 to"),
    ],
)
def test_what_are_no_token_ids_is_refused(
    tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    tiny_llama(tmp_path / "model")
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(FusekitError, match=rf"ids\.safetensors: .*{message}"):
        measure_folder(tmp_path / "model", tmp_path / "ids.safetensors", tmp_path / "out")


def test_what_the_data_says_nothing_of_is_listed(tmp_path: Path) -> None:
    used, idle, norm = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(3)
    model = torch.nn.ModuleDict({"used": used, "idle": idle, "norm": norm})
    model.forward = lambda x: norm(used(x))  # type: ignore[method-assign]
    used.bias.requires_grad_(False)
    batches = [torch.randn(4, 3)]
    gram = Statistics(measure(model, batches, tmp_path / "gram"))
    assert gram.names == ["used/gram"]
    assert gram.unreached == {"idle"}
    fisher = Statistics(measure(model, batches, tmp_path / "fisher", statistic="fisher"))
    assert "idle.weight/fisher" in fisher.names
    assert fisher.unreached == {"used.bias", "norm.running_mean", "norm.running_var"}


def test_documents_are_packed_or_taken_one_by_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    packed = token_batches(["the cat", "dog ran fast"], tokenizer, length=4, batch=2)
    assert packed[0]["input_ids"].tolist() == [[2, 3, 1, 4], [6, 10, 1, 0]]
    assert packed[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    single = token_batches([Document("the cat sat", 1)], tokenizer, length=2, pack=False)
    assert single[0]["input_ids"].tolist() == [[2, 3]]
    assert single[0]["labels"].tolist() == [1]
    with pytest.raises(FusekitError, match="found no documents"):
        token_batches([], tokenizer)


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"body": "a b", "label": 2}) + "\n\n" + json.dumps({"body": "c"}))
    assert list(read_documents(path, text="body")) == [Document("a b", 2), Document("c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", r"a\.csv: documents are read from .txt, .jsonl, .*found '.csv'"),
        ("a.jsonl", '{"texts": "x"}', r"line 1: expected a text in 'text', found fields"),
        ("a.jsonl", '{"text": 1}', "expected a text in 'text', found int"),
        ("a.jsonl", '{"text": "x", "label": "y"}', "expected a class index in 'label', found 'y'"),
        ("a.jsonl", "{", "line 1: not JSON"),
    ],
)
def test_malformed_data_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FusekitError, match=message):
        list(read_documents(tmp_path / name))


def write_table(path: Path, table: Any) -> None:
    """As parquet, Feather, or the stream that datasets are cached in."""
    ipc = importlib.import_module("pyarrow.ipc")
    if path.suffix == ".parquet":
        importlib.import_module("pyarrow.parquet").write_table(table, path, row_group_size=2)
        return
    opened = ipc.new_stream if path.suffix == ".arrow" else ipc.new_file
    with opened(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


ARROW_FILES = ("data.parquet", "data.arrow", "data.feather")


@pytest.mark.parametrize("name", ARROW_FILES)
def test_tables_are_documents(tmp_path: Path, name: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the [arrow] extra")
    path = tmp_path / name
    rows = {"text": ["a", "", "b c", "d"], "label": [0, 1, 2, 1], "more": [0.5] * 4}
    write_table(path, pyarrow.table(rows))
    expected = [Document("a", 0), Document("b c", 2), Document("d", 1)]
    assert list(read_documents(path)) == expected
    with pytest.raises(FusekitError, match=r"row 1: expected a text in 'body', found fields"):
        list(read_documents(path, text="body"))
    write_table(path, pyarrow.table({"text": [1, 2]}))
    with pytest.raises(FusekitError, match=r"row 1: expected a text in 'text', found int"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ARROW_FILES)
def test_files_that_are_no_tables_are_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow", reason="needs the [arrow] extra")
    path = tmp_path / name
    with pytest.raises(FusekitError, match=rf"{name}: cannot be read"):
        list(read_documents(path))
    path.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(FusekitError, match=rf"{name}: cannot be read"):
        list(read_documents(path))


def test_tables_without_pyarrow_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"reading .parquet files needs the \[arrow\]"):
        list(read_documents(tmp_path / "data.parquet"))


def test_what_cannot_be_measured_is_refused(tmp_path: Path, texts: Path) -> None:
    model, batches, out = Classifier(3, 4, 3), [torch.randn(2, 3)], tmp_path / "s.safetensors"
    with pytest.raises(FusekitError, match="statistic: found 'grams', expected fisher or gram"):
        measure(model, batches, out, statistic="grams")
    with pytest.raises(FusekitError, match=r"need 0.00 GB while they are measured, allowed are"):
        measure(model, batches, out, max_memory=10)
    with pytest.raises(FusekitError, match="gone: not a writable folder"):
        measure(model, batches, tmp_path / "gone" / "s.safetensors")
    with pytest.raises(FusekitError, match="is a folder, expected a file"):
        measure(model, batches, tmp_path)
    with pytest.raises(FusekitError, match="fisher is measured for all parameters"):
        measure(model, batches, out, statistic="fisher", modules="fc1")
    with pytest.raises(
        FusekitError, match=r"no config.json, expected the folder of a transformers"
    ):
        measure_folder(tmp_path, texts, out)
    with pytest.raises(FusekitError, match=r"'cuda:99' cannot be used by PyTorch"):
        measure_folder(tmp_path, texts, out, device="cuda:99")
