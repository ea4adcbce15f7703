"""Statistics of layers' inputs: right, independent of batching, and without a trace left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit.calibrate import capture, hooks, regmean_plus_plus  # noqa: E402
from fusekit.errors import FusekitError  # noqa: E402
from tests.calibrate.models import Normed, Residual, load, tiny_llama  # noqa: E402
from tests.vectors import Case, StateDict, read_case  # noqa: E402


def batches_of(case: Case, model: int) -> list[torch.Tensor]:
    data = case.tensors["in/data"]
    found = []
    while f"model{model}_batch{len(found)}" in data:
        found.append(torch.from_numpy(data[f"model{model}_batch{len(found)}"]))
    return found


def assert_state(model: torch.nn.Module, expected: StateDict, tolerance: float = 1e-4) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(
            model.state_dict()[name], values, rtol=1e-3, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_gram_matrices_are_the_published_ones(name: str) -> None:
    case = read_case("regmean", name)
    for k, expected in enumerate(case.numbered("out/gram")):
        model = load(Normed(*case.about["dims"]), case.models[k])
        found = capture(model, batches_of(case, k))
        assert set(found) == {"fc1", "fc2"}
        for layer, gram in expected.items():
            np.testing.assert_allclose(found[layer], gram, rtol=1e-4, atol=1e-6)


def test_regmean_plus_plus_is_the_published_one() -> None:
    case = read_case("regmean", "case2")
    about = case.about
    shape = (about["i"], about["d"], about["h"], about["n_layers"])
    models = [load(Residual(*shape), arrays) for arrays in case.models]
    merged = Residual(*shape)
    data = [batches_of(case, k) for k in range(len(models))]
    scale = about["reduce_non_diagonal_ratio"]
    regmean_plus_plus(merged, models, data, "layers", scale=scale)
    assert_state(merged, case.merged)


def test_regmean_plus_plus_of_one_llama_gives_it_back(tmp_path: Path) -> None:
    model, merged = tiny_llama(tmp_path), tiny_llama(tmp_path / "other")
    for value in merged.parameters():
        value.data.normal_()
    ids = torch.randint(2, 12, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    regmean_plus_plus(merged, [model, model], [[batch]] * 2, "model.layers")
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    assert_state(merged, arrays, 1e-5)


def test_regmean_plus_plus_leaves_padding_out(tmp_path: Path) -> None:
    models = [tiny_llama(tmp_path / name) for name in ("one", "two")]
    with torch.no_grad():
        for value in models[1].parameters():
            value.add_(0.3 * torch.randn_like(value))
    ids = torch.randint(2, 12, (6, 9))
    padded = torch.nn.functional.pad(ids, (0, 20), value=1)
    mask = (torch.arange(29) < 9).long().repeat(6, 1)
    found = []
    for batch in (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": padded, "attention_mask": mask},
    ):
        merged = tiny_llama(tmp_path / "merged")
        regmean_plus_plus(merged, models, [[batch]] * 2, "model.layers")
        found.append({name: value.numpy().copy() for name, value in merged.state_dict().items()})
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, atol=1e-4, err_msg=name)


def test_regmean_plus_plus_refuses_a_wrong_list_of_blocks() -> None:
    model = Residual(3, 4, 5, 2)
    with pytest.raises(FusekitError, match="'blocks' is not a list of blocks of Residual"):
        regmean_plus_plus(model, [model], [[torch.zeros(1, 3)]], "blocks")


def test_regmean_plus_plus_says_what_the_data_left_open() -> None:
    models = [Residual(3, 4, 5, 2) for _ in range(3)]
    few = [[torch.randn(2, 3)]] * 2
    with pytest.warns(UserWarning, match=r"layers\.0\.up and 3 more: .* a ridge was added"):
        regmean_plus_plus(models[0], models[1:], few, "layers", scale=1.0)
    for model in models:
        model.layers[1].idle = torch.nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"layers\.1\.idle: no data reached the layer"):
        regmean_plus_plus(models[0], models[1:], few, "layers")
    average = (models[1].layers[1].idle.weight + models[2].layers[1].idle.weight) / 2
    torch.testing.assert_close(models[0].layers[1].idle.weight, average)
    with pytest.raises(FusekitError, match="batches: found an empty data set"):
        regmean_plus_plus(models[0], models[1:], [few[0], []], "layers")


@pytest.mark.parametrize("kind", ["gram", "mean", "norm"])
def test_how_data_is_cut_into_batches_does_not_matter(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Normed(6, 8, 5), torch.randn(14, 3, 6)
    whole = capture(model, [x], kind)
    for size in (1, 5):
        cut = capture(model, list(x.split(size)), kind)
        for layer, expected in whole.items():
            torch.testing.assert_close(cut[layer], expected, rtol=1e-5, atol=1e-6)


def test_wide_gram_matrices_by_blocks_equal_plain_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 1501)
    found = capture(torch.nn.Sequential(torch.nn.Linear(1501, 2)), [x])["0"]
    torch.testing.assert_close(
        found, (x.double().T @ x.double() / 50).float(), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    ids = torch.randint(2, 12, (1, 7))
    plain = capture(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    width = (0, 4) if side == "right" else (4, 0)
    padded = {
        "input_ids": torch.nn.functional.pad(ids, width),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), width),
        "position_ids": torch.arange(11)[None] - (4 if side == "left" else 0),
    }
    padded["position_ids"].clamp_(min=0)
    found = capture(model, [padded])
    for layer, expected in plain.items():
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-5)


def test_layers_fed_the_same_tensor_have_the_same_statistic(tmp_path: Path) -> None:
    ids = torch.randint(2, 12, (2, 7))
    found = capture(tiny_llama(tmp_path), [{"input_ids": ids}], modules=r"layers\.1\.")
    prefix = "model.layers.1."
    assert torch.equal(found[prefix + "self_attn.q_proj"], found[prefix + "self_attn.v_proj"])
    assert torch.equal(found[prefix + "mlp.gate_proj"], found[prefix + "mlp.up_proj"])
    assert not torch.equal(found[prefix + "self_attn.q_proj"], found[prefix + "mlp.up_proj"])
    assert all(name.startswith(prefix) for name in found)


class Uneven(torch.nn.Module):
    """Layers fed one tensor in some calls only, in place and more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.a(x)
        y = y + self.b(x if len(x) > 2 else x + 1.0)
        x += 5.0
        return y + self.c(x) + self.c(x)


