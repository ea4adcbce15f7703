"""Files that PyTorch itself wrote, read without it."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from fusekit.checkpoint.memory import to_torch
from fusekit.checkpoint.pickles import PickleFile, open_pickle_index
from fusekit.errors import CheckpointError
from tests.checkpoint.zip_files import read

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_everything_torch_saves_is_read_back_bit_for_bit(tmp_path: Path, protocol: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 5, generator=generator)
    tagged = torch.ones(2)
    tagged.note = "has an attribute"
    tensors = OrderedDict(
        matrix=matrix,
        transposed=matrix.t(),
        permuted=matrix.reshape(2, 3, 5).permute(2, 0, 1),
        sliced=matrix[1:5:2, ::3],
        expanded=matrix[:, :1].expand(6, 4),
        parameter=torch.nn.Parameter(matrix[2]),
        tagged=tagged,
        scalar=torch.tensor(2.5),
        empty=matrix[:0],
        **{name: (matrix * 3).to(getattr(torch, name)) for name in FLOATS + INTEGERS},
    )
    others = {"size": torch.Size([3]), "device": torch.device("cpu"), "kind": torch.float16}
    others |= {"bytes": b"\0\1", "set": {1, 2}, "text": "x", "number": 1.5, "nothing": None}
    path = tmp_path / "a.pt"
    torch.save(OrderedDict(tensors, **others), path, pickle_protocol=protocol)

    source = PickleFile(path)
    assert list(source.tensors) == list(tensors)
    for name, expected in tensors.items():
        found = to_torch(read(source, name)).reshape(expected.shape)
        assert found.dtype == expected.dtype
        assert torch.equal(raw_bytes(found), raw_bytes(expected))
    assert {name.split(".")[0] for name in source.ignored} <= others.keys()
    assert {"device", "kind", "text", "number", "nothing"} <= set(source.ignored)


def test_module_state_dict_and_training_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "a.pt"
    saved = {"epoch": 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, path)
    source = PickleFile(path)
    assert list(source.tensors) == list(model.state_dict())
    for name, expected in model.state_dict().items():
        np.testing.assert_array_equal(read(source, name), expected.numpy())
    assert source.ignored == ("epoch", "optimizer")


def test_tied_tensors_are_both_offered(tmp_path: Path) -> None:
    shared = torch.nn.Parameter(torch.randn(4, 3))
    torch.save({"embed.weight": shared, "head.weight": shared}, tmp_path / "a.bin")
    source = PickleFile(tmp_path / "a.bin")
    np.testing.assert_array_equal(read(source, "embed.weight"), read(source, "head.weight"))


def test_sharded_transformers_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "one.bin", "b": "two.bin"}}'
    )
    torch.save({"a": torch.ones(3)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "two.bin")
    source = open_pickle_index(tmp_path / "pytorch_model.bin.index.json")
    assert read(source, "a").tolist() == [1, 1, 1]
    assert read(source, "b").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: {"w": torch.eye(3).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        (lambda: {"w": torch.zeros(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        (lambda: {"w": torch.empty(2, device="meta")}, "torch._utils._rebuild_meta_tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(
    tmp_path: Path, make: object, named: str
) -> None:
    torch.save(make(), tmp_path / "a.pt")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="refused") as caught:
        PickleFile(tmp_path / "a.pt")
    assert named in str(caught.value)


def test_format_from_before_zip_says_how_to_convert(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"before 1\.6.*torch\.load\(old, weights_only=True\)"
    ):
        PickleFile(tmp_path / "a.pt")


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02c__torch__\nM\n)\x81.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        PickleFile(tmp_path / "a.pt")
