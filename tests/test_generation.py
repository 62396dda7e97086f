"""Caches and generation: what is cached, how much, and that it changes nothing."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from groupformer import GroupFormerForCausalLM, GroupFormerModel
from groupformer.model.cache_groupformer import CACHE_NAME

from .helpers import random_ids, randomize, tiny_config


VARIANTS = {
    "rope": {},
    "mqa": {"num_key_value_heads": 1},
    "learned": {"position_embedding_type": "learned"},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "alibi": {"position_embedding_type": "alibi"},
    "none": {"position_embedding_type": "none"},
    "short window": {"sliding_window": 3},
    "mixed windows": {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    "alibi with a window": {"position_embedding_type": "alibi", "sliding_window": 3},
    "heads by layer": {"per_layer_config": {1: {"num_key_value_heads": 1}}},
}


def build(**overrides):
    return randomize(
        GroupFormerForCausalLM(tiny_config(num_key_value_heads=2) if not overrides else config(overrides))
    )


def config(overrides):
    return tiny_config(**{"num_key_value_heads": 2, **overrides})


def cache_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_the_cache_shrinks_by_exactly_the_sharing(kv_heads):
    shape = {"num_attention_heads": 8, "hidden_size": 64}
    whole = GroupFormerModel(tiny_config(**shape))(random_ids(2, 9), use_cache=True).past_key_values
    shared = GroupFormerModel(tiny_config(num_key_value_heads=kv_heads, **shape))
    cache = shared(random_ids(2, 9), use_cache=True).past_key_values
    assert cache_bytes(whole) == cache_bytes(cache) * 8 // kv_heads
    assert cache.layers[0].keys.shape == (2, kv_heads, 9, 8)


def test_each_layers_cache_is_as_wide_as_its_own_heads():
    model = GroupFormerModel(tiny_config(per_layer_config={1: {"num_key_value_heads": 1}}))
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [4, 1]


def test_a_static_cache_is_as_wide_as_the_key_value_heads():
    model = build(num_key_value_heads=1)
    cache = StaticCache(model.config, max_cache_len=16)
    model(random_ids(1, 5), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape == (1, 1, 16, 8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(variant, beams):
    model = build(**VARIANTS[variant])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    cached = model.generate(random_ids(2, 6), use_cache=True, **options)
    assert torch.equal(cached, model.generate(random_ids(2, 6), use_cache=False, **options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_left_padded_prompt_generates_what_it_does_alone(variant, beams):
    model = build(**VARIANTS[variant])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    short, long = random_ids(1, 4), random_ids(1, 7, seed=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    together = model.generate(torch.cat([padded, long]), attention_mask=mask, **options)
    for row, prompt in zip(together, (short, long)):
        alone = model.generate(prompt, **options)[0, prompt.shape[1] :]
        assert torch.equal(row[7:][: len(alone)], alone)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_static_cache_generates_the_same(variant):
    model = build(**VARIANTS[variant])
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(random_ids(2, 6), **options)
    static = model.generate(random_ids(2, 6), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("variant", ["rope", "learned", "alibi"])
def test_assisted_decoding_gives_the_models_own_tokens(variant):
    model, assistant = build(**VARIANTS[variant]), randomize(build(**VARIANTS[variant]), seed=1)
    expected = model.generate(random_ids(1, 6), max_new_tokens=8, do_sample=False)
    assisted = model.generate(random_ids(1, 6), max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, expected)


def test_a_cache_that_is_passed_is_the_one_that_is_used():
    model = build()
    cache = DynamicCache(config=model.config)
    passed = model.generate(random_ids(1, 6), max_new_tokens=4, do_sample=False, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 9
    assert torch.equal(passed, model.generate(random_ids(1, 6), max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llamas_weights_give_llamas_logits_and_tokens(kv_heads, backend):
    shape = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=kv_heads, attn_implementation=backend))
    llama = randomize(llama)
    ours = GroupFormerForCausalLM(
        tiny_config(num_key_value_heads=kv_heads, tie_word_embeddings=False, attn_implementation=backend)
    ).eval()
    ours.load_state_dict(llama.state_dict())
    input_ids = random_ids(2, 9)
    torch.testing.assert_close(ours(input_ids).logits, llama(input_ids).logits, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(input_ids, **options), llama.generate(input_ids, **options))


def test_a_bidirectional_model_refuses_to_generate():
    model = GroupFormerForCausalLM(tiny_config(is_causal=False))
    with pytest.raises(ValueError, match=r"is_causal \(False\) makes this model bidirectional"):
        model.generate(random_ids(1, 3))


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_more_positions_than_there_are_are_refused(position):
    model = build(position_embedding_type=position, max_position_embeddings=8)
    model(random_ids(1, 8))
    with pytest.raises(ValueError, match=r"has 9 positions, but max_position_embeddings \(8\)"):
        model(random_ids(1, 9))
    with pytest.raises(ValueError, match=r"max_position_embeddings \(8\)"):
        model.generate(random_ids(1, 6), max_new_tokens=5, do_sample=False)


def test_rope_goes_beyond_its_positions_with_one_warning():
    from groupformer.model.masking_groupformer import logger

    messages = []
    model = build(max_position_embeddings=8)
    warn, logger.warning = logger.warning, messages.append
    try:
        type(logger).warning_once.cache_clear()
        outputs = [model(random_ids(1, 12)).logits for _ in range(2)]
    finally:
        logger.warning = warn
    assert torch.isfinite(outputs[0]).all()
    assert len(messages) == 1 and "more than max_position_embeddings (8)" in messages[0]


def test_ids_and_embeddings_together_or_neither_are_refused():
    model = build()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(random_ids(1, 3), inputs_embeds=torch.zeros(1, 3, 32))
