"""Checks that both recipes share: every field has its type, every number its range, every model field its name."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..conversion.loading import best_device, has_fast_bf16
from ..model.configuration_groupformer import GroupFormerConfig


# Model fields that are no fields of the config: Auto classes take them as well.
MODEL_OPTIONS = ("attn_implementation", "num_labels", "per_layer_config")


def check_recipe(recipe: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Gives every field of a recipe its declared type, and refuses values outside `ranges` (both ends allowed).

    YAML 1.1 reads `2e-3` as text and one file name as no list; both are meant, so both are turned into what they mean.

    Raises:
        ValueError: a value that is not of its field's type, or out of range.
    """
    for item in dataclasses.fields(recipe):
        setattr(recipe, item.name, _as_declared(item.name, getattr(recipe, item.name), item.type))
    for name, (lowest, highest) in ranges.items():
        value = getattr(recipe, name)
        if value is not None and not lowest <= value <= highest:
            allowed = f"at least {lowest:g}" if highest == float("inf") else f"between {lowest:g} and {highest:g}"
            raise ValueError(f"{name} ({value}) must be {allowed}")


def hardware_arguments(device: str | None, bf16: bool | None) -> dict[str, Any]:
    """A recipe's `device` and `bf16` in the words of `TrainingArguments`.

    Raises:
        ValueError: a device that is not there, or one of several: accelerate takes the visible ones.
    """
    if device is not None and ":" in device:
        raise ValueError(f"device ({device}) must be a kind, e.g. cuda; CUDA_VISIBLE_DEVICES chooses among several")
    chosen = best_device(device)
    has_bf16 = chosen == "cuda" and has_fast_bf16(chosen)
    return {"bf16": has_bf16 if bf16 is None else bf16, "use_cpu": chosen == "cpu"}


def _as_declared(name: str, value: Any, declared: Any) -> Any:
    options = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    kind = typing.get_origin(options[0]) or options[0]
    if value is None and type(None) in options:
        return None
    if kind is list:
        value = [value] if isinstance(value, str | Path) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str | Path) for item in value):
            return [str(item) for item in value]
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    words = {list: "a list of files", dict: "a mapping", str: "text", int: "a whole number", float: "a number"}
    raise ValueError(f"{name} ({value!r}) must be {words.get(kind, 'true or false')}")


def check_model_fields(fields: Mapping[str, Any]) -> None:
    """Refuses names that no GroupFormerConfig has; transformers itself would keep them and change nothing.

    Raises:
        ValueError: an unknown field.
    """
    known = {item.name for item in dataclasses.fields(GroupFormerConfig)} | set(MODEL_OPTIONS)
    unknown = sorted(map(str, set(fields) - known))
    if unknown:
        raise ValueError(f"model has unknown fields ({', '.join(unknown)}); choose from {', '.join(sorted(known))}")


def pick_train(splits: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The splits of a dataset as a plain dict.

    Raises:
        ValueError: there is no split `train`.
    """
    if "train" not in splits:
        raise ValueError(f"dataset ({dataset}) has no split 'train', only {', '.join(splits)}; choose another one")
    return dict(splits)
