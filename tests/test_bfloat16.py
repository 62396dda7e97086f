"""In bfloat16 an imported model has its native class's bits, or an error of the same size (docs/compatibility.md)."""

import copy

import pytest
import torch

import groupformer

from .helpers import random_ids
from .helpers_families import cases, native_model


SAME_BITS = [
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "option"), cases())
def test_half_precision_is_the_native_ones(family, option):
    native = native_model(family, option)
    ours, ids = groupformer.import_model(native), random_ids(2, 9, vocab_size=60)
    exact = native(ids).logits
    expected = copy.deepcopy(native).bfloat16()(ids).logits
    logits = ours.bfloat16()(ids).logits
    if family in SAME_BITS:
        assert torch.equal(logits, expected)
    else:
        assert (logits - exact).abs().mean() < 1.5 * (expected - exact).abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("family", SAME_BITS)
def test_so_are_cached_tokens(family):
    native = native_model(family, next(option for name, option in cases() if name == family)).bfloat16()
    ours, ids = groupformer.import_model(native), random_ids(2, 9, vocab_size=60)
    steps = []
    for model in (native, ours):
        output, logits = model(ids[:, :6], use_cache=True), []
        for place in range(6, 9):
            output = model(ids[:, place : place + 1], past_key_values=output.past_key_values)
            logits.append(output.logits)
        steps.append(torch.cat(logits))
    torch.testing.assert_close(steps[1], steps[0], atol=2e-2, rtol=2e-2)