@pytest.mark.parametrize("kind", ["gram", "mean", "norm"])
def test_layers_have_their_own_statistic_where_they_are_not_fed_alike(kind: str) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 3)]
    fed = {
        "a": torch.cat(batches),
        "b": torch.cat([batches[0], batches[1] + 1.0, batches[2]]),
        "c": torch.cat(batches) + 5.0,
    }
    found = capture(Uneven(), batches, kind)
    for name, rows in fed.items():
        x = rows.double()
        expected = {
            "gram": x.T @ x / len(x),
            "mean": x.mean(0),
            "norm": x.square().mean(0).sqrt(),
        }[kind]
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-5, atol=1e-6)


def test_long_calibration_is_as_exact_as_float64() -> None:
    """Sums over many collections do not lose what float32 sums would."""
    torch.manual_seed(0)
    batches = [100.0 + torch.randn(700, 4) for _ in range(40)]
    x = torch.cat(batches).double()
    found = capture(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches)["0"]
    torch.testing.assert_close(found, (x.T @ x / len(x)).float(), rtol=3e-7, atol=0)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path).train()
    model.model.layers[0].eval()
    cache = model.config.use_cache
    with pytest.raises(IndexError):
        capture(model, [{"input_ids": torch.tensor([[999]])}])
    assert model.training
    assert not model.model.layers[0].training
    assert model.config.use_cache is cache
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_compiled_models_are_refused() -> None:
    compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(FusekitError, match=r"compiled: measure it before torch\.compile"):
        capture(compiled, [torch.ones(1, 2)])


def test_layers_that_are_never_called_have_no_statistic() -> None:
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    model.forward = model["used"].forward  # type: ignore[method-assign]
    with pytest.raises(FusekitError, match="no linear layer's name contains 'attention'"):
        capture(model, [], modules="attention")
    assert "idle" not in capture(model, [torch.ones(1, 2)])


@pytest.mark.parametrize("columns", [3, 8, 100])
def test_blocks_of_a_gram_matrix_make_the_whole(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "BLOCK_COLUMNS", columns)
    layer = torch.nn.Linear(16, 2)
    inputs = torch.randn(50, 16)
    found = capture(torch.nn.Sequential(layer), [inputs[:20], inputs[20:]])["0"]
    expected = (inputs.double().T @ inputs.double() / 50).float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, found.T)
