"""Layers, experts and neurons: putting models together by their parts."""
