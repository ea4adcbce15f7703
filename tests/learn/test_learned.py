"""Learned soups and surgery train as published."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch import nn  # noqa: E402

from fusekit.errors import FusekitError  # noqa: E402
from fusekit.learn import Surgery, fit_surgery, learned_soup  # noqa: E402
from tests.vectors import StateDict, read_case  # noqa: E402


class Net(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


ORDER = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def ordered(arrays: StateDict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(arrays[name]) for name in ORDER}


def test_learned_soup_is_the_published_one() -> None:
    case = read_case("model-soups", "case1")
    models = [ordered(model) for model in case.models]
    x, y = case.tensors["in/x"], case.tensors["in/y"]
    batches = [
        (torch.from_numpy(x[f"step{s}"]), torch.from_numpy(y[f"step{s}"]))
        for s in range(case.about["steps"])
    ]
    made = learned_soup(Net(*case.about["dims"]), models, batches, epochs=1, lr=case.about["lr"])
    out = case.tensors["out"]
    np.testing.assert_allclose(made.losses, out["loss"], rtol=1e-4)
    np.testing.assert_allclose(made.alpha, out["alpha"], rtol=1e-4)
    assert made.beta == pytest.approx(float(out["beta"]), rel=1e-4)
    for name, expected in case.tensors["out/soup"].items():
        np.testing.assert_allclose(made.soup[name], expected, rtol=1e-4, atol=1e-6)


def test_learned_soup_without_steps_is_the_average() -> None:
    nets = [Net(3, 4, 2) for _ in range(3)]
    models = [net.state_dict() for net in nets]
    before = {name: value.clone() for name, value in nets[0].state_dict().items()}
    made = learned_soup(nets[0], models, [], by_layer=False)
    for name, value in made.soup.items():
        torch.testing.assert_close(value, sum(model[name] for model in models) / 3)
        assert torch.equal(nets[0].state_dict()[name], before[name])
    assert made.alpha.shape == (1, 3)


def test_learned_soup_refuses_models_that_do_not_match() -> None:
    with pytest.raises(FusekitError, match=r"models\[1\]: tensor 'fc1.weight' has shape \[5, 3\]"):
        learned_soup(Net(3, 4, 2), [Net(3, h, 2).state_dict() for h in (4, 5)], [])


@pytest.mark.parametrize("name", ["case0", "case1"])
def test_surgery_is_the_published_one(name: str) -> None:
    case = read_case("surgery", name)
    about, inputs, out = case.about, case.tensors["in"], case.tensors["out"]
    tasks = [f"task{t}" for t in range(about["n_tasks"])]
    surgery = Surgery(tasks, about["feature_dim"], about["rank"])
    for t in range(len(tasks)):
        surgery.down[t].data = torch.from_numpy(inputs[f"down{t}"])
        surgery.up[t].data = torch.from_numpy(inputs[f"up{t}"])

    def features(arrays: StateDict, x: np.ndarray) -> torch.Tensor:
        hidden = np.tanh(x @ arrays["fc1.weight"].T + arrays["fc1.bias"])
        return torch.from_numpy(hidden @ arrays["fc2.weight"].T + arrays["fc2.bias"])

    merged, x = case.tensors["in/merged"], case.tensors["in/x"]
    batches = {
        task: [
            (features(merged, batch), features(case.models[t], batch))
            for batch in (x[f"step{s}_{task}"] for s in range(about["steps"]))
        ]
        for t, task in enumerate(tasks)
    }
    for t, task in enumerate(tasks):
        corrected = surgery(batches[task][0][0], task).detach()
        np.testing.assert_allclose(corrected, out[f"features{t}_step0"], rtol=1e-4, atol=1e-5)
    fitted = fit_surgery(batches, lr=about["lr"], steps=about["steps"], surgery=surgery)
    losses = np.array([fitted.losses[task] for task in tasks]).T
    np.testing.assert_allclose(losses, out["loss"], rtol=1e-4)
    for t in range(len(tasks)):
        np.testing.assert_allclose(surgery.down[t].detach(), out[f"down{t}"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(surgery.up[t].detach(), out[f"up{t}"], rtol=1e-4, atol=1e-5)


def test_surgery_starts_as_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    z = torch.randn(64, 6)
    surgery = Surgery(["a"], 6, 4)
    assert torch.equal(surgery(z, "a"), z)
    fitted = fit_surgery({"a": [(z, z - 0.5 * torch.relu(z))]}, rank=6, lr=1e-2)
    assert fitted.losses["a"][-1] < 0.5 * fitted.losses["a"][0]


def test_surgery_refuses_what_it_cannot_correct() -> None:
    z = torch.zeros(2, 4)
    with pytest.raises(FusekitError, match=r"unknown task 'dog' .did you mean 'dogs'"):
        Surgery(["dogs"], 4)(z, "dog")
    with pytest.raises(FusekitError, match="expert have width 5, expected 4"):
        fit_surgery({"dogs": [(z, torch.zeros(2, 5))]})
    with pytest.raises(FusekitError, match="expert hold NaN"):
        fit_surgery({"dogs": [(z, z + float("nan"))]})
    with pytest.warns(UserWarning, match="'cats' has no batches"):
        fitted = fit_surgery({"dogs": [(z, z)], "cats": []}, steps=1)
    assert fitted.losses["cats"] == []
    with pytest.raises(FusekitError, match=r"shape \[2, 4\], of the expert \[3, 4\]"):
        fit_surgery({"dogs": [(z, torch.zeros(3, 4))]})
    for name, value in {"rank": -1, "steps": -1, "lr": 0.0, "loss": "l2"}.items():
        with pytest.raises(FusekitError, match=f"{name}: found '?{value}'?, expected"):
            fit_surgery({"dogs": [(z, z)]}, **{name: value})


def test_surgery_of_rank_zero_stays_the_identity() -> None:
    z = torch.randn(4, 5)
    fitted = fit_surgery({"a": [(z, z + 1)]}, rank=0, steps=2)
    assert torch.equal(fitted.surgery(z, "a"), z)
    assert fitted.losses["a"] == [1.0, 1.0]


def test_surgery_may_learn_by_squares() -> None:
    torch.manual_seed(0)
    z = torch.randn(32, 3)
    fitted = fit_surgery({"a": [(z, z + 0.5)]}, steps=1, loss="mse")
    assert fitted.losses["a"] == pytest.approx([0.25])


def test_tasks_learn_apart() -> None:
    torch.manual_seed(0)
    z = torch.randn(16, 5)
    surgery = Surgery(["a", "b"], 5, 2)
    before = surgery.down[1].detach().clone()
    fit_surgery({"a": [(z, z.roll(1, 1))]}, steps=5, lr=0.1, surgery=surgery)
    assert not torch.equal(surgery(z, "a"), z)
    assert torch.equal(surgery(z, "b"), z)
    assert torch.equal(surgery.down[1], before)
