"""Learned masks: what helps the task is kept, what harms it is not, and the model is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit.errors import FusekitError  # noqa: E402
from fusekit.learn import learn_mask  # noqa: E402
from tests.calibrate.models import tiny_llama  # noqa: E402

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def planted() -> tuple[torch.nn.Linear, dict[str, torch.Tensor], Batches, torch.Tensor]:
    """A classifier whose update helps in half of the inputs and harms, twice as large, in others.

    The last value says where it helps.
    """
    torch.manual_seed(0)
    helpful = torch.zeros(3, 8, dtype=torch.bool)
    helpful[:, ::2] = True
    truth = torch.randn(3, 8)
    model = torch.nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.where(helpful, truth, -2 * truth))
    inputs = torch.randn(400, 8)
    labels = (inputs @ truth.T).argmax(dim=1)
    batches = list(zip(inputs.split(100), labels.split(100), strict=True))
    return model, {"weight": torch.zeros(3, 8)}, batches, helpful


def test_entries_that_help_the_task_are_kept_and_those_that_harm_it_are_not() -> None:
    model, base, batches, helpful = planted()
    learned = learn_mask(model, base, batches, density=0.5, epochs=8, penalty=0.01)
    agreeing = (learned.kept["weight"] == helpful).float().mean()
    assert agreeing > 0.75
    by_size = learn_mask(model, base, batches, density=0.5, epochs=0).kept["weight"]
    assert (by_size == helpful).float().mean() < 0.5
    assert learned.losses[-1] < 0.7 * learned.losses[0]
    assert learned.density == int(learned.kept["weight"].sum()) / 24


def test_a_penalty_keeps_less() -> None:
    model, base, batches, _ = planted()
    shares = [
        learn_mask(model, base, batches, density=0.9, epochs=4, penalty=penalty).density
        for penalty in (0.0, 1.0, 30.0)
    ]
    assert shares[0] > shares[1] > shares[2]


def test_before_the_first_step_the_largest_updates_of_the_whole_model_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    base = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[1].weight.mul_(100)
    batches = [(torch.randn(3, 4), torch.tensor([0, 1, 1]))]
    kept = learn_mask(model, base, batches, density=8 / 30, epochs=0).kept
    assert kept["1.weight"].all()
    assert not any(kept[name].any() for name in kept if name != "1.weight")


def test_the_rest_becomes_the_base_and_the_module_comes_back_as_it_was() -> None:
    model, base, batches, _ = planted()
    base["weight"].fill_(7.0)
    before = model.weight.detach().clone()
    model.train()
    learned = learn_mask(model, base, batches, density=0.5)
    assert model.training
    assert model.weight.grad is None
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)
    tuned = {"weight": before, "counter": torch.tensor(3)}
    applied = learned.apply(base, tuned)
    kept = learned.kept["weight"]
    torch.testing.assert_close(applied["weight"][kept], before[kept], rtol=0, atol=0)
    assert (applied["weight"][~kept] == 7.0).all()
    assert applied["counter"] == 3


def test_language_models_learn_from_their_next_tokens_without_padding(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    base = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    ids = torch.randint(2, 12, (3, 9))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    padded = torch.nn.functional.pad(ids, (0, 4), value=1)
    batch = {"input_ids": padded, "attention_mask": (torch.arange(13) < 9).long().repeat(3, 1)}
    learned = learn_mask(model, base, [batch], density=1.0, epochs=1)
    # At first sigmoid(3) of everything is left: near the model itself.
    assert learned.losses[0] == pytest.approx(float(expected), rel=0.05)
    assert set(learned.kept) == set(base)


def test_unusable_arguments_are_refused() -> None:
    model, base, batches, _ = planted()
    with pytest.raises(FusekitError, match="density: found 0, expected more than 0 and at most 1"):
        learn_mask(model, base, batches, density=0)
    with pytest.raises(FusekitError, match="batches: found none"):
        learn_mask(model, base, [])
    with pytest.raises(FusekitError, match=r"base: 'weight': found none, expected \[3, 8\]"):
        learn_mask(model, {}, batches)
    with pytest.raises(FusekitError, match=r"'weight': found \[3\], expected \[3, 8\]"):
        learn_mask(model, {"weight": torch.zeros(3)}, batches)
