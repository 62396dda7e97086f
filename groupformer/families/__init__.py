"""The families of native checkpoints: data. One short module each, their base class, and the registry."""

from .registry import FAMILIES


__all__ = ["FAMILIES"]
