"""The model against a float64 implementation written from the papers' equations (tests/reference.py)."""

import pytest
import torch
from torch import nn
from transformers.integrations import sdpa_attention

from groupformer import GroupFormerForCausalLM, GroupFormerModel
from groupformer.model.cache_groupformer import sdpa_attention_forward

from .helpers import random_ids, randomize, tiny_config
from .reference import reference_hidden_states


HEAD_PAIRS = [(heads, kv) for heads in range(1, 9) for kv in range(1, heads + 1) if heads % kv == 0]
POSITIONS = ["learned", "sinusoidal", "rope", "alibi", "none"]
BACKENDS = ["eager", "sdpa"]
PADDINGS = {"none": None, "left": [[1] * 7, [0, 0, 0, 1, 1, 1, 1]], "right": [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]}

VARIANTS = {
    "layer norm, plain mlp, biases": {
        "norm_type": "layer_norm",
        "mlp_type": "plain",
        "hidden_act": "gelu",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "layer norm without bias": {"norm_type": "layer_norm", "norm_bias": False},
    "norms around one": {"norm_type": "rms_norm_1p", "norm_position": "both", "qk_norm": "head"},
    "norm after": {"norm_position": "after", "qk_norm": "projection"},
    "norms before and after": {"norm_position": "both"},
    "qk norm by head": {"qk_norm": "head"},
    "layer norm on queries and keys": {"qk_norm": "head", "norm_type": "layer_norm"},
    "parallel residual": {"parallel_residual": True},
    "parallel residual, one norm": {"parallel_residual": True, "shared_parallel_norm": True},
    "embedding norm": {"embedding_norm": True},
    "partial rotary": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "rope by layer type": {
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_theta": 20.0},
        },
    },
    "layers without rope": {"no_rope_layers": [1, 0]},
    "sliding window": {"sliding_window": 3},
    "sliding window in one layer": {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    "two windows": {"per_layer_config": {0: {"sliding_window": 2}, 1: {"sliding_window": 4}}},
    "kv heads by layer": {"per_layer_config": {1: {"num_key_value_heads": 1}}},
    "multipliers": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.7},
    "wide heads": {"head_dim": 12},
    "kv heads, window and scale by layer": {
        "per_layer_config": {0: {"num_key_value_heads": 2, "attention_multiplier": 0.1}, 1: {"intermediate_size": 20}}
    },
}


def build(**overrides):
    return randomize(GroupFormerModel(tiny_config(**overrides)))


def padding_mask(name):
    return None if PADDINGS[name] is None else torch.tensor(PADDINGS[name])


def assert_close(actual, expected, real=None):
    """Agreement within 1e-5 of the largest value, at the real tokens."""
    real = torch.ones(actual.shape[:2], dtype=torch.bool) if real is None else real.bool()
    error = (actual.double() - expected)[real].abs().max() / expected[real].abs().max()
    assert error < 1e-5, f"relative error {error:.2e}"


@torch.no_grad()
def run_whole(model, input_ids, mask):
    return model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state


@torch.no_grad()
def run_cached(model, input_ids, mask):
    """Prefill of 3 tokens, then 1, 1 and the last 2 on the cache."""
    cache, parts = None, []
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
        part = mask if mask is None else mask[:, :end]
        output = model(input_ids[:, start:end], attention_mask=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.last_hidden_state)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("heads,kv_heads", HEAD_PAIRS)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_head_count_and_position_kind_is_the_papers_attention(heads, kv_heads, position):
    model = build(
        hidden_size=heads * 4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        position_embedding_type=position,
        num_hidden_layers=1,
    )
    input_ids = random_ids(2, 7)
    for padding in PADDINGS:
        mask = padding_mask(padding)
        expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            assert_close(run_whole(model, input_ids, mask), expected, mask)
            assert_close(run_cached(model, input_ids, mask), expected, mask)


