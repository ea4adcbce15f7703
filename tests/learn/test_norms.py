"""Batch norms of merged models."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch import nn  # noqa: E402

from fusekit.errors import FusekitError  # noqa: E402
from fusekit.learn import reestimate_batch_norms  # noqa: E402


def test_running_statistics_become_those_of_the_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5))
    model[1].running_mean.fill_(9.0)
    model.train()
    model[2].eval()
    batches = [torch.randn(8, 3) for _ in range(3)]
    assert reestimate_batch_norms(model, batches) == 1
    hidden = torch.stack([model[0](batch) for batch in batches]).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))
    torch.testing.assert_close(model[1].running_var, hidden.var(1).mean(0))
    assert [module.training for module in model] == [True, True, False]
    assert model[1].momentum == 0.3


def test_models_without_running_statistics_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert reestimate_batch_norms(model, []) == 0


def test_data_is_needed() -> None:
    with pytest.raises(FusekitError, match="batches: found none"):
        reestimate_batch_norms(nn.BatchNorm1d(2), [])
