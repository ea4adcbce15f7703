"""Merging that is chosen or learned by what the result can do: soups, mask thresholds, surgery."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fusekit.errors import MissingExtraError

if TYPE_CHECKING:
    from fusekit.learn.learned import LearnedSoup, learned_soup
    from fusekit.learn.localized import LearnedMask, learn_mask
    from fusekit.learn.masks import MaskThresholds, choose_tall_lambda
    from fusekit.learn.norms import reestimate_batch_norms
    from fusekit.learn.soups import (
        GreedySoup,
        Selection,
        greedy_soup,
        greedy_soup_folder,
        select,
        uniform_soup_folder,
    )
    from fusekit.learn.surgery import DeepSurgery, Surgery, fit_deep_surgery, fit_surgery

_HOMES = {
    "DeepSurgery": "surgery",
    "GreedySoup": "soups",
    "LearnedMask": "localized",
    "LearnedSoup": "learned",
    "MaskThresholds": "masks",
    "Selection": "soups",
    "Surgery": "surgery",
    "choose_tall_lambda": "masks",
    "fit_deep_surgery": "surgery",
    "fit_surgery": "surgery",
    "greedy_soup": "soups",
    "greedy_soup_folder": "soups",
    "learn_mask": "localized",
    "learned_soup": "learned",
    "reestimate_batch_norms": "norms",
    "select": "soups",
    "uniform_soup_folder": "soups",
}

__all__ = [
    "DeepSurgery",
    "GreedySoup",
    "LearnedMask",
    "LearnedSoup",
    "MaskThresholds",
    "Selection",
    "Surgery",
    "choose_tall_lambda",
    "fit_deep_surgery",
    "fit_surgery",
    "greedy_soup",
    "greedy_soup_folder",
    "learn_mask",
    "learned_soup",
    "reestimate_batch_norms",
    "select",
    "uniform_soup_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusekit.learn' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"fusekit.learn.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError(name, "torch") from None