@pytest.mark.parametrize("heads,kv_heads", HEAD_PAIRS)
@pytest.mark.parametrize("position", POSITIONS)
def test_bidirectional_attention_sees_both_sides(heads, kv_heads, position):
    model = build(
        hidden_size=heads * 4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        position_embedding_type=position,
        num_hidden_layers=1,
        is_causal=False,
    )
    input_ids = random_ids(2, 7)
    for padding in PADDINGS:
        mask = padding_mask(padding)
        expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            assert_close(run_whole(model, input_ids, mask), expected, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_its_equations(variant, padding, backend):
    model = build(num_key_value_heads=2, **VARIANTS[variant])
    model.set_attn_implementation(backend)
    input_ids, mask = random_ids(2, 7), padding_mask(padding)
    expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
    assert_close(run_whole(model, input_ids, mask), expected, mask)
    assert_close(run_cached(model, input_ids, mask), expected, mask)


@pytest.mark.parametrize("variant", ["sliding window", "two windows", "kv heads by layer", "norm after"])
def test_bidirectional_variants_are_their_equations(variant):
    model = build(num_key_value_heads=2, is_causal=False, **VARIANTS[variant])
    input_ids, mask = random_ids(2, 7), padding_mask("left")
    expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        assert_close(run_whole(model, input_ids, mask), expected, mask)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("position", POSITIONS)
def test_gqa_whose_heads_are_copies_is_mha(kv_heads, position):
    grouped = build(
        num_attention_heads=8, hidden_size=64, num_key_value_heads=kv_heads, position_embedding_type=position
    )
    whole = build(num_attention_heads=8, hidden_size=64, num_key_value_heads=8, position_embedding_type=position)
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.view(kv_heads, 8, -1).repeat_interleave(8 // kv_heads, 0).reshape(64, -1)
    whole.load_state_dict(state)
    input_ids = random_ids(2, 7)
    assert_close(run_whole(grouped, input_ids, None), run_whole(whole, input_ids, None).double())


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(position, backend):
    model = build(num_key_value_heads=2, position_embedding_type=position)
    model.set_attn_implementation(backend)
    first, second = random_ids(1, 4), random_ids(1, 5, seed=1)
    packed = torch.cat([first, second], 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        together = model(packed, position_ids=positions).last_hidden_state
        apart = torch.cat([run_whole(model, first, None), run_whole(model, second, None)], 1)
    assert_close(together, apart.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_row_of_padding_gives_finite_numbers(backend, position, is_causal):
    model = build(position_embedding_type=position, is_causal=is_causal)
    model.set_attn_implementation(backend)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    output = run_whole(model, random_ids(2, 4), mask)
    assert torch.isfinite(output).all()


# Few new tokens ------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    is_causal = True

    def __init__(self, group):
        super().__init__()
        self.num_key_value_groups = group


def masks(kind, length, seen):
    visible = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)[None, None]
    padded = visible.repeat(2, 1, 1, 1)
    padded[1, :, :, :3] = False
    biases = torch.randn(1, 6, length, seen).masked_fill(~visible, torch.finfo(torch.float32).min)
    return {"none": None, "causal": visible, "left-padded": padded, "biases by head": biases}[kind]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kind", ["none", "causal", "left-padded", "biases by head"])
def test_few_new_tokens_attend_as_with_repeated_heads(kv_heads, length, kind):
    if kind == "none" and length > 1:
        length = 9  # a prompt: without a mask and with as many queries as keys
    query, seen = torch.randn(2, 6, length, 8), 9
    key, value = torch.randn(2, 2, kv_heads, seen, 8).unbind(0)
    mask = masks(kind, length, seen)
    ours, _ = sdpa_attention_forward(Heads(6 // kv_heads), query, key, value, mask, scaling=0.3)
    repeated = (states.repeat_interleave(6 // kv_heads, dim=1).double() for states in (key, value))
    keys, values = repeated
    scores = query.double() @ keys.transpose(2, 3) * 0.3
    if mask is None:
        mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_repeats_no_heads(monkeypatch):
    def refuse(*args):
        raise AssertionError("keys or values were repeated")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", refuse)
    model = randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))
    cache = model(random_ids(2, 7)).past_key_values
    for length in (1, 3):
        mask = torch.ones(2, cache.get_seq_length() + length, dtype=torch.long)
        mask[1, :2] = 0
        model(random_ids(2, length), past_key_values=cache, attention_mask=mask)
