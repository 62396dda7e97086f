"""Merging and healing on an accelerator: what waits in the CPU's memory meets the device's own tensors there."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Olmo2Config

import groupformer
from groupformer.conversion.loading import has_fast_bf16
from groupformer.regrouping import heal as healing
from groupformer.regrouping import heal_jointly
from groupformer.regrouping.heal_recipe import HealRecipe
from groupformer.regrouping.sensitivity import measured_losses
from groupformer.regrouping.sources import ModelSource
from groupformer.regrouping.steps import find_moments, layer_problem, plan_regrouping

from .helpers import random_ids, tiny_config
from .helpers_devices import Accelerator


IDS = random_ids(6, 20)
SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda kv_heads: LlamaConfig(**SIZES, num_key_value_heads=kv_heads),
    "olmo2": lambda kv_heads: Olmo2Config(**SIZES, num_key_value_heads=kv_heads, eos_token_id=1),
    "gemma2": lambda kv_heads: Gemma2Config(**SIZES, num_key_value_heads=kv_heads, sliding_window=8),
    "groupformer": lambda kv_heads: tiny_config(num_key_value_heads=kv_heads),
}
every_config = pytest.mark.parametrize("build", CONFIGS.values(), ids=CONFIGS)


def model_of(config):
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_stand_in_refuses_what_accelerators_refuse():
    with Accelerator(), pytest.raises((RuntimeError, ValueError), match="device"):
        torch.ones(2, device="meta") + torch.ones(2)
    with Accelerator(), pytest.raises(TypeError, match="float64"):
        torch.ones(2, device="meta").double()


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """torch has none for the stand-in."""
    for module in (healing, heal_jointly):
        monkeypatch.setattr(module, "autocast", lambda device, bf16: nullcontext())


@every_config
def test_healing_computes_on_the_device_of_the_model(build):
    with Accelerator():
        model, original = (model_of(build(kv_heads)).to("meta") for kv_heads in (1, 4))
        report = groupformer.heal(model, original, IDS, HealRecipe())
    assert len(report.layers) == 2 and report.joint is not None
    assert model.device.type == "meta"


@every_config
def test_moments_and_losses_are_measured_on_the_device_that_is_asked_for(build):
    source = ModelSource(model_of(build(4)))
    plan = plan_regrouping(source, "auto", "svd", None, 0.5, 0)
    with Accelerator():
        moments = find_moments(source, plan, IDS, device="meta")
        assert len(moments) == 2
    moments = find_moments(source, plan, IDS)
    problems = (layer_problem(source, plan, moments, layer_idx) for layer_idx in range(2))
    with Accelerator():
        losses = measured_losses(source, plan.layouts, plan.request, problems, IDS, device="meta")
    assert [set(layer) for layer in losses] == [{1, 2, 4}] * 2


def test_bfloat16_that_a_gpu_only_emulates_is_not_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_bf16("cuda")
