"""Other engines and formats that run a GroupFormer: batching, export, quantization. Packages that are not installed
skip their tests; `make test-serving` makes an environment that has them all.
"""

import copy

import pytest
import torch
from transformers import GenerationConfig, QuantizedCache

from groupformer import GroupFormerForCausalLM

from .helpers import random_ids, randomize, tiny_config


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return randomize(GroupFormerForCausalLM(tiny_config(num_key_value_heads=2, hidden_size=64, head_dim=16)), std=0.1)


@pytest.fixture
def token_ids():
    return random_ids(2, 8)


def relative_difference(logits, expected) -> float:
    return ((logits.float() - expected).abs().max() / expected.abs().max()).item()


def test_continuous_batching_gives_the_tokens_of_generate(model, token_ids):
    sizes = dict(num_blocks=64, block_size=16, max_batch_tokens=64)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0, **sizes)
    outputs = model.generate_batch(inputs=token_ids.tolist(), generation_config=settings)
    expected = model.generate(token_ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 8:]
    assert [output.generated_tokens for output in outputs.values()] == expected.tolist()


def test_exported_program_gives_the_same_logits(model, token_ids):
    inputs = {"input_ids": token_ids, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


def test_onnx_runtime_gives_the_same_logits(model, token_ids, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-serving")
    pytest.importorskip("onnxscript", reason="needs onnxscript: make test-serving")
    file = str(tmp_path / "model.onnx")
    inputs = {"input_ids": token_ids, "use_cache": False}
    torch.onnx.export(model, (), file, kwargs=inputs, dynamo=True, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: token_ids.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_torchao_int8_weights_stay_close(model, token_ids, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: make test-serving")
    from transformers import TorchAoConfig

    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = GroupFormerForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(quantized.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    with torch.no_grad():
        assert 0 < relative_difference(quantized(token_ids).logits, model(token_ids).logits) < 0.05


def test_compiled_torchao_int8_weights_generate_in_bfloat16(model, token_ids):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: make test-serving")
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        exact = model(token_ids).logits
        quantization.quantize_(narrow, quantization.Int8WeightOnlyConfig())
        narrow.forward = torch.compile(narrow.forward)
        assert relative_difference(narrow(token_ids).logits.float(), exact) < 0.05
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    assert narrow.generate(token_ids, **options).shape[1] == token_ids.shape[1] + 6


def test_lora_learns_on_a_bitsandbytes_int8_base(model, token_ids, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: make test-serving")
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    quantized = GroupFormerForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with torch.no_grad():
        assert 0 < relative_difference(quantized(token_ids).logits, model(token_ids).logits) < 0.1
    adapted = get_peft_model(quantized, LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted(token_ids, labels=token_ids).loss.backward()
    grads = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_lora_learns_on_a_torchao_int8_base(model, token_ids, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: make test-serving")
    from peft import LoraConfig, get_peft_model
    from transformers import TorchAoConfig

    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = GroupFormerForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    adapted = get_peft_model(quantized, LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted(token_ids, labels=token_ids).loss.backward()
    grads = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


QUANTIZED_CACHES = {
    "hqq-8": ({"backend": "hqq", "nbits": 8}, 0.02),
    "hqq-4": ({"backend": "hqq", "nbits": 4}, 0.25),
    "quanto-4": ({"backend": "quanto", "nbits": 4, "q_group_size": 16}, 0.25),
    "fp8": ({"backend": "fp8"}, 0.1),
}


@pytest.mark.parametrize("name", QUANTIZED_CACHES)
def test_a_quantized_cache_stays_close_to_the_plain_one(name, model, token_ids):
    """The logits of the tokens that it generates, beside those of a pass without a cache."""
    settings, tolerance = QUANTIZED_CACHES[name]
    if settings["backend"] != "fp8":
        package = {"hqq": "hqq", "quanto": "optimum.quanto"}[settings["backend"]]
        pytest.importorskip(package, reason=f"needs {package}: make test-serving")
        # These keep their last tokens as they are; at most three here, so that most of the cache is quantized.
        settings = {**settings, "residual_length": 4}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    quantized = {"cache_implementation": "quantized", "cache_config": settings, "return_dict_in_generate": True}
    output = model.generate(token_ids, output_logits=True, **options, **quantized)
    assert isinstance(output.past_key_values, QuantizedCache)
    assert output.sequences.shape == (2, 16)
    with torch.no_grad():
        expected = model(output.sequences[:, :-1], use_cache=False).logits[:, 7:]
    assert 0 < relative_difference(torch.stack(output.logits, 1), expected) < tolerance
