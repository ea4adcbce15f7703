"""What `fusekit plan --explain` shows: parameters over the layers."""

from __future__ import annotations

import numpy as np

from fusekit.checkpoint.memory import MemorySource
from fusekit.engine.explain import explain
from tests.engine.support import plan_of


def model() -> MemorySource:
    names = [f"h.{i}.{part}.w" for i in range(8) for part in ("attn", "mlp")]
    return MemorySource(dict.fromkeys([*names, "embed.w"], np.zeros(1, np.float32)))


def test_gradients_are_bars_and_equal_tensors_share_a_row() -> None:
    weight = [{"filter": "attn", "value": [0.0, 1.0]}, {"value": 0.5}]
    plan = plan_of(
        [model(), model()], "linear", model_parameters=[{"weight": weight}, {"weight": 2.0}]
    )
    curves = {(curve.parameter, curve.models): curve.rows for curve in explain(plan)}
    rising, flat = curves["weight", "model 0"]
    assert (rising.bars, rising.text) == ("▁▂▃▄▅▆▇█", "0 0.1429 ... 0.8571 1")
    assert rising.tensors == "h.*.attn.w"
    assert (flat.bars, flat.text, flat.tensors) == ("", "0.5", "h.*.mlp.w and 1 more")
    ((row,),) = [curves["weight", "model 1"]]
    assert (row.text, row.tensors) == ("2", "all tensors")
