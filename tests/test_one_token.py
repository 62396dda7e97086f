"""The lean path of a decoded token: the numbers of a pass without a cache, and no hook or adapter passed over."""

import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groupformer import GroupFormerForCausalLM
from groupformer.model import attention_groupformer, cache_groupformer, modeling_groupformer, ops_groupformer
from groupformer.model.attention_groupformer import (
    attend,
    attend_by_feature,
    attend_in_parts,
    mask_of_parts,
    parts_of_keys,
    reads_halves_faster,
)
from groupformer.model.cache_groupformer import is_by_feature
from groupformer.model.ops_groupformer import rms_norm

from .helpers import random_ids, randomize, tiny_config


USUAL = {
    "MHA": {},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "by layer": {"per_layer_config": {1: {"num_key_value_heads": 2}}},
    "alibi": {"position_embedding_type": "alibi", "num_key_value_heads": 2},
    "learned": {
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "norm_bias": True,
        "mlp_type": "plain",
    },
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "no positions": {"position_embedding_type": "none"},
    "no RoPE in a layer": {"no_rope_layers": [1, 0]},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "multipliers": {"residual_multiplier": 0.3, "attention_multiplier": 0.1, "num_key_value_heads": 2},
    "window": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qk-norm": {"qk_norm": "head", "num_key_value_heads": 2},
    "qk-norm, layer norm": {"qk_norm": "head", "norm_type": "layer_norm"},
    "qk-norm of projections": {"qk_norm": "projection", "num_key_value_heads": 2},
    "partial RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "parallel": {"parallel_residual": True, "residual_multiplier": 0.3, "attention_output_bias": True},
    "parallel, one norm": {"parallel_residual": True, "shared_parallel_norm": True, "mlp_type": "plain"},
    "norms after": {"norm_position": "after", "residual_multiplier": 0.3, "mlp_bias": True},
}


@pytest.fixture
def lean_layers(monkeypatch):
    """Counts the layers that took the lean path."""
    taken = []

    def counted(decode):
        def counting(layer, *arguments):
            taken.append(layer)
            return decode(layer, *arguments)

        return counting

    for kind in modeling_groupformer.LAYERS.values():
        monkeypatch.setattr(kind, "decode", counted(kind.decode))
    return taken


def model_of(**overrides):
    return randomize(GroupFormerForCausalLM(tiny_config(**overrides)))


