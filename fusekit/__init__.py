"""fusekit: fuse trained neural networks.

The public API. Names load on first use, so that `import fusekit` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fusekit import methods
    from fusekit.engine.manifest import Verification, verify
    from fusekit.engine.plan import Plan
    from fusekit.engine.planner import plan
    from fusekit.engine.reconstruct import reconstruct
    from fusekit.engine.run import MergeReport, merge, merge_state_dicts
    from fusekit.errors import CheckpointError, FusekitError, RecipeError
    from fusekit.inspection.result import Inspection
    from fusekit.inspection.run import inspect
    from fusekit.recipe.schema import Recipe, load_recipe

_HOMES = {
    "CheckpointError": "fusekit.errors",
    "FusekitError": "fusekit.errors",
    "Inspection": "fusekit.inspection.result",
    "MergeReport": "fusekit.engine.run",
    "Plan": "fusekit.engine.plan",
    "Recipe": "fusekit.recipe.schema",
    "RecipeError": "fusekit.errors",
    "Verification": "fusekit.engine.manifest",
    "inspect": "fusekit.inspection.run",
    "load_recipe": "fusekit.recipe.schema",
    "merge": "fusekit.engine.run",
    "merge_state_dicts": "fusekit.engine.run",
    "plan": "fusekit.engine.planner",
    "reconstruct": "fusekit.engine.reconstruct",
    "verify": "fusekit.engine.manifest",
}

__all__ = [
    "CheckpointError",
    "FusekitError",
    "Inspection",
    "MergeReport",
    "Plan",
    "Recipe",
    "RecipeError",
    "Verification",
    "inspect",
    "load_recipe",
    "merge",
    "merge_state_dicts",
    "methods",
    "plan",
    "reconstruct",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("fusekit.methods")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fusekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
