"""The families of native checkpoints: data. One short module each, their base class, and the registry."""

from .registry import FAMILIES, is_groupformer, own_config


__all__ = ["FAMILIES", "is_groupformer", "own_config"]
