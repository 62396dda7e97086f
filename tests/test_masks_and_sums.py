"""Masks of every length, beside caches of every kind; sums in half precision; losses of accumulated batches."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
)
from groupformer.model.masking_groupformer import create_attention_masks

from .helpers import random_ids, randomize, tiny_config


POSITIONS = ["learned", "sinusoidal", "rope", "alibi", "none"]
HEADS = {
    "model": GroupFormerModel,
    "causal": GroupFormerForCausalLM,
    "sequence": GroupFormerForSequenceClassification,
    "token": GroupFormerForTokenClassification,
    "question": GroupFormerForQuestionAnswering,
}
CACHES = {
    "no cache": None,
    "growing": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=12),
}


def build(head, **fields):
    return randomize(HEADS[head](tiny_config(**{"num_key_value_heads": 2, "num_labels": 3, **fields})))


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("behind", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
def test_what_stands_behind_the_tokens_in_a_mask_is_not_read(head, position, is_causal, behind):
    model = build(head, position_embedding_type=position, is_causal=is_causal)
    ids, mask = random_ids(2, 5), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    longer = torch.cat((mask, torch.tensor([behind] * 2)), dim=1)
    for use_cache in {False, is_causal}:
        expected = model(ids, attention_mask=mask, use_cache=use_cache)[0]
        torch.testing.assert_close(model(ids, attention_mask=longer, use_cache=use_cache)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("behind", [0, 3])
@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("position", POSITIONS)
def test_new_tokens_stand_where_the_cached_ones_end(cache, behind, new, position):
    model = build("causal", position_embedding_type=position)
    ids, mask = random_ids(2, 6), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -new:]
    longer = torch.cat((mask, torch.zeros(2, behind, dtype=torch.long)), dim=1)
    if cache == "no cache":
        logits = model(ids, attention_mask=longer, use_cache=False).logits[:, -new:]
    else:
        given = CACHES[cache](model.config)
        past = model(ids[:, :-new], attention_mask=mask[:, :-new], past_key_values=given, use_cache=True)
        logits = model(ids[:, -new:], attention_mask=longer, past_key_values=past.past_key_values).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_classifier_reads_the_last_real_token_after_a_cache_too(behind, padding):
    model = build("sequence")
    ids = random_ids(2, 6)
    mask = torch.ones(2, 6 + behind, dtype=torch.long)
    mask[:, 6:] = 0
    mask[1, (slice(0, 2) if padding == "left" else slice(5, None))] = 0
    expected = model(ids, attention_mask=mask[:, :6], use_cache=False).logits
    past = model.model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    logits = model(ids[:, 3:], attention_mask=mask, past_key_values=past).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 3001])
def test_the_mean_of_states_in_half_precision_is_that_of_float64(dtype, length):
    model = build("sequence", is_causal=False, norm_type="layer_norm", max_position_embeddings=4096)
    torch.nn.init.constant_(model.model.norm.bias, 30.0)
    model, ids = model.to(dtype), random_ids(1, length)
    states = model.model(ids).last_hidden_state.double().mean(dim=1)
    expected = states @ model.score.weight.double().t()
    torch.testing.assert_close(model(ids).logits.double(), expected, atol=0.5, rtol=0.02)


TASKS = {
    "classes of sequences": ("sequence", {}, lambda: torch.tensor([0, 2, 1, 1, 0, 2])),
    "several labels": ("sequence", {}, lambda: torch.randint(0, 2, (6, 3)).float()),
    "regression": ("sequence", {"num_labels": 1}, lambda: torch.randn(6)),
    "regression of several": ("sequence", {"problem_type": "regression"}, lambda: torch.randn(6, 3)),
    "classes of tokens": ("token", {}, lambda: torch.randint(0, 3, (6, 4)).masked_fill(torch.rand(6, 4) < 0.3, -100)),
    "next tokens": ("causal", {}, lambda: random_ids(6, 4).masked_fill(torch.rand(6, 4) < 0.3, -100)),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_parts_of_a_batch_have_the_loss_of_the_whole(task, as_tensor):
    head, fields, make_labels = TASKS[task]
    torch.manual_seed(0)
    model, ids, labels = build(head, **fields), random_ids(6, 4), make_labels()
    scored = labels[:, 1:] if head == "causal" else labels
    count = (scored != -100).sum() if as_tensor else int((scored != -100).sum())
    whole = model(ids, labels=labels).loss
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count).loss for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_prepared_masks_need_no_positions_beside_them(positions):
    model = randomize(GroupFormerModel(tiny_config(position_embedding_type=positions)))
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    masks = create_attention_masks(model.config, model.embed_tokens(ids), mask)
    assert torch.equal(model(ids, attention_mask=masks)[0], model(ids, attention_mask=mask)[0])
