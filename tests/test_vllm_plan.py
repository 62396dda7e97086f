"""`plan`'s arithmetic against how vLLM allots its cache, within 2 %."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from groupformer.measuring.cache import decoder_of, layer_caches

from .test_vllm import SETTINGS, VLLM_PYTHON
from .test_vllm import pytestmark as pytestmark


MEMORY = 64 << 20
SIZES = dict(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
WINDOWS = dict(num_hidden_layers=6, sliding_window=256, layer_types=["sliding_attention"] * 5 + ["full_attention"])
# Model type, its fields, and vLLM's options.
CASES = {
    "llama": ("llama", {}, {}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2}, {}),
    "mixtral": ("mixtral", {"num_local_experts": 2}, {}),
    "windows": ("gemma3_text", WINDOWS, {}),
    "windows, short chunks": ("gemma3_text", WINDOWS, {"max_model_len": 1000, "max_num_batched_tokens": 512}),
    "counts by layer": ("groupformer", {"per_layer_config": {1: {"num_key_value_heads": 1}}}, {}),
    "quantized cache": ("llama", {}, {"kv_cache_dtype": "fp8"}),
}


@pytest.fixture(scope="module")
def allotted(tmp_path_factory):
    """What vLLM says of each case, from one process."""
    folder = tmp_path_factory.mktemp("plan")
    jobs = []
    for name, (model_type, fields, options) in CASES.items():
        config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        options = {"max_model_len": 4096, "kv_cache_memory_bytes": MEMORY, **options}
        jobs.append({"path": str(folder / name), "options": options})
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    settings = {name: value for name, value in SETTINGS.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    subprocess.run(
        [VLLM_PYTHON, Path(__file__).with_name("vllm_cache.py"), file],
        env={**settings, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=folder,
        check=True,
    )
    return dict(zip(CASES, json.loads(file.read_text())))


@pytest.mark.parametrize("name", CASES)
def test_as_many_sequences_fit_as_vllm_says(allotted, name):
    job = allotted[name]
    config = decoder_of(AutoConfig.from_pretrained(job["path"]))
    numbers = sum(
        layer.numbers(job["options"]["max_model_len"], job["block_size"], job["prefill_chunk"])
        for layer in layer_caches(config)
    )
    bytes_per_number = 1 if "kv_cache_dtype" in job["options"] else 2
    assert MEMORY / (numbers * bytes_per_number) == pytest.approx(job["sequences"], rel=0.02)
