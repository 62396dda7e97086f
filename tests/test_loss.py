"""The next-token loss without logits is the plain one, whatever the head is; who reads logits gets them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from groupformer import GroupFormerForCausalLM
from groupformer.model import loss_groupformer
from groupformer.model.loss_groupformer import chunked_causal_lm_loss

from .helpers import random_ids, randomize, tiny_config


@pytest.fixture(params=["in chunks", "at once"], autouse=True)
def either_size(request, monkeypatch):
    """Five rows at a time, so that a few rows are several chunks; and all of them in one."""
    if request.param == "in chunks":
        monkeypatch.setattr(loss_groupformer, "CHUNK_LOGITS", 5 * 99)


def training_model(**overrides):
    return randomize(GroupFormerForCausalLM(tiny_config(**overrides))).train()


def labelled(ignored=True):
    ids = random_ids(3, 11)
    labels = ids.clone()
    if ignored:
        labels[0, :6] = -100
        labels[2] = -100
    return ids, labels


def gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SETTINGS = {
    "untied": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True),
    "bias": dict(tie_word_embeddings=False, lm_head_bias=True),
    "scaled logits": dict(logits_scaling=3.0),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}, {"ignore_index": 7}],
    ids=["mean", "count", "count in a tensor", "other ignored id"],
)
def test_the_loss_without_logits_is_the_plain_loss(setting, options):
    model = training_model(**SETTINGS[setting])
    ids, labels = labelled()
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, 7)
    lean, lean_grads = gradients(model, input_ids=ids, labels=labels, skip_logits=True, **options)
    plain, plain_grads = gradients(model, input_ids=ids, labels=labels, **options)
    assert lean.logits is None and plain.logits.shape == (3, 11, 99)
    torch.testing.assert_close(lean.loss, plain.loss, rtol=1e-6, atol=0)
    assert lean_grads.keys() == plain_grads.keys()
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(lean_grads[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_shifted_labels_can_be_given():
    model = training_model()
    ids, labels = labelled()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    given = model(ids, labels=labels, shift_labels=shifted, skip_logits=True).loss
    torch.testing.assert_close(given, model(ids, labels=labels).loss)


def test_the_loss_is_that_of_an_independent_float64_model():
    hidden, weight = torch.randn(1, 12, 8, dtype=torch.float64), torch.randn(99, 8, dtype=torch.float64)
    head, labels = nn.Linear(8, 99, bias=False), torch.randint(0, 99, (1, 12))
    head.weight = nn.Parameter(weight.float())
    loss = chunked_causal_lm_loss(head, hidden.float(), labels, 99, shift_labels=labels)
    logits = hidden[0] @ weight.t()
    expected = sum(logits[row].exp().sum().log() - logits[row, label] for row, label in enumerate(labels[0])) / 12
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_bfloat16_and_autocast_give_the_plain_loss_nearly():
    ids, labels = labelled()
    for cast in (True, False):
        model = training_model()
        model = model if cast else model.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            lean, lean_grads = gradients(model, input_ids=ids, labels=labels, skip_logits=True)
            plain, plain_grads = gradients(model, input_ids=ids, labels=labels)
        torch.testing.assert_close(lean.loss, plain.loss, rtol=1e-3, atol=1e-3)
        for name, gradient in plain_grads.items():
            distance = (lean_grads[name].float() - gradient.float()).norm() / gradient.float().norm()
            assert distance < 0.03, name


def test_labels_may_be_of_any_integer_type():
    model = training_model()
    ids, labels = labelled()
    torch.testing.assert_close(model(ids, labels=labels.int(), skip_logits=True).loss, model(ids, labels=labels).loss)


def test_a_frozen_head_gets_no_gradient():
    model = training_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    ids, labels = labelled()
    grads = gradients(model, input_ids=ids, labels=labels, skip_logits=True)[1]
    assert "lm_head.weight" not in grads and "model.layers.0.mlp.up_proj.weight" in grads


def test_a_second_backward_gives_the_same_gradients():
    model = training_model(lm_head_bias=True, tie_word_embeddings=False, logits_scaling=2.0)
    ids, labels = labelled()
    parameters = list(model.parameters())
    loss = model(ids, labels=labels, skip_logits=True).loss
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, parameters), tuple(3 * gradient for gradient in first))


def test_hooks_on_the_head_and_its_gradient_are_called():
    model, seen = training_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(-len(outputs[0])))
    ids, labels = labelled()
    model(ids, labels=labels, skip_logits=True).loss.backward()
    scored = int((labels[:, 1:] != -100).sum())
    assert sum(rows for rows in seen if rows < 0) == -scored and sum(seen) >= 0


def test_a_model_on_the_meta_device_has_shapes_of_losses_and_tokens():
    model, ids = training_model().to("meta"), torch.zeros(2, 6, dtype=torch.long, device="meta")
    assert model(ids, labels=ids).loss.is_meta
    model.eval()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert model(ids[:, :1], past_key_values=cache).logits.shape == (2, 1, model.config.vocab_size)


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_returned_unless_they_are_declined(training):
    model = training_model().train(training)
    ids, labels = labelled()
    kept, declined = model(ids, labels=labels), model(ids, labels=labels, skip_logits=True)
    assert kept.logits is not None and declined.logits is None
    torch.testing.assert_close(kept.loss, declined.loss)
    model.skip_logits = True
    assert model(ids, labels=labels).logits is None and model(ids).logits is not None
    assert model(ids, labels=labels, skip_logits=False).logits is not None


@pytest.mark.parametrize("skip_logits", [True, False])
def test_the_tuple_has_logits_or_none_in_their_place(skip_logits):
    model = training_model()
    ids, labels = labelled()
    output = model(ids, labels=labels, skip_logits=skip_logits)
    loss, logits, cache = model(ids, labels=labels, skip_logits=skip_logits, return_dict=False)
    assert loss == output[0] and (logits is None) == skip_logits and (output[1] is None) == skip_logits
    assert cache.get_seq_length() == 11


def test_a_loss_of_the_users_own_gets_its_logits():
    model = training_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: ForCausalLMLoss(logits, labels, vocab_size) * 2
    ids, labels = labelled()
    output = model(ids, labels=labels, skip_logits=True)
    assert output.logits is not None
    model.loss_function = ForCausalLMLoss
    torch.testing.assert_close(output.loss, 2 * model(ids, labels=labels).loss)


def test_an_adapted_head_keeps_its_adapter_in_the_loss():
    model = get_peft_model(training_model(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"]))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    ids, labels = labelled()
    logits = model(input_ids=ids).logits
    loss = model(input_ids=ids, labels=labels, skip_logits=True).loss
    torch.testing.assert_close(loss, ForCausalLMLoss(logits, labels, 99))


def test_a_batch_without_labels_that_count_gives_what_the_plain_loss_gives():
    model = training_model()
    ids = random_ids(1, 4)
    labels = torch.full_like(ids, -100)
    assert torch.isnan(model(ids, labels=labels).loss)
    assert torch.isnan(model(ids, labels=labels, skip_logits=True).loss)
    assert model(ids, labels=labels, num_items_in_batch=3, skip_logits=True).loss == 0
