"""Fewer key-value heads, the same model: multi-head checkpoints become grouped-query or multi-query ones.

`merging` holds the methods, `grouping` chooses which heads become one, `moments` knows the inputs, `budget` the counts
of `auto`; `layers` joins them for one layer, `request` for a model, `streaming` from folder to folder. The package is
not called `regroup` because a module of that name would hide the function `groupformer.regroup`.
"""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers.initialization import no_init_weights

from ..modeling_groupformer import GroupFormerPreTrainedModel
from .moments import Moment, check_calibration, measure_moments, moment_from_norm
from .request import Request, regrouped_config


Model = TypeVar("Model", bound=GroupFormerPreTrainedModel)


def regroup(
    model: Model,
    num_key_value_heads: int | str | Mapping[int, int],
    *,
    method: str = "svd",
    grouping: str = "adjacent",
    calibration: torch.Tensor | None = None,
    budget: float | None = None,
    seed: int = 0,
) -> Model:
    """The same model with fewer key-value heads: as many query heads, a smaller cache, and as little else changed as
    the method can.

    Args:
        model: Any GroupFormer model, bare or with a head; it stays as it is.
        num_key_value_heads: The new count, a divisor of the present one; or `{layer: count}`, where layers that are
            not named keep theirs; or "auto", which chooses the counts under a `budget`.
        method: "first", "random" and "mean" (Ainslie et al. 2023); "aligned" (Jin et al. 2024); or "svd", the shared
            keys and values that lose the least, in closed form. See `groupformer.regrouping.merging`.
        grouping: "adjacent" merges neighbours; "similar" permutes heads into the groups that lose the least.
        calibration: Token ids, LongTensor (batch, seq), a few thousand in all, on which the inputs of each layer are
            measured. Without it, the weights of the norm before each layer stand for them.
        budget: With "auto", the share of the present cache to keep, e.g. 0.25.
        seed: Of the method "random".

    Returns:
        A new model of the same class, dtype, device and mode, which shares no storage with the old one. Layers that
        keep their count are the same bit for bit.

    Raises:
        ValueError: a count that does not divide, an unknown method or grouping, calibration that is no token ids or
            too short, weights that are not finite; the message names the field, the value and the remedy.
        TypeError: not a GroupFormer model.
    """
    if not isinstance(model, GroupFormerPreTrainedModel):
        raise TypeError(
            f"model ({type(model).__name__}) is not a GroupFormer; turn it into one with groupformer.import_model"
        )
    request = Request.checked(model.config, num_key_value_heads, method, grouping, budget, seed)
    if calibration is not None:
        check_calibration(calibration, model.config)
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in state_dict.items():
        check_finite(name, tensor, type(model).__name__)
    moments = None if calibration is None else measure_moments(model, calibration)

    layers = [ModelLayer(model, layer_idx, moments) for layer_idx in range(model.config.num_hidden_layers)]
    counts = request.counts
    if counts is None:
        problems = (request.problem(layer.layer_idx, layer.tensors, layer.moment) for layer in layers)
        counts = request.counts_for([request.losses(problem) for problem in problems])
    for layer, count in zip(layers, counts):
        if count != model.config.per_layer_config[layer.layer_idx].num_key_value_heads:
            new = request.regroup_layer(layer.layer_idx, count, layer.tensors, layer.moment)
            state_dict |= {layer.prefix + name: tensor for name, tensor in new.items()}
    return rebuilt(model, counts, state_dict)


class ModelLayer:
    """What regrouping reads of one layer of a model in memory."""

    def __init__(self, model: GroupFormerPreTrainedModel, layer_idx: int, moments: list[Moment] | None):
        base: Any = model.base_model
        self.config, self.layer_idx = model.config, layer_idx
        self.module = base.layers[layer_idx]
        self.prefix = f"{'' if base is model else model.base_model_prefix + '.'}layers.{layer_idx}.self_attn."
        self._moment = None if moments is None else moments[layer_idx]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.module.self_attn.state_dict().items()}

    @property
    def moment(self) -> Moment:
        if self._moment is not None:
            return self._moment
        norm = getattr(self.module, "input_layernorm", None)
        weights = {} if norm is None else {name: tensor.cpu() for name, tensor in norm.state_dict().items()}
        return moment_from_norm(self.config, weights)


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Refuses NaN and infinity: they would spread over whole layers."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: {name} holds numbers that are not finite (NaN or infinity); repair the checkpoint")


def rebuilt(model: Model, counts: list[int], state_dict: Mapping[str, torch.Tensor]) -> Model:
    """A model like the old one with other counts and weights, sharing no storage with it."""
    config = regrouped_config(model.config, counts)
    with no_init_weights():
        new = type(model)(config)
    tied = getattr(model, "_tied_weights_keys", None) or {}
    own = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
        if not (config.tie_word_embeddings and name in tied)
    }
    new.load_state_dict(own, strict=False, assign=True)
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    new.to(model.device)  # type: ignore[arg-type]
    return new.train(model.training)


__all__ = ["regroup"]