@torch.no_grad()
def cached_and_whole(model, ids, mask=None, cache=None):
    """Logits of the last token, after a cache of all before, and of one forward pass without a cache."""
    before = None if mask is None else mask[:, :-1]
    cache = model(ids[:, :-1], attention_mask=before, past_key_values=cache, use_cache=True).past_key_values
    cached = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    return cached, model(ids, attention_mask=mask, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("variant", USUAL)
def test_a_token_has_the_logits_of_a_pass_without_a_cache(variant, lean_layers):
    model = model_of(**USUAL[variant])
    cached, whole = cached_and_whole(model, random_ids(2, 9))
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert len(lean_layers) == 2


@pytest.mark.parametrize("variant", USUAL)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_row_has_the_logits_of_float64(variant, dtype, tolerance, lean_layers):
    model, ids = model_of(**USUAL[variant]).to(dtype), random_ids(1, 9)
    cached, _ = cached_and_whole(model, ids)
    assert len(lean_layers) == 2 and cached.dtype == dtype
    _, exact = cached_and_whole(model.double(), ids)
    torch.testing.assert_close(cached.double(), exact, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("band", [4, 2**20])
@pytest.mark.parametrize("variant", USUAL)
def test_products_of_few_rows_change_no_logits(variant, band, monkeypatch):
    model, ids = model_of(**USUAL[variant]), random_ids(9, 5)
    with torch.backends.mkldnn.flags(enabled=False):
        plain, _ = cached_and_whole(model, ids)
    monkeypatch.setattr(ops_groupformer, "PREFERS_ONEDNN", False)
    monkeypatch.setattr(ops_groupformer, "FEW_ROWS", {torch.float32: (1, 2, 48, 1)})
    monkeypatch.setattr(ops_groupformer, "WIDE", (1, 2, 1))
    monkeypatch.setattr(ops_groupformer, "BAND", band)
    for logits in cached_and_whole(model, ids):
        torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", USUAL)
def test_a_left_padded_row_is_not_disturbed(variant, lean_layers):
    model, ids, mask = model_of(**USUAL[variant]), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    cached, whole = cached_and_whole(model, ids, mask)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert len(lean_layers) == 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["GQA", "parallel", "norms after", "qk-norm"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_autocast_takes_the_usual_way(variant, backend, lean_layers):
    model, ids = model_of(**USUAL[variant]), random_ids(1, 9)
    model.set_attn_implementation(backend)
    with torch.autocast("cpu", torch.bfloat16):
        cached, whole = cached_and_whole(model, ids)
    torch.testing.assert_close(cached, whole, rtol=0.05, atol=0.05)
    assert not lean_layers


class ShoutingLayer(modeling_groupformer.GroupFormerDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * 2


def test_layers_of_the_users_own_take_the_usual_way(lean_layers):
    model = model_of()
    for index in range(2):
        model.model.layers[index] = ShoutingLayer(model.config, index).eval()
    cached, whole = cached_and_whole(model, random_ids(2, 9))
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert not lean_layers


def test_a_static_cache_is_read_as_far_as_it_is_filled(lean_layers):
    model = model_of(num_key_value_heads=2)
    cache = StaticCache(config=model.config, max_cache_len=20)
    cached, whole = cached_and_whole(model, random_ids(2, 9), cache=cache)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert len(lean_layers) == 2


HOOKED = [
    ("GQA", "model.layers.0"),
    ("GQA", "model.layers.0.self_attn"),
    ("GQA", "model.layers.0.mlp"),
    ("GQA", "model.layers.0.mlp.act_fn"),
    ("GQA", "model.layers.0.input_layernorm"),
    ("GQA", "model.layers.0.self_attn.k_proj"),
    ("GQA", "model.layers.0.self_attn.o_proj"),
    ("GQA", "model.layers.0.mlp.gate_proj"),
    ("GQA", "model.layers.0.mlp.down_proj"),
    ("qk-norm", "model.layers.0.self_attn.q_norm"),
    ("qk-norm of projections", "model.layers.0.self_attn.k_norm"),
    ("parallel", "model.layers.0.post_attention_layernorm"),
    ("parallel, one norm", "model.layers.0.mlp"),
    ("norms after", "model.layers.0.post_feedforward_layernorm"),
    ("norms after", "model.layers.0.mlp"),
]


@pytest.mark.parametrize("variant, name", HOOKED)
def test_a_hook_sees_the_token_in_its_usual_shape(variant, name):
    model, shapes = model_of(**USUAL[variant]), []
    cache = model(random_ids(2, 8), use_cache=True).past_key_values
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: shapes.append((output[0] if isinstance(output, tuple) else output).shape[:2])
    )
    with torch.no_grad():
        model(random_ids(2, 1), past_key_values=cache)
    hook.remove()
    assert shapes == [(2, 1)]


def test_a_global_hook_sees_every_module(lean_layers):
    model, seen = model_of(), []
    cache = model(random_ids(2, 8), use_cache=True).past_key_values
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    with torch.no_grad():
        model(random_ids(2, 1), past_key_values=cache)
    hook.remove()
    assert set(seen) == {module for module in model.modules() if not isinstance(module, nn.ModuleList)}


def test_a_changed_forward_is_the_one_that_is_called():
    model = model_of()
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj.forward = lambda states: nn.Linear.forward(k_proj, states) + 1
    cached, whole = cached_and_whole(model, random_ids(2, 9))
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)


def test_adapters_act_on_the_token(lean_layers):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model_of(num_key_value_heads=2), lora).eval()
    cached, whole = cached_and_whole(model, random_ids(2, 9))
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert len(lean_layers) == 2


def test_hidden_states_of_a_token_are_those_of_every_layer():
    model, ids = model_of(), random_ids(2, 9)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        token = model(ids[:, -1:], past_key_values=cache, output_hidden_states=True).hidden_states
        whole = model(ids, output_hidden_states=True).hidden_states
    assert len(token) == len(whole) == 3
    for one, all_tokens in zip(token, whole):
        torch.testing.assert_close(one, all_tokens[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("variant", USUAL)
def test_eager_attention_of_a_token(variant, padding, lean_layers):
    model, ids, mask = model_of(**USUAL[variant]), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    model.set_attn_implementation("eager")
    mask[0, :padding] = 0
    cached, whole = cached_and_whole(model, ids, mask)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert len(lean_layers) == 2


def test_eager_attention_shows_the_probabilities_of_a_token():
    model, ids = model_of(), random_ids(2, 9)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        token = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
        whole = model(ids, output_attentions=True).attentions
    assert len(token) == len(whole) == 2
    for one, all_tokens in zip(token, whole):
        torch.testing.assert_close(one, all_tokens[:, :, -1:], rtol=1e-5, atol=1e-5)


def backend_of_ones(module, query, key, value, attention_mask, **kwargs):
    return torch.ones_like(query).transpose(1, 2), None


@pytest.mark.parametrize("name", ["of ones", "eager"])
def test_other_backends_take_the_usual_way(name, lean_layers, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, backend_of_ones)
    model = model_of()
    model.set_attn_implementation(name)
    read = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    cached_and_whole(model, random_ids(2, 9))
    assert not lean_layers and len(read) == 3 and all(bool((states == 1).all()) for states in read)


def test_gradients_take_the_usual_way(lean_layers):
    model = model_of()
    with torch.no_grad():
        cache = model(random_ids(2, 8), use_cache=True).past_key_values
    model(random_ids(2, 1), past_key_values=cache).logits.sum().backward()
    assert not lean_layers and model.model.layers[0].self_attn.q_proj.weight.grad is not None


# RMSNorm of a row ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_of_a_row_is_that_of_float64(scale):
    generator = torch.Generator().manual_seed(0)
    row, weight = torch.randn(1, 1, 64, generator=generator) * scale, torch.randn(64, generator=generator)
    exact = row.double() / (row.double().square().mean() + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(row, weight, 1e-6).double(), exact, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_rms_norm_of_a_row_of_bfloat16_is_rounded_once():
    row, weight = torch.randn(1, 1, 64).bfloat16(), torch.randn(64).bfloat16()
    exact = row.double() / (row.double().square().mean() + 1e-6).sqrt() * weight.double()
    normed = rms_norm(row, weight, 1e-6)
    assert normed.dtype == torch.bfloat16
    torch.testing.assert_close(normed.double(), exact, rtol=2**-8, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_rms_norm_of_odd_rows_is_torchs(value):
    row, weight = torch.full((1, 1, 8), value), torch.ones(8)
    torch.testing.assert_close(
        rms_norm(row, weight, 0.0), torch.rms_norm(row, weight.shape, weight, 0.0), equal_nan=True
    )


def long_cache(kv_heads, seen, dtype=torch.float32, group=3):
    """Queries, keys and values of one token of one sequence, the latter two as views of a longer memory."""
    memory = torch.randn(2, 1, kv_heads, seen + seen // 4, 16, dtype=torch.float64)
    memory[:, :, :, seen:] = float("nan")  # what lies behind must not be read
    key, value = memory[:, :, :, :seen].to(dtype)
    return torch.randn(1, kv_heads, group, 16, dtype=dtype), key, value


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kv_heads, group, seen, parts", [(1, 8, 64, 2), (3, 3, 65, 2), (3, 1, 67, 4), (2, 2, 100, 3)])
def test_keys_in_parts_are_attended_to_as_in_one(kv_heads, group, seen, parts, dtype, tolerance):
    query, key, value = long_cache(kv_heads, seen, dtype, group)
    weights = torch.softmax(query.double() @ key.double().transpose(2, 3) * 0.3, dim=-1)
    output = attend_in_parts(query, key, value, parts, scale=0.3)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), weights @ value.double(), rtol=tolerance, atol=tolerance)


def test_the_mask_of_parts_outlives_inference_mode():
    query, key, value = long_cache(2, 71)
    with torch.inference_mode():
        first = attend_in_parts(query, key, value, 2, None)
    with torch.no_grad():
        assert torch.equal(attend_in_parts(query, key, value, 2, None), first)


@pytest.fixture
def threads():
    """Sets the number of threads, and afterwards the one from before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads, count, parts", [(1, 2, 2), (3, 2, 2), (8, 2, 1), (3, 1, 1), (3, 8, 8), (2, 64, 8)])
def test_threads_read_equal_shares_of_the_keys(kv_heads, count, parts, threads):
    threads(count)
    assert parts_of_keys(*long_cache(kv_heads, 4100)) == parts
    assert parts_of_keys(*long_cache(kv_heads, 500)) == 1  # not worth it


def test_keys_are_not_parted_where_gradients_flow(threads):
    threads(2)
    query, key, value = (states.requires_grad_() for states in long_cache(1, 4100))
    attend(query, key, value, None, 0.25).sum().backward()
    assert all(states.grad.isfinite().all() for states in (query, key, value))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["MHA", "GQA", "MQA", "window"])
def test_long_caches_are_read_in_parts_by_either_path(variant, monkeypatch, threads, lean_layers):
    threads(3)
    monkeypatch.setattr("groupformer.model.attention_groupformer.MANY_KEYS", 8)
    model, token_ids = model_of(**USUAL[variant]), random_ids(1, 20)
    expected = model(token_ids).logits[:, -1]
    for lean in (True, False):
        cache = model(token_ids[:, :-1], use_cache=True).past_key_values
        handle = None if lean else model.model.layers[0].register_forward_hook(lambda *_: None)
        parts = []
        monkeypatch.setattr("groupformer.model.attention_groupformer.attend_in_parts", counting(parts))
        logits = model(token_ids[:, -1:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert parts and set(parts) == {3}
        if handle is not None:
            handle.remove()


def counting(parts):
    """`attend_in_parts`, noting in how many."""

    def count(query, key, value, number, scale):
        parts.append(number)
        return attend_in_parts(query, key, value, number, scale)

    return count


@torch.no_grad()
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("kv_heads, group, mask", [(3, 1, None), (1, 5, None), (3, 2, "hidden"), (2, 3, "biases")])
def test_a_cache_by_feature_is_attended_to_as_by_token(kv_heads, group, mask, halves, monkeypatch):
    monkeypatch.setattr(attention_groupformer, "reads_halves_faster", lambda keys: halves)
    query, key, value = long_cache(kv_heads, 50, group=group)
    keys, values = (states.transpose(2, 3).contiguous().transpose(2, 3) for states in (key, value))
    assert is_by_feature(keys) and not is_by_feature(key)
    bias = torch.zeros(1, 1, 1, 50, dtype=torch.float64)
    if mask == "biases":
        bias = torch.randn(1, kv_heads, group, 50, dtype=torch.float64)
    elif mask == "hidden":
        bias[..., :20] = -torch.inf
    weights = torch.softmax(query.double() @ key.double().transpose(2, 3) * 0.3 + bias, dim=-1)
    given = {None: None, "biases": bias.float(), "hidden": bias == 0}[mask]
    output = attend_by_feature(query, keys, values, given, 0.3)
    torch.testing.assert_close(output.double(), weights @ value.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "heads, threads, seen, halved",
    [(3, 2, 4096, True), (5, 2, 4096, True), (6, 4, 4096, True), (1, 2, 4096, False), (4, 2, 4096, False)]
    + [(9, 2, 4096, False), (3, 1, 4096, False), (3, 2, 1000, False)],
)
def test_heads_are_halved_where_a_thread_would_wait(heads, threads, seen, halved, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert reads_halves_faster(torch.empty(heads, 2, seen)) == halved


@torch.no_grad()
@pytest.mark.parametrize("path", ["lean", "usual", "eager"])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("variant", ["MHA", "GQA", "MQA", "by layer", "alibi", "learned"])
def test_a_cache_by_feature_gives_the_logits_of_a_pass_without_one(variant, padding, path, monkeypatch):
    monkeypatch.setattr(cache_groupformer, "LARGE_LAYER", 1)
    monkeypatch.setattr(cache_groupformer, "LONG", 1)
    monkeypatch.setattr(attention_groupformer, "FEW_QUERIES", 10)
    model, counts = model_of(**USUAL[variant]), (9, 1, 1, 2, 1, 13, 1, 1)
    if path == "eager":
        model.set_attn_implementation("eager")
    elif path == "usual":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    token_ids = random_ids(1, sum(counts))
    mask = torch.ones_like(token_ids)
    mask[:, :padding] = 0
    expected = model(token_ids, attention_mask=mask).logits
    cache, seen, found = None, 0, []
    for count in counts:
        end = seen + count
        outputs = model(token_ids[:, seen:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, seen = outputs.past_key_values, end
        found.append(outputs.logits)
    assert all(is_by_feature(states) for layer in cache.layers for states in (layer.keys, layer.values))
    torch.testing.assert_close(torch.cat(found, 1)[:, padding:], expected[:, padding:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(4096, 64), (2, 700, 160), (3, 150, 7, 64)])
@torch.no_grad()
def test_norms_of_many_rows_are_torchs(shape, dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    rows, weight = (torch.randn(shape) * 5).to(dtype), torch.rand(shape[-1]).to(dtype) + 0.5
    expected = torch.rms_norm(rows.double(), shape[-1:], weight.double(), 1e-3)
    monkeypatch.setattr(torch, "rms_norm", None)  # calling it would fail
    torch.testing.assert_close(rms_norm(rows, weight, 1e-3).double(), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_norms_of_many_rows_spread_no_row_that_is_not_finite():
    rows, weight = torch.randn(4000, 64), torch.ones(64)
    rows[5], rows[6], rows[7] = torch.nan, torch.inf, 0.0
    torch.testing.assert_close(rms_norm(rows, weight, 0.0), torch.rms_norm(rows, (64,), weight, 0.0), equal_nan=True)


def test_norms_of_many_rows_have_gradients_in_torchs_way():
    rows, weight = torch.randn(4000, 64, requires_grad=True), torch.ones(64)
    assert "BatchNorm" not in type(rms_norm(rows, weight, 1e-6).grad_fn).__name__


def test_directions_of_one_token_pass_its_norms():
    model = randomize(GroupFormerForCausalLM(tiny_config())).eval()
    model.set_attn_implementation("eager")
    embedded = model.model.embed_tokens(random_ids(1, 1)).detach()

    def logits(inputs_embeds):
        return model(inputs_embeds=inputs_embeds, use_cache=False).logits

    expected = torch.func.jvp(logits, (embedded,), (torch.ones_like(embedded),))[1]
    with torch.no_grad():
        directions = torch.func.jvp(logits, (embedded,), (torch.ones_like(embedded),))[1]
    torch.testing.assert_close(directions, expected)


def test_what_is_kept_for_later_tokens_lies_on_the_cpu_whatever_the_default_device():
    mask_of_parts.cache_clear()
    path = ops_groupformer.__file__
    with torch.device("meta"):
        mask = mask_of_parts(2, 4, 5, torch.float32)
        module = types.ModuleType("imported_under_another_device")
        exec(compile(Path(path).read_text(), path, "exec"), vars(module))  # as remote code is imported
    assert mask.device.type == "cpu"
    row, weight = torch.randn(1, 1, 8), torch.randn(8)
    with torch.no_grad():
        torch.testing.assert_close(module.rms_norm(row, weight, 1e-6), torch.rms_norm(row, (8,), weight, 1e-6))


@torch.no_grad()
def test_exported_norms_do_not_depend_on_sizes(monkeypatch):
    monkeypatch.setattr(ops_groupformer, "MANY_NUMBERS", 64)
    norm = modeling_groupformer.GroupFormerRMSNorm(8)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(norm, (torch.randn(1, 4, 8),), dynamic_shapes=({1: length},)).module()
    rows = torch.randn(1, 60, 8)
    torch.testing.assert_close(exported(rows), torch.rms_norm(rows, (8,), norm.weight, 1e-6))
