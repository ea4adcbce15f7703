"""Diagonal Fisher information: the published numbers, the analytic ones, the estimators' limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fusekit.calibrate import diagonal_fisher  # noqa: E402
from fusekit.errors import FusekitError  # noqa: E402
from tests.calibrate.models import Classifier, load, tiny_llama  # noqa: E402
from tests.vectors import read_case  # noqa: E402


def test_exact_expectation_is_the_published_one() -> None:
    case = read_case("fisher", "case0")
    arrays = case.tensors["in/model"]
    names = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
    model = load(
        Classifier(5, 4, 3), {ours: np.ascontiguousarray(arrays[t].T) for ours, t in names.items()}
    )
    x = torch.from_numpy(case.tensors["in"]["x"])
    found = diagonal_fisher(model, [x[:10], x[10:]])
    for ours, theirs in names.items():
        expected = case.tensors["out/fisher"][theirs].T
        np.testing.assert_allclose(found[ours], expected, rtol=1e-4, atol=1e-7)


def test_batch_gradients_are_the_published_ones() -> None:
    case = read_case("fisher", "case2")
    for k, expected in enumerate(case.numbered("out/fisher")):
        x = torch.from_numpy(case.tensors["in"][f"x{k}"])
        model = load(Classifier(5, 4, 3), case.models[k])
        found = diagonal_fisher(model, x.split(case.about["batch_size"]), "batch_sqrt")
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-7)


def test_exact_expectation_of_softmax_regression_is_the_analytic_one() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(20, 4)
    p = model(x).softmax(-1).detach()
    found = diagonal_fisher(model, [x])
    expected = torch.einsum("nc,ni->ci", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical", "batch_sqrt"])
def test_one_output_is_a_regression(estimator: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    x, y = torch.randn(6, 3), torch.randn(6)
    found = diagonal_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])], estimator)["weight"][0]
    errors = (model(x)[:, 0] - y).detach()
    if estimator == "batch_sqrt":
        parts = [2 * (errors[s, None] * x[s]).mean(0) for s in (slice(4), slice(4, 6))]
        expected = sum(part.square() for part in parts) / 6
    else:
        slopes = errors[:, None] * x if estimator == "empirical" else x
        expected = slopes.square().mean(0)
    torch.testing.assert_close(found, expected)
    flat = torch.nn.Sequential(model, torch.nn.Flatten(0))
    again = diagonal_fisher(flat, [(x[:4], y[:4]), (x[4:], y[4:])], estimator)["0.weight"][0]
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("estimator", ["empirical", "batch_sqrt"])
def test_errors_of_a_regression_need_labels(estimator: Any) -> None:
    with pytest.raises(FusekitError, match=f"'{estimator}' needs labels"):
        diagonal_fisher(torch.nn.Linear(3, 1), [torch.randn(2, 3)], estimator)


def test_sampled_labels_approach_the_exact_expectation() -> None:
    torch.manual_seed(0)
    model, x = Classifier(3, 4, 3), torch.randn(4, 3)
    exact = diagonal_fisher(model, [x])["fc2.weight"]
    errors = []
    for copies in (10, 400):
        sampled = diagonal_fisher(model, [x] * copies, "sampled")["fc2.weight"]
        errors.append(float((sampled - exact).norm() / exact.norm()))
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


def test_fisher_adds_up_over_disjoint_data() -> None:
    torch.manual_seed(0)
    model, x = Classifier(3, 4, 3), torch.randn(9, 3)
    first, second = diagonal_fisher(model, [x[:3]]), diagonal_fisher(model, [x[3:]])
    for name, whole in diagonal_fisher(model, [x]).items():
        torch.testing.assert_close(whole, first[name] / 3 + second[name] * 2 / 3)


def test_empirical_fisher_of_a_language_model_is_that_of_next_tokens(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path)
    ids = torch.randint(2, 12, (1, 6))
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = (torch.arange(9) < 6).long()[None]
    logp = model.eval()(ids).logits.log_softmax(-1)
    objective = logp[0, :-1].gather(-1, ids[0, 1:, None]).sum()
    expected = torch.autograd.grad(objective, model.lm_head.weight)[0].square()
    batch = {"input_ids": padded, "attention_mask": mask}
    found = diagonal_fisher(model, [batch], "empirical")
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=1e-3, atol=1e-6)


def test_tied_weights_are_one_parameter(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, tie_word_embeddings=True)
    found = diagonal_fisher(model, [{"input_ids": torch.randint(2, 12, (2, 5))}], "sampled")
    assert "model.embed_tokens.weight" in found
    assert "lm_head.weight" not in found


def test_what_has_no_such_expectation_is_refused(tmp_path: Path) -> None:
    model, x = Classifier(3, 4, 3), torch.randn(2, 3)
    with pytest.raises(FusekitError, match="'empirical' needs labels"):
        diagonal_fisher(model, [x], "empirical")
    with pytest.raises(FusekitError, match="estimator: found 'best', expected one of exact"):
        diagonal_fisher(model, [x], "best")  # type: ignore[arg-type]
    with pytest.raises(FusekitError, match=r"logits have shape \[1, 4, 12\]; use 'sampled'"):
        diagonal_fisher(tiny_llama(tmp_path), [{"input_ids": torch.ones(1, 4).long()}], "exact")
