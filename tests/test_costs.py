"""What regrouping costs on paper, beside what real models have and real runs hold."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import groupformer
from groupformer.regrouping.costs import Sizes, regrouping_steps
from groupformer.regrouping.heal_recipe import HealRecipe


SMALL = dict(hidden_size=32, num_hidden_layers=12, num_attention_heads=4, vocab_size=50)
CONFIGS = {
    "llama": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 2},
    "gpt2": {"n_embd": 32, "n_layer": 12, "n_head": 4, "vocab_size": 50},
    "groupformer": {**SMALL, "intermediate_size": 64, "per_layer_config": {1: {"num_key_value_heads": 1}}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_model(name):
    config = AutoConfig.for_model(name, **CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config)
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    attention = [layer.attn if name == "gpt2" else layer.self_attn for layer in layers]

    def counts(modules):
        return [sum(tensor.numel() for tensor in module.state_dict().values()) for module in modules]

    assert Sizes.of(config) == Sizes(
        hidden_size=32,
        vocab_size=50,
        model=model.num_parameters(),
        layers=sum(counts(layers)),
        largest_layer=max(counts(layers)),
        attention=max(counts(attention)),
        all_attention=sum(counts(attention)),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Shapes by name, each with a model and the same merged; of the first the memory is not measured."""
    root = tmp_path_factory.mktemp("costs")
    for name, hidden_size, layers, vocab_size in (
        ("warm", 64, 2, 100),
        ("deep", 512, 3, 100),
        ("wide", 1536, 2, 100),
        ("many words", 512, 4, 16000),
    ):
        fields = dict(hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers)
        fields |= dict(num_attention_heads=8, num_key_value_heads=4, vocab_size=vocab_size)
        model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
        model.save_pretrained(root / name / "big")
        groupformer.regroup(model, 2, method="mean").save_pretrained(root / name / "small")
    return root


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process's own memory is read from /proc")
@pytest.mark.parametrize(
    ("step", "shape", "rows"),
    [
        ("merged by the norms", "wide", 4),
        ("merged by text", "deep", 256),
        ("healed, each layer alone", "deep", 128),
        ("healed, all together", "many words", 8),
    ],
)
def test_the_memory_on_paper_is_that_of_a_run(folders, step, shape, rows):
    places = [str(folders / place) for place in (f"{shape}/big", f"{shape}/small", "warm")]
    command = [sys.executable, "-m", "tests.peak_memory", step, *places, str(rows)]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    sizes = Sizes.of(AutoConfig.from_pretrained(folders / shape / "big"))
    steps = regrouping_steps(sizes, rows * 256, HealRecipe(layer_tokens=10**9), row_length=256)
    assert 0.7 * measured < steps[step].memory < 1.3 * measured
