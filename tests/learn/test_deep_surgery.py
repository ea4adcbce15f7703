"""Surgery behind every block: learns the experts' features, and leaves the models as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit.errors import FusekitError  # noqa: E402
from fusekit.learn import fit_deep_surgery  # noqa: E402
from tests.calibrate.models import Residual, tiny_llama  # noqa: E402


def models(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    base = Residual(4, 6, 8, 3)
    made = []
    for _ in range(count):
        own = Residual(4, 6, 8, 3)
        own.load_state_dict(
            {k: v + 0.3 * torch.randn_like(v) for k, v in base.state_dict().items()}
        )
        made.append(own)
    return made


def distance(a: torch.nn.Module, b: torch.nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().mean())


def test_deep_surgery_learns_what_the_experts_do() -> None:
    merged, first, second = models(3)
    data = {"a": [torch.randn(32, 4) for _ in range(4)], "b": [torch.randn(32, 4)]}
    experts = {"a": first, "b": second}
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    fitted = fit_deep_surgery(merged, experts, data, "layers", rank=6, steps=150, lr=1e-2)
    for task, expert in experts.items():
        x = data[task][0]
        plain = distance(merged, expert, x)
        with fitted.surgery.operating(merged, "layers", task):
            assert distance(merged, expert, x) < 0.7 * plain
        assert distance(merged, expert, x) == plain
        assert fitted.losses[task][-1] < 0.7 * fitted.losses[task][0]
    for name, value in merged.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in merged.modules())


def test_the_first_loss_is_the_sum_of_the_blocks_distances() -> None:
    merged, expert = models(2)
    x = torch.randn(5, 4)
    fitted = fit_deep_surgery(merged, {"a": expert}, {"a": [x]}, "layers", steps=1)
    ours, theirs, expected = merged.embed(x), expert.embed(x), 0.0
    for own, other in zip(merged.layers, expert.layers, strict=True):
        ours, theirs = own(ours), other(theirs)
        expected += float((ours - theirs).abs().mean().detach())
    assert fitted.losses["a"] == pytest.approx([expected], rel=1e-5)


def test_padding_does_not_count(tmp_path: Path) -> None:
    merged, expert = tiny_llama(tmp_path / "m"), tiny_llama(tmp_path / "e")
    for value in expert.parameters():
        value.data += 0.05 * torch.randn_like(value)
    ids = torch.randint(2, 12, (2, 7))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 3)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, 3)),
    }
    losses = [
        fit_deep_surgery(merged, {"a": expert}, {"a": [batch]}, "model.layers", steps=1).losses["a"]
        for batch in (plain, padded)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_cannot_be_learned_is_refused() -> None:
    merged, expert = models(2)
    x = torch.zeros(2, 4)
    with pytest.raises(FusekitError, match="'blocks' is not a list of blocks of Residual"):
        fit_deep_surgery(merged, {"a": expert}, {"a": [x]}, "blocks")
    with pytest.raises(FusekitError, match="experts: none for task 'b'"):
        fit_deep_surgery(merged, {"a": expert}, {"b": [x]}, "layers")
    with pytest.raises(FusekitError, match="found none for any task"):
        fit_deep_surgery(merged, {"a": expert}, {"a": []}, "layers")
    with pytest.warns(UserWarning, match="'b' has no batches"):
        fitted = fit_deep_surgery(
            merged, {"a": expert, "b": expert}, {"a": [x], "b": []}, "layers", steps=1
        )
    with (
        pytest.raises(FusekitError, match="unknown task 'c'"),
        fitted.surgery.operating(merged, "layers", "c"),
    ):
        merged(x)
