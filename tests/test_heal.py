"""Healing: the attention of a merged model gets closer to the original's, whatever the decoder, and nothing else."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import groupformer
from groupformer import GroupFormerForCausalLM
from groupformer.regrouping.heal import HealRecipe, decoder_layers, heal

from .helpers import random_ids, randomize, tiny_config


RECIPE = HealRecipe(epochs=4, batch_size=4, bf16=False)
NATIVE = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
# Norms on queries and keys, norms after attention, experts, parallel layers, windows and soft caps.
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**NATIVE),
    "qwen3": lambda: transformers.Qwen3Config(**NATIVE),
    "olmo2": lambda: transformers.Olmo2Config(**NATIVE),
    "gemma2": lambda: transformers.Gemma2Config(**NATIVE, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**NATIVE, num_local_experts=4),
    "cohere": lambda: transformers.CohereConfig(**NATIVE),
    "granite": lambda: transformers.GraniteConfig(**NATIVE, residual_multiplier=0.3),
    "groupformer": lambda: tiny_config(),
    "groupformer like gpt2": lambda: tiny_config(
        position_embedding_type="learned", norm_type="layer_norm", attention_bias=True, attention_output_bias=True
    ),
    "groupformer after": lambda: tiny_config(norm_position="after", qk_norm="projection"),
}


def pair(name: str, kv_heads: int = 1):
    """A random model, and the same with fewer key-value heads: the mean of its own, which no table needs to know."""
    config = DECODERS[name]()
    original = randomize(AutoModelForCausalLM.from_config(config))
    fields = {**config.to_dict(), "num_key_value_heads": kv_heads}
    merged = AutoModelForCausalLM.from_config(type(config)(**fields))
    state = original.state_dict()
    for key, tensor in merged.state_dict().items():
        if tensor.shape != state[key].shape:  # keys' and values' projections, and norms over them
            state[key] = state[key].unflatten(0, (-1, tensor.shape[0])).mean(dim=0)
    merged.load_state_dict(state)
    return merged.eval(), original.eval()


@torch.no_grad()
def distance(model, original, token_ids) -> float:
    """KL(original || model), the mean over tokens."""
    expected, got = (each(token_ids).logits.double().log_softmax(-1) for each in (original, model))
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("name", DECODERS)
def test_healing_brings_a_merged_model_closer_to_the_original_and_changes_its_attention_alone(name):
    model, original = pair(name)
    before, state = distance(model, original, random_ids(8, 24, seed=1)), copy.deepcopy(model.state_dict())
    reports = heal(model, original, random_ids(48, 24), RECIPE)
    assert distance(model, original, random_ids(8, 24, seed=1)) < 0.9 * before
    assert all(report.is_healed and report.healed < report.merged for report in reports)
    attention = {
        f".{place}." for place, child in decoder_layers(model)[0].named_children() if "Att" in str(type(child))
    }
    for key, tensor in model.state_dict().items():
        if not any(part in key for part in attention):
            assert torch.equal(tensor, state[key]), key
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_closed_form_alone_gives_the_attention_that_was_lost_where_a_linear_map_can():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.self_attn.o_proj.weight.mul_(0.5)
    reports = heal(model, original, random_ids(48, 24), HealRecipe(epochs=0, ridge=1e-9, bf16=False))
    assert [report.solved < 1e-6 for report in reports] == [True, True]
    for own, other in zip(model.parameters(), original.parameters()):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)


def test_a_model_that_lost_nothing_stays_bit_for_bit():
    _, original = pair("llama")
    model = copy.deepcopy(original)
    reports = heal(model, original, random_ids(8, 16), RECIPE)
    assert all(report.merged < 1e-12 for report in reports)
    for own, other in zip(model.parameters(), original.parameters()):
        assert torch.equal(own, other)


def test_a_layer_whose_loss_is_not_finite_keeps_its_merged_weights_and_is_named():
    model, original = pair("llama")
    with torch.no_grad():
        decoder_layers(model)[1].self_attn.q_proj.weight.fill_(1e30)
    state = copy.deepcopy(model.state_dict())
    reports = heal(model, original, random_ids(16, 16), RECIPE)
    assert [report.is_healed for report in reports] == [True, False]
    assert reports[1].layer_idx == 1
    for key, tensor in model.state_dict().items():
        if "layers.1." in key:
            assert torch.equal(tensor, state[key])


def test_the_dtype_stays_and_healing_works_in_float32():
    model, original = (each.to(torch.bfloat16) for each in pair("llama"))
    before = distance(model, original, random_ids(8, 24, seed=1))
    heal(model, original, random_ids(32, 24), RECIPE)
    assert {parameter.dtype for parameter in [*model.parameters(), *original.parameters()]} == {torch.bfloat16}
    assert distance(model, original, random_ids(8, 24, seed=1)) < before


def test_progress_is_told_of_each_layer():
    model, original = pair("llama")
    seen = []
    heal(model, original, random_ids(8, 16), RECIPE, progress=lambda report, layers: seen.append((report, layers)))
    assert [(report.layer_idx, layers) for report, layers in seen] == [(0, 2), (1, 2)]


def other_original(**fields):
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**NATIVE, **fields}))


REFUSALS = {
    "another class": (dict(original=lambda: GroupFormerForCausalLM(tiny_config())), "original is a GroupFormer"),
    "another size": (dict(original=lambda: other_original(hidden_size=64)), "original has hidden_size 64, but model"),
    "another depth": (dict(original=lambda: other_original(num_hidden_layers=3)), "original has num_hidden_layers 3"),
    "one row": (dict(token_ids=random_ids(1, 16)), "healing needs at least 2 rows of 2 tokens"),
    "no rows": (dict(token_ids=random_ids(0, 16)), "healing needs at least 2 rows of 2 tokens"),
    "long rows": (dict(token_ids=random_ids(4, 65)), "token_ids has rows of 65 tokens, more than max_position"),
    "other ids": (dict(token_ids=random_ids(4, 16) + 99), "but vocab_size is 99; use the model's own tokenizer"),
    "no integers": (dict(token_ids=torch.zeros(4, 16)), "token_ids has shape (4, 16) and dtype torch.float32"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_healed_is_refused_before_any_work(case):
    fields, message = REFUSALS[case]
    model, original = pair("llama")
    state = copy.deepcopy(model.state_dict())
    original = fields["original"]() if "original" in fields else original
    with pytest.raises(ValueError) as refusal:
        heal(model, original, fields.get("token_ids", random_ids(8, 16)), RECIPE)
    assert message in str(refusal.value)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_heal_is_a_public_function():
    assert groupformer.heal is heal


@pytest.mark.parametrize("fields", [dict(epochs=-1), dict(batch_size=0), dict(learning_rate=0), dict(held_out=1)])
def test_a_recipe_that_makes_no_sense_is_refused_by_field(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        HealRecipe(**fields)
