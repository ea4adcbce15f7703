"""Merging methods: one small file per method or family, all in one registry."""

from fusekit.methods.base import Method, Parameter
from fusekit.methods.registry import available, find

MethodInfo = Method

__all__ = ["Method", "MethodInfo", "Parameter", "available", "find"]
