"""What is extracted is the attention: plain float64 arithmetic on the heads gives each module's own output."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from groupformer.regrouping.attention import find_attention
from groupformer.regrouping.probing import attention_calls, build_on_meta

from .helpers_attention import ARCHITECTURES, FAMILY_CASES, tiny_native_config
from .helpers_families import FAMILIES, native_config
from .reference_attention import attend


CASES = [(name, option) for name, options in ARCHITECTURES.items() for option in options]
CASES += [case for case in FAMILY_CASES if case not in CASES]


def config_of(name: str, option: str):
    if option in ARCHITECTURES.get(name, {}):
        return tiny_native_config(name, option)
    return native_config(FAMILIES[name], option)


def random_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of unit gain, norms around 1, and biases that matter."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        tensors[name] = noise / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3 * noise + is_scale
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("name, option", CASES, ids=[f"{name} {option}" for name, option in CASES])
def test_plain_arithmetic_on_the_heads_gives_the_modules_own_output(name, option):
    config = config_of(name, option)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layouts = find_attention(model_class, config)
    calls = attention_calls(
        build_on_meta(model_class, config), [(layout.layer_path, layout.path) for layout in layouts]
    )
    for layer_idx, (layout, call) in enumerate(zip(layouts, calls, strict=True)):
        tensors = random_tensors(call.module)
        inputs = torch.randn(call.inputs.shape, generator=torch.Generator().manual_seed(4))
        expected, _ = call(inputs, tensors)
        if name == "bloom":  # whose attention adds the residual stream itself
            expected = expected - call.args[1]
        found = attend(config, layer_idx, layout, call.module, tensors, inputs).float()
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
