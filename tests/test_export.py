"""One decoding step with its cache, exported by transformers' own exporters and run on each engine's runtime. Engines
that are not installed skip their tests; `make test-serving` makes an environment that has them all.
"""

import pytest
import torch
from transformers import StaticCache
from transformers.exporters.auto import AutoHfExporter
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from groupformer import GroupFormerForCausalLM

from .helpers import random_ids, randomize, tiny_config


pytestmark = pytest.mark.slow

BATCH, PROMPT, LENGTH, ROOM = 2, 4, 10, 16


@pytest.fixture(scope="module")
def model():
    return randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2, hidden_size=64, head_dim=16)), std=0.1)


@pytest.fixture
def token_ids():
    return random_ids(BATCH, LENGTH)


def filled_cache(model, token_ids) -> StaticCache:
    """A cache of fixed size that holds a prompt; an exported step takes it and returns it one token longer."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=ROOM)
    cache.early_initialization(len(token_ids), config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    if token_ids.shape[1]:
        with torch.no_grad():
            model(token_ids, past_key_values=cache)
    return cache


ENGINES = {
    "dynamo": ([], {}),
    "onnx": (["onnxruntime", "onnxscript"], {}),
    # A stateful program would keep the cache inside; here it goes in and out, as for the other engines.
    "openvino": (["openvino"], {"stateful": False}),
    "executorch": (["executorch"], {}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exported_step_decodes_with_its_cache(model, token_ids, engine):
    packages, options = ENGINES[engine]
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: make test-serving")
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits

    example = {"input_ids": token_ids[:, :1], "past_key_values": filled_cache(model, token_ids[:, :0])}
    config = {"export_format": engine, **options}
    program = AutoHfExporter.from_config(config).export(model, {**example, "use_cache": True}, config)

    cache = filled_cache(model, token_ids[:, :PROMPT])
    for place in range(PROMPT, LENGTH):
        output = program(input_ids=token_ids[:, place : place + 1], past_key_values=cache)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits, expected[:, place : place + 1], atol=1e-5, rtol=1e-4)


def test_transformers_exportable_decoder_keeps_its_cache(token_ids):
    """The older recipe, in which the cache is state of the program."""
    config = tiny_config(num_key_value_heads=2, hidden_size=64, head_dim=16)
    model = randomize(GroupFormerForCausalLM(config), std=0.1)
    model.generation_config.cache_implementation = "static"
    wrapper = TorchExportableModuleForDecoderOnlyLM(model, batch_size=BATCH, max_cache_len=ROOM)
    with torch.no_grad():
        program = wrapper.export(token_ids[:, :1], cache_position=torch.tensor([0]), strict=False).module()
        expected = model(token_ids, use_cache=False).logits
        for place in range(LENGTH):
            step = {"input_ids": token_ids[:, place : place + 1], "cache_position": torch.tensor([place])}
            torch.testing.assert_close(program(**step), expected[:, place : place + 1], atol=1e-5, rtol=1e-4)
