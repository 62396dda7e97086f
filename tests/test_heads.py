"""The heads: pooling, losses, outputs; and what every first-class model can do."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from groupformer import (
    GroupFormerForCausalLM,
    GroupFormerForQuestionAnswering,
    GroupFormerForSequenceClassification,
    GroupFormerForTokenClassification,
    GroupFormerModel,
)

from .helpers import random_ids, randomize, tiny_config


HEADS = {
    GroupFormerForCausalLM: CausalLMOutputWithPast,
    GroupFormerForSequenceClassification: SequenceClassifierOutputWithPast,
    GroupFormerForTokenClassification: TokenClassifierOutput,
    GroupFormerForQuestionAnswering: QuestionAnsweringModelOutput,
}
LABELS = {
    GroupFormerForCausalLM: {"labels": random_ids(2, 5)},
    GroupFormerForSequenceClassification: {"labels": torch.tensor([0, 2])},
    GroupFormerForTokenClassification: {"labels": random_ids(2, 5, vocab_size=3)},
    GroupFormerForQuestionAnswering: {
        "start_positions": torch.tensor([0, 1]),
        "end_positions": torch.tensor([2, 3]),
    },
}


def classifier(**overrides):
    return randomize(GroupFormerForSequenceClassification(tiny_config(**{"num_labels": 3, **overrides})))


def left_padded(prompt, length):
    """A prompt (1, seq) with pad tokens 0 before it, and its mask."""
    missing = length - prompt.shape[1]
    padding = torch.zeros(1, missing, dtype=torch.long)
    return torch.cat([padding, prompt], 1), torch.cat([padding, torch.ones_like(prompt)], 1)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_transformers_output_with_a_loss_that_trains(head):
    model = randomize(head(tiny_config(num_labels=3))).train()
    output = model(random_ids(2, 5), **LABELS[head])
    assert type(output) is HEADS[head]
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_tuples_on_request(head):
    model = randomize(head(tiny_config(num_labels=3)))
    first = model(random_ids(2, 5), return_dict=False)[0]
    expected = model(random_ids(2, 5))
    torch.testing.assert_close(first, expected.to_tuple()[0])


def test_the_next_token_loss_is_cross_entropy_of_shifted_labels():
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    labels = random_ids(2, 6).masked_fill(torch.rand(2, 6) < 0.3, -100)
    output = model(random_ids(2, 6), labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 99), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)


def test_logits_to_keep_gives_the_last_logits():
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    logits = model(random_ids(2, 6)).logits
    torch.testing.assert_close(model(random_ids(2, 6), logits_to_keep=2).logits, logits[:, -2:])
    chosen = torch.tensor([0, 4])
    torch.testing.assert_close(model(random_ids(2, 6), logits_to_keep=chosen).logits, logits[:, chosen])


def test_logits_scaling_divides_the_logits():
    plain = randomize(GroupFormerForCausalLM(tiny_config()))
    scaled = randomize(GroupFormerForCausalLM(tiny_config(logits_scaling=4.0)))
    torch.testing.assert_close(scaled(random_ids(1, 4)).logits * 4, plain(random_ids(1, 4)).logits)


@pytest.mark.parametrize("position", ["rope", "learned", "alibi", "none"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("source", ["ids", "embeddings"])
def test_padding_on_either_side_leaves_the_class_logits_alone(source, is_causal, position):
    model = classifier(is_causal=is_causal, position_embedding_type=position)
    prompt = random_ids(1, 4)
    alone = model(prompt).logits
    padded, mask = left_padded(prompt, 7)
    for input_ids, attention_mask in ((padded, mask), (padded.roll(-3, 1), mask.roll(-3, 1))):
        inputs = {"input_ids": input_ids}
        if source == "embeddings":
            inputs = {"inputs_embeds": model.model.embed_tokens(input_ids)}
        logits = model(**inputs, attention_mask=attention_mask).logits
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


def test_the_mask_finds_the_end_token_that_is_also_the_pad_token():
    model = classifier(pad_token_id=5, eos_token_id=5)
    prompt = torch.tensor([[7, 8, 9, 5]])  # ends with the end token, which is real
    padded = torch.cat([prompt, torch.full((1, 3), 5)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    alone = model(prompt, attention_mask=torch.ones_like(prompt)).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone, rtol=1e-5, atol=1e-5)


def test_without_a_mask_the_last_token_that_is_no_pad_token_is_pooled():
    model = classifier()
    prompt = random_ids(1, 4)
    padded = torch.cat([prompt, torch.zeros(1, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded).logits, model(prompt).logits, rtol=1e-5, atol=1e-5)


def test_without_a_pad_token_batches_of_one_work_and_larger_ones_need_a_mask():
    model = classifier(pad_token_id=None)
    assert model(random_ids(1, 4)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"pad_token_id \(None\) leaves padding unknown in a batch of 2; pass"):
        model(random_ids(2, 4))
    assert model(random_ids(2, 4), attention_mask=torch.ones(2, 4)).logits.shape == (2, 3)


def test_a_bidirectional_model_is_read_as_the_mean_of_its_real_tokens():
    model = classifier(is_causal=False)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    output = model(random_ids(2, 5), attention_mask=mask)
    hidden = model.model(random_ids(2, 5), attention_mask=mask).last_hidden_state
    means = torch.stack([hidden[0, :4].mean(0), hidden[1, 2:].mean(0)])
    torch.testing.assert_close(output.logits, model.score(means), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_row_of_padding_has_finite_class_logits(is_causal):
    model = classifier(is_causal=is_causal)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert torch.isfinite(model(random_ids(2, 3), attention_mask=mask).logits).all()


def test_pooling_works_with_a_cache():
    model = classifier()
    whole = model(random_ids(1, 6)).logits
    mask = torch.ones(1, 6, dtype=torch.long)
    cache = model(random_ids(1, 6)[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    logits = model(random_ids(1, 6)[:, 4:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "problem_type,num_labels,labels,loss",
    [
        ("regression", 1, torch.tensor([0.5, -1.0]), lambda x, y: nn.functional.mse_loss(x.squeeze(), y)),
        ("single_label_classification", 3, torch.tensor([0, 2]), nn.functional.cross_entropy),
        (
            "multi_label_classification",
            3,
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
            nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_each_problem_type_has_its_loss(problem_type, num_labels, labels, loss, named):
    model = classifier(num_labels=num_labels, problem_type=problem_type if named else None)
    output = model(random_ids(2, 4), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    assert model.config.problem_type == problem_type


def test_token_classification_loss_passes_over_ignored_labels():
    model = randomize(GroupFormerForTokenClassification(tiny_config(num_labels=3)))
    labels = torch.tensor([[0, -100, 2, 1], [-100, -100, 1, 1]])
    output = model(random_ids(2, 4), labels=labels)
    assert output.logits.shape == (2, 4, 3)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits.view(-1, 3), labels.view(-1)))


def test_question_answering_loss_is_the_mean_of_start_and_end():
    model = randomize(GroupFormerForQuestionAnswering(tiny_config()))
    start, end = torch.tensor([0, 3]), torch.tensor([2, 3])
    output = model(random_ids(2, 4), start_positions=start, end_positions=end)
    losses = [nn.functional.cross_entropy(*pair) for pair in ((output.start_logits, start), (output.end_logits, end))]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


def test_fresh_weights_start_at_the_loss_of_guessing():
    model = GroupFormerForCausalLM(tiny_config(vocab_size=1000, hidden_size=64))
    loss = model(random_ids(4, 32, 1000), labels=random_ids(4, 32, 1000, seed=1)).loss
    assert abs(loss.item() / torch.tensor(1000.0).log().item() - 1) < 0.02


def test_hidden_states_and_attentions_are_returned_on_request():
    model = GroupFormerModel(tiny_config(attn_implementation="eager", num_key_value_heads=2))
    output = model(random_ids(2, 5), output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in output.hidden_states] == [(2, 5, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(2, 4, 5, 5)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 5))


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = randomize(GroupFormerForCausalLM(tiny_config())).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(random_ids(2, 6), labels=random_ids(2, 6), use_cache=False).loss.backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_tied_head_is_the_embedding_matrix_and_stays_it_when_resized():
    model = GroupFormerForCausalLM(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(random_ids(1, 3)).logits.shape == (1, 3, 120)
    assert model.config.vocab_size == 120


def test_an_untied_head_is_resized_as_well():
    model = GroupFormerForCausalLM(tiny_config(tie_word_embeddings=False, lm_head_bias=True))
    model.resize_token_embeddings(120)
    assert model.lm_head.weight.shape == (120, 32) and model.lm_head.bias.shape == (120,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "alibi"])
def test_half_precision_stays_half_and_close(dtype, position):
    model = randomize(GroupFormerModel(tiny_config(position_embedding_type=position)), std=0.1)
    expected = model(random_ids(2, 6)).last_hidden_state
    output = model.to(dtype)(random_ids(2, 6)).last_hidden_state
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


ROPE_TYPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    "yarn, its own scale": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 8,
        "attention_factor": 0.7,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 8,
        "factor": 2.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPE_TYPES)
@pytest.mark.parametrize("length", [6, 14, 40])
def test_every_rope_type_is_transformers_own(name, length):
    shared = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "tie_word_embeddings": False,
    }
    parameters = {"rope_theta": 500.0, **ROPE_TYPES[name]}
    llama = randomize(LlamaForCausalLM(LlamaConfig(rope_parameters=dict(parameters), **shared)))
    ours = GroupFormerForCausalLM(tiny_config(rope_parameters=dict(parameters), **shared)).eval()
    ours.load_state_dict(llama.state_dict())
    torch.testing.assert_close(ours(random_ids(2, length)).logits, llama(random_ids(2, length)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal", "alibi"])
def test_the_forward_pass_compiles_without_graph_breaks(position):
    model = randomize(GroupFormerForCausalLM(tiny_config(position_embedding_type=position, num_key_value_heads=2)))
    expected = model(random_ids(2, 8), use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(random_ids(2, 8), use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_decoding_with_a_static_cache_compiles():
    model = randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(random_ids(1, 5), **options)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(random_ids(1, 5), cache_implementation="static", **options), expected)


@pytest.mark.slow
def test_the_model_exports():
    model = randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2)))
    exported = torch.export.export(model, (random_ids(1, 8),), {"use_cache": False}, strict=False)
    torch.testing.assert_close(
        exported.module()(random_ids(1, 8, seed=3), use_cache=False).logits, model(random_ids(1, 8, seed=3)).logits
    )
