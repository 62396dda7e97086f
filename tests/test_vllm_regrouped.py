"""vLLM runs regrouped folders by its own classes, without our plugin's model: the greedy tokens of transformers."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import groupformer
from groupformer.conversion.decilm.writer import export_decilm
from groupformer.regrouping.streaming import regroup_folder

from .helpers import random_ids
from .helpers_attention import randomize_all
from .test_vllm import SETTINGS, VLLM_PYTHON
from .test_vllm import pytestmark as pytestmark


NEW_TOKENS = 12  # those of vllm_offline.py
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 3)]
# Heads are 32 wide, the narrowest that vLLM has attention for on the CPU.
SIZES = dict(
    vocab_size=99,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
EXPERTS = dict(num_experts_per_tok=2, num_local_experts=4, num_experts=4, moe_intermediate_size=64)
WINDOWS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8, query_pre_attn_scalar=32)
NATIVE = {
    "llama": {},
    "qwen3": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gemma3_text": WINDOWS,
}
BY_LAYER = {0: 1, 1: 2}
CASES = [*NATIVE, "decilm"]


def native(model_type: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **NATIVE[model_type]})
    return randomize_all(AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """By case: the regrouped model as transformers has it, and vLLM's job; all in one process of vLLM."""
    folder, models, jobs = tmp_path_factory.mktemp("regrouped"), {}, []
    for name in NATIVE:
        native(name).save_pretrained(folder / f"{name}-before")
        regroup_folder(folder / f"{name}-before", folder / name, 2)
        models[name] = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    models["decilm"] = groupformer.regroup(native("llama"), BY_LAYER)
    models["decilm"].save_pretrained(folder / "by-layer")
    export_decilm(folder / "by-layer", folder / "decilm")
    for name in CASES:
        options = {"trust_remote_code": True} if name == "decilm" else {}
        jobs.append({"path": str(folder / name), "prompts": PROMPTS, "task": "generate", "options": options})
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    subprocess.run(
        [VLLM_PYTHON, Path(__file__).with_name("vllm_offline.py"), file],
        env={**SETTINGS, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=folder,
        check=True,
    )
    return {name: (models[name], job) for name, job in zip(CASES, json.loads(file.read_text()))}


@pytest.mark.parametrize("name", CASES)
def test_vllm_generates_the_tokens_of_transformers(ran, name):
    model, job = ran[name]
    assert "error" not in job, job["error"]
    for ids, tokens in zip(PROMPTS, job["result"]):
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert greedy[0, len(ids) :].tolist() == tokens
