"""PEFT's prompt learning: prompts and prefixes are read once, by every layer, in `generate` as in a single pass."""

import peft
import pytest
import torch
from transformers import set_seed

from groupformer import GroupFormerForCausalLM, GroupFormerForSequenceClassification

from .helpers import random_ids, randomize, tiny_config


METHODS = {
    "prompt tuning": peft.PromptTuningConfig,
    "p-tuning": peft.PromptEncoderConfig,
    "prefix tuning": peft.PrefixTuningConfig,
}
SHAPES = {
    "grouped queries": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 16},
    "fewer heads in a layer": {"per_layer_config": {1: {"num_key_value_heads": 1}}},
    "learned positions": {"position_embedding_type": "learned"},
}


def with_prompt(model, method, task="CAUSAL_LM"):
    set_seed(0)
    model = peft.get_peft_model(model, METHODS[method](task_type=task, num_virtual_tokens=3)).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_generate_reads_the_prompt_as_passes_without_a_cache_do(method, shape, use_cache):
    base = randomize(GroupFormerForCausalLM(tiny_config(**SHAPES[shape])))
    model, expected = with_prompt(base, method), random_ids(2, 4)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    tokens = model.generate(input_ids=expected, attention_mask=torch.ones_like(expected), **options)
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_has_a_gradient(method, shape):
    model = with_prompt(GroupFormerForSequenceClassification(tiny_config(**SHAPES[shape])), method, "SEQ_CLS")
    ids = random_ids(2, 4)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1])).loss.backward()
    assert all(
        parameter.grad.abs().sum() > 0 for parameter in model.prompt_encoder.parameters() if parameter.dim() > 1
    )


def test_layers_with_more_heads_than_the_prefix_are_refused_by_name():
    fields = {"num_key_value_heads": 1, "per_layer_config": {1: {"num_key_value_heads": 4}}}
    model, ids = with_prompt(GroupFormerForCausalLM(tiny_config(**fields)), "prefix tuning"), random_ids(1, 4)
    with pytest.raises(ValueError, match=r"num_key_value_heads \(4\) of layer 1 is above the 1 that prefix tuning"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
