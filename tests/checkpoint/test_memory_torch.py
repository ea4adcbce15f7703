"""State dicts of torch tensors: in, merged, and out again."""

from __future__ import annotations

import numpy as np
import pytest

from fusekit import CheckpointError, merge_state_dicts
from fusekit.checkpoint.memory import MemorySource, is_torch, to_torch

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 4)])
def test_tensors_of_every_dtype_survive_the_round_trip(name: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(20)[: int(np.prod(shape))].reshape(shape) % 2).to(getattr(torch, name))
    source = MemorySource({"w": tensor})
    info = source.tensors["w"]
    assert (info.dtype.torch_name, info.shape) == (name, shape)
    array = np.empty(shape, info.dtype.numpy)
    source.read_into("w", 0, info.size, memoryview(array.reshape(-1).view(np.uint8)))
    back = to_torch(array)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.to(torch.float64), tensor.to(torch.float64))


def test_transposed_tensors_and_parameters_are_read_by_value() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    merged = merge_state_dicts(
        [{"w": weight.T}, {"w": weight.detach().T}], method="linear", parameters={"weight": 1.0}
    )
    assert torch.equal(merged["w"], weight.detach().T)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.empty(3, 3, device="meta"), "no data (device meta)"),
    ],
)
def test_tensors_without_dense_data_are_refused(tensor: torch.Tensor, found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        MemorySource({"w": tensor}, "model 1")
    assert str(caught.value) == f"model 1: tensor 'w': expected a dense tensor, found {found}"


def test_torch_in_torch_out_numpy_in_numpy_out() -> None:
    arrays = [{"w": np.full(3, value, np.float32)} for value in (1.0, 2.0)]
    tensors = [{k: torch.from_numpy(v) for k, v in model.items()} for model in arrays]
    assert is_torch(tensors[0])
    assert not is_torch(arrays[0])
    options = {"method": "linear", "parameters": {"weight": 1.0}}
    from_arrays = merge_state_dicts(arrays, **options)
    from_tensors = merge_state_dicts(tensors, **options)
    assert isinstance(from_arrays["w"], np.ndarray)
    np.testing.assert_array_equal(from_tensors["w"].numpy(), from_arrays["w"])


def test_bfloat16_models_merge_in_float32_and_come_back_as_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(1000, generator=generator).to(torch.bfloat16)} for _ in range(3)]
    merged = merge_state_dicts(models, method="linear", parameters={"weight": 1.0})
    mean = torch.stack([m["w"].double() for m in models]).mean(0)
    assert merged["w"].dtype == torch.bfloat16
    assert torch.equal(merged["w"], mean.float().to(torch.bfloat16))
