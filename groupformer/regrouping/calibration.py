"""Moments of each layer's attention inputs: derived from the norms, or measured layer by layer on token ids.

Measuring holds one layer in memory at a time: the embeddings of all rows are computed first; then each layer gets its
weights, takes all rows, and loses the weights again. Masks and positions are the same for every row, and are taken
from the model's own forward pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .layouts import AttentionLayout
from .moments import Moment, adder, moment_from_norm
from .probing import build_on_meta, on_meta, record_layer_calls
from .sources import Source


class FirstLayerReached(Exception):  # noqa: N818
    """Ends a forward pass when the embeddings are computed."""


def moment_of_norm(source: Source, model: PreTrainedModel, layout: AttentionLayout) -> Moment:
    """The moment of a layer's inputs, derived from the norm before it.

    Args:
        model: Of the source, from `build_on_meta`.
    """
    embeddings: Any = model.get_input_embeddings()
    hidden_size = getattr(model.config.get_text_config(decoder=True), "hidden_size", embeddings.weight.shape[1])
    if layout.norm_path is None:
        return moment_from_norm(None, hidden_size)
    norm = model.get_submodule(layout.norm_path)
    if any(True for _ in norm.parameters()):
        load(source, model, layout.norm_path, "cpu", torch.float32)
    moment = moment_from_norm(norm, hidden_size)
    unload(norm)
    return moment


@torch.no_grad()
def measure_moments(
    source: Source,
    layouts: Sequence[AttentionLayout],
    token_ids: torch.Tensor,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Moment]:
    """The moment of each layer's attention inputs on token ids (batch, seq), layer after layer.

    Args:
        device, dtype: In which the layers are computed.

    Raises:
        ValueError: the inputs of a layer overflow, or a tensor is missing or not finite, by name.
    """
    model = build_on_meta(source.model_class, source.config, attention=None)
    layer_paths = [layout.layer_path for layout in layouts]
    states, calls = embed(source, model, layer_paths, token_ids, device, dtype)
    for layout, (args, kwargs) in zip(layouts, calls):
        layer = model.get_submodule(layout.layer_path)
        load(source, model, layout.layer_path, device, dtype)
        moment = Moment.zeros(states[0].shape[-1])
        hook = model.get_submodule(f"{layout.path}.{layout.input_name}").register_forward_pre_hook(adder(moment))
        for row in states:
            output = layer(row, *args, **kwargs)
            row.copy_(output if isinstance(output, torch.Tensor) else output[0])
        hook.remove()
        unload(layer)
        if not bool(torch.isfinite(moment.products).all()):
            source.check_all_finite()
            raise ValueError(f"{layout.path} gets numbers that are not finite in {dtype}; calibrate in float32")
        yield moment


def embed(
    source: Source,
    model: PreTrainedModel,
    layer_paths: Sequence[str],
    token_ids: torch.Tensor,
    device: str,
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], list[tuple[tuple, dict[str, Any]]]]:
    """What enters the first layer, row by row (1, seq, hidden_size), and each layer's further arguments."""
    inside = tuple(f"{path}." for path in layer_paths)
    outside = [
        (name, module)
        for name, module in model.base_model.named_modules(prefix=prefix_of_base(model))
        if any(True for _ in module.parameters(recurse=False)) and not name.startswith(inside)
    ]
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: load(source, model, name, device, dtype))
        for name, module in outside
    ]
    hooks += [module.register_forward_hook(lambda module, inputs, output: unload(module)) for _, module in outside]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    token_ids = token_ids.to(device)
    calls = [
        (args[1:], kwargs)
        for args, kwargs in record_layer_calls(model, layer_paths, input_ids=token_ids[:1], use_cache=False)
    ]
    states = embeddings_of(model, layer_paths[0], token_ids)
    for hook in hooks:
        hook.remove()
    return list(states.split(1)), calls


def embeddings_of(model: PreTrainedModel, first_layer: str, token_ids: torch.Tensor) -> torch.Tensor:
    """What enters the first layer (batch, seq, hidden_size)."""
    found: list[torch.Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        raise FirstLayerReached

    layer = model.get_submodule(first_layer)
    layer.forward = stop
    base: Any = model.base_model
    try:
        base(input_ids=token_ids, use_cache=False)
    except FirstLayerReached:
        pass
    finally:
        del layer.forward
    return found[0]


def prefix_of_base(model: PreTrainedModel) -> str:
    """The name of the base model in a model with a head."""
    return "" if model.base_model is model else model.base_model_prefix


def load(source: Source, model: PreTrainedModel, path: str, device: str, dtype: torch.dtype) -> None:
    """Gives a module its weights, on a device and in a dtype."""
    source.load_module(model, path)
    for module in model.get_submodule(path).modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                module._parameters[name] = nn.Parameter(parameter.to(device, dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def unload(module: nn.Module) -> None:
    """Takes a module's weights away."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            child._parameters[name] = None if parameter is None else on_meta(parameter)
