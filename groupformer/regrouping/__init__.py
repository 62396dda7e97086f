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

from ..conversion.weights import shapes_of
from ..model.modeling_groupformer import GroupFormerPreTrainedModel
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
            too short, weights that are not finite, an adapter or replaced or quantized layers; the message names the
            field, the value and the remedy.
        TypeError: not a GroupFormer model, or calibration that is no tensor.
    """
    if not isinstance(model, GroupFormerPreTrainedModel):
        raise TypeError(
            f"model ({type(model).__name__}) is not a GroupFormer; turn it into one with groupformer.import_model"
        )
    refuse_other_layers(model)
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


def refuse_other_layers(model: GroupFormerPreTrainedModel) -> None:
    """Refuses a model whose tensors are not those of its class by its config.

    Adapters and quantizers replace layers in place. A model built anew from the config has the plain ones, and nothing
    would fill those whose names or shapes differ.

    Raises:
        ValueError: a tensor that is unknown, missing, of another shape, or of whole numbers, by name.
    """
    # A copy: a model may settle its config's attention backend while it is built.
    expected = shapes_of(type(model), copy.deepcopy(model.config))
    kind, remedy = type(model).__name__, "merge or remove the adapter first, and regroup before quantizing"
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if name not in expected and not is_tied(model, name):
            raise ValueError(f"model holds {name}, no tensor of {kind} by its config; {remedy}")
        shape = expected.get(name, tensor.shape)
        if tuple(tensor.shape) != tuple(shape) or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} in {tensor.dtype}"
            raise ValueError(f"model: {name} is {found}, but {tuple(shape)} in floating point by its config; {remedy}")
    missing = sorted(set(expected) - set(state_dict))
    if missing:
        raise ValueError(f"model lacks {missing[0]}, a tensor of {kind} by its config; {remedy}")


def is_tied(model: GroupFormerPreTrainedModel, name: str) -> bool:
    """Whether a tensor of this name is another one's, by the config."""
    return bool(model.config.tie_word_embeddings) and name in (getattr(model, "_tied_weights_keys", None) or {})


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Refuses NaN and infinity: they would spread over whole layers."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch has no isfinite for float8
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: {name} holds numbers that are not finite (NaN or infinity); repair the checkpoint")


def rebuilt(model: Model, counts: list[int], state_dict: Mapping[str, torch.Tensor]) -> Model:
    """A model like the old one with other counts and weights, sharing no storage with it.

    Raises:
        RuntimeError: the weights are not all and only those of the new model (an error of ours).
    """
    config = regrouped_config(model.config, counts)
    with no_init_weights():
        new = type(model)(config)
    own = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
        if not is_tied(new, name)
    }
    report = new.load_state_dict(own, strict=False, assign=True)
    # What was not loaded would be memory that nobody initialised.
    wrong = [*report.unexpected_keys, *(name for name in report.missing_keys if not is_tied(new, name))]
    if wrong:
        raise RuntimeError(f"regrouping left {', '.join(wrong[:3])} over or out; please report this")
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    new.to(model.device)  # type: ignore[arg-type]
    return new.train(model.training)


__all__ = ["regroup"]
