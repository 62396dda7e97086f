"""Bits per byte and perplexity, against the definition written out token by token."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.measuring.evaluation import evaluate, windows_of

from .helpers import randomize, tiny_config


TEXTS = ["The river rises in the hills, über alles – 河.", "", "It is 9 km long.\n\nThen it ends."]


@pytest.fixture(scope="module")
def tokenizer():
    return GroupFormerTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return randomize(GroupFormerForCausalLM(tiny_config(vocab_size=len(tokenizer), num_hidden_layers=1)))


@torch.no_grad()
def token_by_token(model, input_ids, window, stride) -> float:
    """The loss of each token after the first, from its own forward pass on the context that the protocol gives it."""
    total = 0.0
    for index in range(1, len(input_ids)):
        start = 0
        while start + window <= index:
            start += stride
        logits = model(torch.tensor([input_ids[start:index]])).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[input_ids[index]])
    return total


@pytest.mark.parametrize("window, stride", [(64, 32), (8, 3), (8, 7), (5, 1), (2, 1)])
def test_sums_equal_the_definition(model, tokenizer, window, stride):
    results = evaluate(model, tokenizer, TEXTS, window=window, stride=stride, batch_size=3)
    documents = [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in TEXTS if text
    ]
    nats = sum(token_by_token(model, document, window, stride) for document in documents)
    tokens, size = sum(map(len, documents)) - 2, sum(len(text.encode()) for text in TEXTS)
    assert (results["tokens"], results["bytes"], results["documents"]) == (tokens, size, 2)
    assert results["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary(tokenizer):
    model = GroupFormerForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert evaluate(model, tokenizer, TEXTS)["perplexity"] == pytest.approx(len(tokenizer), rel=1e-4)


def test_without_a_begin_token_the_first_token_and_its_bytes_do_not_count(model, tokenizer):
    bare = GroupFormerTokenizer()
    bare.bos_token = None
    results = evaluate(model, bare, ["The river"])
    tokens = bare("The river", add_special_tokens=False)["input_ids"]
    assert results["tokens"] == len(tokens) - 1
    assert results["bytes"] == len("The river") - len(bare.decode(tokens[:1]))


def test_without_a_begin_token_a_first_character_of_several_tokens_does_not_count(model):
    bare = GroupFormerTokenizer()
    bare.bos_token = None
    text = "河 and river"
    tokens = bare(text, add_special_tokens=False)["input_ids"]
    given = next(count for count in range(1, 9) if bare.decode(tokens[:count]) == "河")
    assert given > 1
    results = evaluate(model, bare, [text], window=2)
    assert (results["tokens"], results["bytes"]) == (len(tokens) - given, len(" and river"))


@pytest.mark.parametrize("text", ["河", "\ufffd"])
def test_a_text_that_is_its_first_character_holds_nothing_to_score(model, text):
    bare = GroupFormerTokenizer()
    bare.bos_token = None
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate(model, bare, [text])


def test_a_loss_that_is_not_finite_is_refused(tokenizer):
    model = GroupFormerForCausalLM(tiny_config(vocab_size=len(tokenizer), num_hidden_layers=1))
    torch.nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match=r"loss is not finite \(nan\).*try dtype float32"):
        evaluate(model, tokenizer, TEXTS)


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"token id \d+, but the model's vocab_size is 99"):
        evaluate(GroupFormerForCausalLM(tiny_config()), tokenizer, TEXTS)


def test_batches_do_not_change_the_result(model, tokenizer):
    losses = [evaluate(model, tokenizer, TEXTS, window=8, batch_size=size)["loss"] for size in (1, 2, 16)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
def test_windows_score_every_token_once(length):
    tokens = list(range(length))
    windows = list(windows_of(tokens, window=8, stride=3))
    assert [token for window in windows for token in window.input_ids[-window.scored :]] == tokens[1:]
    assert all(len(window.input_ids) <= 8 for window in windows)


def test_evaluation_leaves_the_model_in_its_mode(model, tokenizer):
    model.train()
    evaluate(model, tokenizer, TEXTS)
    assert model.training
    model.eval()


REFUSALS = {
    "no_text": (dict(texts=[""]), "nothing to score"),
    "window": (dict(window=65), "window (65) must be at least 2 and at most max_position_embeddings (64)"),
    "stride": (dict(window=8, stride=8), "stride (8) must be at least 1 and below window (8)"),
    "batch": (dict(batch_size=0), "batch_size (0) must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_name(model, tokenizer, case):
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError) as refusal:
        evaluate(model, tokenizer, **{"texts": TEXTS, **arguments})
    assert message in str(refusal.value)


def test_bidirectional_models_are_refused(tokenizer):
    with pytest.raises(ValueError, match="is_causal"):
        evaluate(GroupFormerForCausalLM(tiny_config(is_causal=False)), tokenizer, TEXTS)


def test_the_command_evaluates_native_models_and_prints_json(tmp_path, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text(TEXTS[0], encoding="utf-8")
    arguments = ["eval", str(tmp_path / "llama"), "--file", str(tmp_path / "text.txt"), "--stride", "4", "--json"]
    outcome = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(outcome.stdout)
    assert results == pytest.approx(evaluate(llama, tokenizer, TEXTS[:1], stride=4))
