"""Measuring models: suites of tasks with their experts, and scores."""

from fusekit.evaluate import digits

__all__ = ["digits"]
