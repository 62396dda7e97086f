"""The cache that grows in place holds what transformers' own does, whatever is done to it, within its memory bound."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from groupformer import GroupFormerForCausalLM
from groupformer.model.cache_groupformer import CACHE_NAME, GrowingLayer, GrowingSlidingWindowLayer, grow_in_place

from .helpers import random_ids, randomize, tiny_config


@pytest.fixture(autouse=True)
def no_gradients():
    """As in decoding: where gradients could flow, a cache is copied (the tests of that say so)."""
    with torch.no_grad():
        yield


LAYERS = {
    "full": (GrowingLayer, DynamicLayer),
    "window": (
        lambda: GrowingSlidingWindowLayer(sliding_window=6),
        lambda: DynamicSlidingWindowLayer(sliding_window=6),
    ),
}


def tokens(count, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, count, 4, generator=generator) for _ in range(2))


def crop(layer):
    layer.crop(-2)


def last_twice(layer):
    return torch.full((2,), layer.keys.shape[0] - 1)


CHANGES = {
    "nothing": lambda layer: None,
    "reordered": lambda layer: layer.reorder_cache(last_twice(layer)),
    "repeated": lambda layer: layer.batch_repeat_interleave(2),
    "selected": lambda layer: layer.batch_select_indices(last_twice(layer)[:1]),
    "offloaded and fetched": lambda layer: (layer.offload(), layer.prefetch()),
    "set from outside": lambda layer: setattr(layer, "keys", layer.keys * 2),
    "reset": lambda layer: layer.reset(),
}


COUNTS = [(5, 1, 1, 1), (1,) * 20, (20, 1, 3, 1), (2, 9, 1, 1, 1, 1)]


def check_against_transformers(kind, change, counts, batch_size):
    """Our layer, after it was held against transformers' own."""
    ours, theirs = (make() for make in LAYERS[kind])
    for step, count in enumerate(counts):
        for layer in (ours, theirs):
            if step == len(counts) // 2:
                CHANGES[change](layer)
        batch = batch_size if ours.keys is None or not ours.get_seq_length() else ours.keys.shape[0]
        seen = ours.update(*tokens(count, step, batch))
        expected = theirs.update(*tokens(count, step, batch))
        for found, wanted in zip((*seen, ours.keys, ours.values), (*expected, theirs.keys, theirs.values)):
            assert torch.equal(found, wanted)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    return ours


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_layer_returns_and_keeps_what_transformers_layer_does(kind, change, counts, batch_size):
    check_against_transformers(kind, change, counts, batch_size)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", [*CHANGES, "copied"])
def test_tensors_taken_out_of_a_layer_stay_what_they_were(kind, change):
    layer, taken = LAYERS[kind][0](), []
    for step, count in enumerate((4, 1, 1, 1, 1)):
        taken += [*layer.update(*tokens(count, step)), layer.keys, layer.values]
        if kind == "full" or layer.get_seq_length() < 6:
            layer.crop(-1)
            taken += [*layer.update(*tokens(1, 9)), layer.keys]
    copies = [tensor.clone() for tensor in taken]
    twin = copy.copy(layer)
    CHANGES.get(change, lambda layer: None)(layer)
    for step in range(12):
        layer.update(*tokens(1, step, 2 if layer.keys is None else layer.keys.shape[0]))
        if change == "copied":
            twin.update(*tokens(1, 100 + step))
    for tensor, original in zip(taken, copies):
        assert torch.equal(tensor, original)


def test_a_window_that_records_its_past_can_be_cropped():
    ours, theirs = (make() for make in LAYERS["window"])
    for layer in (ours, theirs):
        layer.update(*tokens(9, 0))
        layer.activate_past_recording()
        layer.update(*tokens(4, 1))
        layer.crop(-3)
        layer.update(*tokens(1, 2))
    assert torch.equal(ours.keys, theirs.keys)


