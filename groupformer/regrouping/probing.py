"""What each attention layer of a model receives, learned from the model's own code without its weights.

The model is built from its config with parameters on the `meta` device; its forward pass runs on random embeddings.
Modules outside attention get random weights when they are called and lose them afterwards; layers end when their
attention is called, so that no MLP and no expert is ever in memory.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


PROBE_LENGTH = 7  # tokens; enough for positions to differ, and for a window of a few tokens to hide some


@dataclass
class AttentionCall:
    """One call of an attention module: its path in the model, its arguments, and the norm whose output it reads.

    Args:
        path, layer_path: Names of the attention module and its decoder layer in the model.
        module: The attention module, its parameters on the meta device.
        hidden_states: Name of the argument with the inputs (batch, seq, hidden_size), or its place.
        norm_path: Name of the norm whose output is these inputs; None where they are the residual stream.
    """

    path: str
    layer_path: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    hidden_states: str | int
    norm_path: str | None

    @property
    def inputs(self) -> torch.Tensor:
        return (
            self.args[self.hidden_states] if isinstance(self.hidden_states, int) else self.kwargs[self.hidden_states]
        )

    def __call__(self, inputs: torch.Tensor, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, DynamicCache]:
        """The module's output on other inputs with other parameters, and a fresh cache with what it kept."""
        cache = DynamicCache()

        def replaced(key: Any, value: Any) -> Any:
            return inputs if key == self.hidden_states else cache if isinstance(value, Cache) else value

        args = [replaced(place, value) for place, value in enumerate(self.args)]
        kwargs = {name: replaced(name, value) for name, value in self.kwargs.items()}
        outputs = torch.func.functional_call(self.module, tensors, tuple(args), kwargs)
        return (outputs if isinstance(outputs, torch.Tensor) else outputs[0]), cache


class AttentionReached(Exception):  # noqa: N818
    """Ends a layer when its attention is called."""


class LayersReturnTuples(Exception):  # noqa: N818
    """The model takes the first of several outputs of a layer."""


def build_on_meta(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str | None = "eager"
) -> PreTrainedModel:
    """A model in eval mode whose parameters are on the meta device and whose buffers are computed.

    Args:
        attention: Its backend; every class has the plain one. None leaves the choice to transformers.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    hook = register_module_parameter_registration_hook(registered_on_meta)
    try:
        with no_init_weights():
            return model_class(config).eval()
    finally:
        hook.remove()


def registered_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    """A hook that puts a parameter on the meta device in the place of the one that is registered."""
    return None if parameter is None else on_meta(parameter)


def on_meta(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def record_layer_calls(
    model: PreTrainedModel, layer_paths: Sequence[str], **inputs: Any
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that a forward pass gives to each layer, the hidden states first, no layer being computed.

    Args:
        layer_paths: Names of the decoder layers in the model.
        inputs: Of the model's base.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returns_tuples = False

    def record(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        if args[0].ndim == 2 and not returns_tuples:
            raise LayersReturnTuples
        calls.append((args, kwargs))
        return (args[0],) if returns_tuples else args[0]

    layers = [model.get_submodule(path) for path in layer_paths]
    base: Any = model.base_model
    for layer in layers:
        layer.forward = record
    try:
        base(**inputs)
    except LayersReturnTuples:
        returns_tuples = True
        calls.clear()
        base(**inputs)
    finally:
        for layer in layers:
            del layer.forward
    return calls


@torch.no_grad()
def attention_calls(model: PreTrainedModel, attention_paths: Sequence[tuple[str, str]]) -> list[AttentionCall]:
    """What the attention modules of a model on the meta device receive.

    Args:
        model: From `build_on_meta`.
        attention_paths: (layer, attention module) names of each layer.
    """
    outputs: dict[str, torch.Tensor] = {}  # of modules, to recognise the norm before attention
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(fill_on_call))
        hooks.append(module.register_forward_hook(empty_after_call(name, outputs)))
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, PROBE_LENGTH, embeddings.weight.shape[1], generator=generator)
    layer_calls = record_layer_calls(
        model, [path for path, _ in attention_paths], inputs_embeds=inputs, use_cache=True
    )
    calls = [
        call_of_attention(model, layer_path, path, outputs, *layer_call)
        for (layer_path, path), layer_call in zip(attention_paths, layer_calls)
    ]
    for hook in hooks:
        hook.remove()
    return [call for call in calls if call is not None]


def call_of_attention(
    model: PreTrainedModel,
    layer_path: str,
    path: str,
    outputs: dict[str, torch.Tensor],
    layer_args: tuple[Any, ...],
    layer_kwargs: dict[str, Any],
) -> AttentionCall | None:
    """What a layer gives to its attention; None where it does not call it."""
    attention = model.get_submodule(path)
    found: list[AttentionCall] = []
    outputs.clear()

    def stop(*args: Any, **kwargs: Any) -> None:
        key: str | int = "hidden_states" if "hidden_states" in kwargs else 0
        inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        norm = next((name for name, output in outputs.items() if output is inputs), None)
        found.append(AttentionCall(path, layer_path, attention, args, kwargs, key, norm))
        raise AttentionReached

    attention.forward = stop
    try:
        model.get_submodule(layer_path)(*layer_args, **layer_kwargs)
    except AttentionReached:
        pass
    finally:
        del attention.forward
    return found[0] if found else None


def fill_on_call(module: nn.Module, inputs: Any) -> None:
    """A pre-hook that gives a module's own parameters random values: weights of norms around 1."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
            is_scale = parameter.ndim == 1 and name == "weight"
            module._parameters[name] = nn.Parameter(noise + is_scale, requires_grad=False)


def empty_after_call(path: str, outputs: dict[str, torch.Tensor]) -> Callable:
    """A hook that notes a module's output and takes its parameters away."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs[path] = output
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else on_meta(parameter)

    return hook
