"""torch.compile: one graph, made once, for decoding with a static cache and for training."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from groupformer import GroupFormerForCausalLM

from .helpers import random_ids, randomize, tiny_config


SHAPES = {
    "mha, learned positions": {
        "num_key_value_heads": 4,
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
    },
    "gqa, rope": {"num_key_value_heads": 2},
    "mqa, alibi": {"num_key_value_heads": 1, "position_embedding_type": "alibi", "attn_implementation": "sdpa"},
    "qk norm": {"num_key_value_heads": 2, "qk_norm": "head"},
}


def model_of(shape: str) -> GroupFormerForCausalLM:
    torch.compiler.reset()
    return randomize(GroupFormerForCausalLM(tiny_config(num_attention_heads=4, **SHAPES[shape])))


def decode(model, forward, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Logits of a prompt's next tokens, greedily chosen, with a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + count)
    logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    kept = [logits]
    for place in range(prompt.shape[1], prompt.shape[1] + count - 1):
        token = kept[-1][:, -1:].argmax(-1)
        position = torch.tensor([[place]])
        kept.append(forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits)
    return torch.cat(kept, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_is_one_graph_that_is_compiled_once(shape):
    model = model_of(shape).eval()
    prompt = random_ids(2, 5)
    counter = CompileCounter()
    compiled = decode(model, torch.compile(model.forward, fullgraph=True, backend=counter), prompt, 8)
    assert counter.frame_count == 1
    assert torch.allclose(compiled, decode(model, model.forward, prompt, 8), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gqa, rope", "mqa, alibi", "qk norm"])
def test_a_compiled_token_reads_a_static_cache_without_repeating_its_heads(shape):
    model = model_of(shape).eval()
    keys = []

    def look(graph, _):
        attends = torch.nn.functional.scaled_dot_product_attention
        keys.extend(node.args[1].meta["example_value"] for node in graph.graph.nodes if node.target is attends)
        return graph

    decode(model, torch.compile(model.forward, fullgraph=True, backend=look), random_ids(1, 5), 3)
    assert len(keys) == model.config.num_hidden_layers
    assert {key.shape[1] for key in keys} == {model.config.num_key_value_heads}


@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_one_graph_that_is_compiled_once(shape):
    model = model_of(shape).train()
    counter = CompileCounter()
    forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    for seed in range(3):
        input_ids = random_ids(2, 9, seed=seed)
        loss = forward(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        assert torch.allclose(loss, model(input_ids, labels=input_ids).loss, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_by_inductor_the_numbers_stay(shape):
    model = model_of(shape).train()
    input_ids = random_ids(2, 9)
    forward = torch.compile(model.forward, fullgraph=True)
    loss = forward(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    compiled = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    plain = model(input_ids, labels=input_ids).loss
    plain.backward()
    assert torch.allclose(loss, plain, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(compiled[name], parameter.grad, atol=1e-5), name
    with torch.no_grad():
        model.eval()
        prompt = random_ids(2, 5)
        logits = decode(model, torch.compile(model.forward, fullgraph=True), prompt, 8)
        assert torch.allclose(logits, decode(model, model.forward, prompt, 8), atol=1e-5)