@pytest.mark.parametrize("length", [100, 1_000, 10_000])
def test_memory_stays_within_a_quarter_more_than_the_tokens_need(length):
    layer = GrowingLayer()
    layer.update(*tokens(length // 2, 0))
    for step in range(length - length // 2):
        layer.update(*tokens(1, step))
    assert layer.keys.shape[2] == length
    assert layer.keys.untyped_storage().nbytes() <= 1.25 * layer.keys.nbytes


def test_a_windows_memory_does_not_keep_the_prompt():
    layer = GrowingSlidingWindowLayer(sliding_window=65)
    layer.update(*tokens(1000, 0))
    assert layer.keys.untyped_storage().nbytes() <= 1.25 * layer.keys.nbytes
    assert layer.keys.shape[2] == 64


def test_decoding_copies_few_tokens_however_long_the_cache_is():
    layer, moved = GrowingLayer(), 0
    layer.update(*tokens(1000, 0))
    for step in range(1000):
        before = layer.buffers
        layer.update(*tokens(1, step))
        moved += layer.keys.shape[2] if layer.buffers is not before else 1
    assert moved < 7 * 1000  # each is written once and copied about five times; concatenating would copy 1,500,000


@pytest.fixture(scope="module")
def model():
    return randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))


def test_generate_and_forward_make_a_growing_cache_by_themselves(model):
    generated = model.generate(random_ids(1, 5), max_new_tokens=3, return_dict_in_generate=True).past_key_values
    forwarded = model(random_ids(1, 5)).past_key_values
    for cache in (generated, forwarded):
        assert type(cache) is DynamicCache
        assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 2


def test_windows_get_growing_windows():
    config = tiny_config(sliding_window=4, layer_types=["full_attention", "sliding_attention"])
    cache = grow_in_place(DynamicCache(config=config))
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, GrowingSlidingWindowLayer]
    assert cache.layers[1].sliding_window == 4


def test_another_cache_that_is_passed_stays_as_it_is(model):
    given = DynamicCache(config=model.config)
    model.generate(random_ids(1, 5), max_new_tokens=3, **{CACHE_NAME: given})
    assert [type(layer) for layer in given.layers] == [DynamicLayer] * 2
    assert given.get_seq_length() == 7


def test_a_cache_is_taken_and_given_by_the_name_that_transformers_uses_and_by_the_old_one(model):
    ids = random_ids(1, 6)
    whole = model(ids).logits[:, -1]
    for name in {CACHE_NAME, "past_key_values"}:
        before = model(ids[:, :-1], use_cache=True)
        assert before.past_key_values is before[CACHE_NAME]
        torch.testing.assert_close(model(ids[:, -1:], **{name: before[CACHE_NAME]}).logits[:, -1], whole)


def test_a_copied_cache_goes_on_by_itself(model):
    prompt, following = random_ids(1, 8), random_ids(1, 3, seed=1)
    cache = model(prompt).past_key_values
    first = model(following, past_key_values=copy.deepcopy(cache)).logits
    again = model(following, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(first, again)
    assert cache.get_seq_length() == 8


@torch.enable_grad()
def test_gradients_flow_through_cached_tokens(model):
    ids = random_ids(1, 6)
    cache = model(ids[:, :4]).past_key_values
    loss = model(ids[:, 4:], past_key_values=cache).logits.square().sum()
    gradient = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    whole = model(ids).logits[:, 4:].square().sum()
    expected = torch.autograd.grad(whole, model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@torch.enable_grad()
def test_keys_that_queries_with_gradients_have_met_are_not_written_over():
    def loss_of_steps(layer):
        total = 0
        for step in range(12):
            keys, values = layer.update(*tokens(1, step))
            total = total + (torch.tanh(query @ keys.transpose(-1, -2)) @ values).sum()
        return total

    query = torch.ones(2, 3, 1, 4, requires_grad=True)
    gradients = [torch.autograd.grad(loss_of_steps(layer()), query)[0] for layer in (GrowingLayer, DynamicLayer)]
    torch.testing.assert_close(*gradients)


def test_a_cache_made_in_inference_mode_goes_on_outside(model):
    with torch.inference_mode():
        cache = model(random_ids(1, 8)).past_key_values
    model(random_ids(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_another_batch_than_the_caches_is_an_error(model):
    cache = model(random_ids(1, 4)).past_key_values
    with pytest.raises(RuntimeError, match="must match"):
        model(random_ids(2, 1), past_key_values=cache)
