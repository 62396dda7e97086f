"""Fewer key-value heads, the same model; or more of them, the same function. One line of steps:

    attention -> moments -> counts -> groups -> merge -> (heal) -> write

`attention` finds and proves where a model's heads are (`probing`, `layouts`, `heads`); `calibration` measures their
inputs as `moments`; `budget` chooses counts; `grouping` and `layers` choose which heads become one, by the methods of
`merging`; `expansion` repeats heads; `result` finds the class that can hold them; `memory` and `streaming` write it.
`steps` joins them. The package is not called `regroup` because a module of that name would hide the function
`groupformer.regroup`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from .expansion import expand
from .heal import heal as heal_model
from .heal import split_batches
from .heal_recipe import HealRecipe, as_recipe
from .memory import build_regrouped
from .moments import check_calibration
from .sources import ModelSource
from .steps import (
    choose_counts,
    describe_result,
    find_moments,
    merge_layer,
    plan_regrouping,
    warn_that_class_changes,
)


Model = TypeVar("Model", bound=PreTrainedModel)


def regroup(
    model: Model,
    num_key_value_heads: int | str | Mapping[int, int],
    *,
    method: str = "svd",
    grouping: str | None = None,
    calibration: torch.Tensor | None = None,
    budget: float | None = None,
    heal: HealRecipe | Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model | Any:
    """The same model with fewer key-value heads: as many query heads, a smaller cache, and as little else changed as
    the method can.

    Args:
        model: Any decoder of transformers or any GroupFormer, bare or with a head; it stays as it is.
        num_key_value_heads: The new count, a divisor of the present one; or `{layer: count}`, where layers that are
            not named keep theirs; or "auto", which chooses the counts under a `budget`.
        method: "first", "random" and "mean" (Ainslie et al. 2023); "aligned" (Jin et al. 2024); or "svd", the shared
            keys and values that lose the least, in closed form. See `groupformer.regrouping.merging`.
        grouping: "adjacent" merges neighbours; "similar" permutes heads into the groups that lose the least. Default:
            "similar", or "adjacent" where heads cannot change places (ALiBi).
        calibration: Token ids, LongTensor (batch, seq), a few thousand in all, on which the inputs of each layer are
            measured. Without it, the weights of the norm before each layer stand for them.
        budget: With "auto", the share of the present cache to keep, e.g. 0.25.
        heal: How the merged attention learns from the present one on the calibration tokens: a recipe or its fields,
            `{}` for the defaults, `{"epochs": 0, "joint_epochs": 0}` for the closed form alone. See `heal`.
        seed: Of the method "random".
        device: Where the layers are computed for calibration, one at a time.
        dtype: In which they are computed.

    Returns:
        A new model of the same dtype, device and mode, which shares no storage with the old one: of the same class
        where that class can express the counts, a GroupFormer otherwise (a warning says so before any work). Layers
        that keep their count are the same bit for bit. `config.regrouping` records what was done.

    Raises:
        ValueError: attention that is not understood, a count that does not divide, an unknown method or grouping,
            calibration that is no token ids or too short, weights that are not finite, an adapter or replaced or
            quantized layers, or counts that neither the class nor GroupFormer can hold; the message names the field,
            the value and the remedy.
        TypeError: not a transformers model, or calibration that is no tensor.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model ({type(model).__name__}) is no model of transformers; load it with from_pretrained")
    recipe = as_recipe(heal)
    if recipe is not None and calibration is None:
        raise ValueError("heal needs calibration (None): the token ids to learn on; give 50,000 to 200,000 tokens")
    source = ModelSource(model)
    plan = plan_regrouping(source, num_key_value_heads, method, grouping, budget, seed)
    if calibration is not None:
        check_calibration(calibration, model.config)
    healing = None
    if recipe is not None and calibration is not None:
        split_batches(calibration, model.config, recipe)
        healing = {"tokens": calibration.numel(), "epochs": recipe.epochs, "joint_epochs": recipe.joint_epochs}
    result = describe_result(source, plan, plan.example_counts, calibration, healing)
    if result is None:
        ours = as_groupformer(model)
        warn_that_class_changes(source, plan.layouts, plan.example_counts)
        options: dict[str, Any] = dict(
            method=method, grouping=grouping, calibration=calibration, budget=budget, heal=recipe
        )
        return regroup(ours, num_key_value_heads, **options, seed=seed, device=device, dtype=dtype)
    moments = find_moments(source, plan, calibration, device=device, dtype=dtype)
    counts = choose_counts(source, plan, moments, calibration, device)
    if counts != plan.example_counts:
        result = describe_result(source, plan, counts, calibration, healing)
        assert result is not None
    attention = {}
    for layer_idx, (layout, new_layout, count) in enumerate(zip(plan.layouts, result.layouts, counts)):
        if count != layout.geometry.num_key_value_heads:
            heads = merge_layer(source, plan, moments, layer_idx, count)
            attention[layout.path] = new_layout.write_heads(heads, source.read_module(layout.path))
    new = build_regrouped(model, result, attention)
    if recipe is not None and calibration is not None:
        heal_model(new, model, calibration, recipe)
    return new


def as_groupformer(model: PreTrainedModel) -> PreTrainedModel:
    """A native model whose class cannot hold the counts as a GroupFormer.

    Raises:
        ValueError: the bridge does not know the family either.
    """
    from ..conversion import import_model

    try:
        return import_model(model)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} has no config field for these key-value heads, and it cannot become a "
            f"GroupFormer: {error}"
        ) from error


__all__ = ["expand", "regroup"]
