"""Attention backends: flash attention through transformers' real path, flex, and what each refuses."""

import pytest
import torch

from groupformer import GroupFormerForCausalLM, GroupFormerModel

from .flash_stand_in import flash_attention_on_cpu  # noqa: F401
from .helpers import random_ids, randomize, tiny_config
from .reference import reference_hidden_states
from .test_attention import (
    HEAD_PAIRS,
    PADDINGS,
    VARIANTS,
    assert_close,
    build,
    padding_mask,
    run_cached,
    run_whole,
)


NO_ALIBI = ["learned", "sinusoidal", "rope", "none"]


@pytest.mark.parametrize("heads,kv_heads", HEAD_PAIRS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("position", NO_ALIBI)
def test_flash_attention_is_the_papers_attention(flash_attention_on_cpu, position, is_causal, heads, kv_heads):  # noqa: F811
    model = build(
        hidden_size=heads * 4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        position_embedding_type=position,
        num_hidden_layers=1,
        is_causal=is_causal,
    )
    model.set_attn_implementation("flash_attention_2")
    input_ids = random_ids(2, 7)
    for padding in PADDINGS:
        mask = padding_mask(padding)
        expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
        assert_close(run_whole(model, input_ids, mask), expected, mask)
        if is_causal:
            assert_close(run_cached(model, input_ids, mask), expected, mask)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_flash_attention_serves_every_variant(flash_attention_on_cpu, is_causal, variant):  # noqa: F811
    model = build(num_key_value_heads=2, is_causal=is_causal, **VARIANTS[variant])
    model.set_attn_implementation("flash_attention_2")
    input_ids = random_ids(2, 7)
    for padding in PADDINGS:
        mask = padding_mask(padding)
        expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
        assert_close(run_whole(model, input_ids, mask), expected, mask)


def test_flash_attention_keeps_packed_documents_apart(flash_attention_on_cpu):  # noqa: F811
    model = build(num_key_value_heads=2)
    model.set_attn_implementation("flash_attention_2")
    first, second = random_ids(1, 4), random_ids(1, 5, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        together = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).last_hidden_state
    apart = torch.cat([run_whole(model, first, None), run_whole(model, second, None)], 1)
    assert_close(together, apart.double())


def test_flash_attention_takes_right_padded_batches_with_a_cache(flash_attention_on_cpu):  # noqa: F811
    """Mistral's code once refused these."""
    model = build(num_key_value_heads=2)
    model.set_attn_implementation("flash_attention_2")
    mask = padding_mask("right")
    output = model(random_ids(2, 7), attention_mask=mask, use_cache=True)
    expected = reference_hidden_states(model.state_dict(), model.config, random_ids(2, 7), mask)
    assert_close(output.last_hidden_state.detach(), expected, mask)


def test_flash_attention_gives_finite_numbers_for_a_row_of_padding(flash_attention_on_cpu):  # noqa: F811
    model = build()
    model.set_attn_implementation("flash_attention_2")
    output = run_whole(model, random_ids(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert torch.isfinite(output).all()


def test_flash_attention_generates_the_same_tokens(flash_attention_on_cpu):  # noqa: F811
    model = randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))
    input_ids, mask = random_ids(2, 7), padding_mask("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids, **options)
    model.set_attn_implementation("flash_attention_2")
    assert torch.equal(model.generate(input_ids, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, {"sliding_window": 3}, {"position_embedding_type": "learned"}])
def test_flex_attention_is_the_papers_attention(variant):
    model = randomize(
        GroupFormerModel(
            tiny_config(num_key_value_heads=2, hidden_size=64, num_attention_heads=4, num_hidden_layers=1, **variant)
        )
    )
    model.set_attn_implementation("flex_attention")
    input_ids = random_ids(2, 7)
    for padding in PADDINGS:
        mask = padding_mask(padding)
        expected = reference_hidden_states(model.state_dict(), model.config, input_ids, mask)
        assert_close(run_whole(model, input_ids, mask), expected, mask)


ALIBI = {"position_embedding_type": "alibi"}
REFUSED = [
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "paged|eager",
    "paged|sdpa",
]


@pytest.mark.parametrize("backend", REFUSED)
def test_alibi_is_refused_by_backends_without_biases(backend):
    with pytest.raises(ValueError, match=r"position_embedding_type='alibi'; choose 'eager' or 'sdpa'"):
        GroupFormerModel(tiny_config(attn_implementation=backend, **ALIBI))
    model = GroupFormerModel(tiny_config(**ALIBI))
    with pytest.raises(ValueError, match=r"position_embedding_type='alibi'; choose 'eager' or 'sdpa'"):
        model.set_attn_implementation(backend)
    assert model.config._attn_implementation == "sdpa"


def test_alibi_is_refused_by_continuous_batching():
    model = GroupFormerForCausalLM(tiny_config(**ALIBI))
    with pytest.raises(ValueError, match=r"position_embedding_type \('alibi'\) has no continuous batching"):
        model.init_continuous_batching()


def test_flex_attention_refuses_dropout():
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1; set it to 0"):
        GroupFormerModel(tiny_config(attn_implementation="flex_attention", attention_dropout=0.1))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="is not supported"):
        GroupFormerModel(tiny_config(attn_implementation="flashier"))


def test_the_backend_is_taken_from_the_config_the_load_and_the_setter(tmp_path):
    model = GroupFormerModel(tiny_config(attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert GroupFormerModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    loaded = GroupFormerModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    loaded.set_attn_implementation("sdpa")
    assert all(layer.self_attn.config._attn_implementation == "sdpa" for layer in loaded.layers)


def test_a_backend_set_later_reaches_layers_of_their_own_kind():
    model = build(per_layer_config={1: {"num_key_value_heads": 1}})
    model.set_attn_implementation("eager")
    outputs = model(random_ids(1, 5), output_attentions=True)
    assert [weights.shape for weights in outputs.attentions] == [(1, 4, 5, 5), (1, 4, 5, 5)]
