"""vLLM itself, through its plugin entry point: no trust_remote_code, no flag that a Llama would not need.

`make test-vllm` makes an environment that has vLLM and runs these; VLLM_PYTHON names another interpreter that has it.
"""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupformer import GroupFormerForCausalLM

from .helpers import random_ids, randomize, tiny_config


# Absolute, as some tests run it elsewhere; not resolved, as an environment is known by its link.
VLLM_PYTHON = os.path.abspath(os.environ.get("VLLM_PYTHON", sys.executable))
SETTINGS = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
CHECKPOINT = Path(__file__).parent.parent / "hub_card"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        subprocess.run([VLLM_PYTHON, "-c", "import vllm"], capture_output=True).returncode != 0,
        reason="vLLM is not installed; `make test-vllm` makes an environment that has it",
    ),
]

LEARNED = {
    "position_embedding_type": "learned",
    "norm_type": "layer_norm",
    "mlp_type": "plain",
    "hidden_act": "gelu_new",
}
SHAPES = {
    "mha, rope": {"num_key_value_heads": 4},
    "gqa, rope": {"num_key_value_heads": 2},
    "mqa, rope": {"num_key_value_heads": 1},
    "mha, learned": {"num_key_value_heads": 4, **LEARNED},
    "gqa, learned": {"num_key_value_heads": 2, **LEARNED},
    "mqa, learned": {"num_key_value_heads": 1, **LEARNED},
    "heads by layer": {"num_key_value_heads": 2, "per_layer_config": {1: {"num_key_value_heads": 1}}},
    "window in a layer": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "sinusoidal, norm over projections": {"position_embedding_type": "sinusoidal", "qk_norm": "projection"},
}
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 3)]


def saved(folder: Path, **options) -> GroupFormerForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    model = randomize(GroupFormerForCausalLM(tiny_config(**{**sizes, **options})), std=0.1)
    model.save_pretrained(folder)
    return model


def run_vllm(folder: Path, count: int = 8, tensor_parallel_size: int = 1) -> subprocess.CompletedProcess:
    request = {"prompts": PROMPTS, "count": count, "tensor_parallel_size": tensor_parallel_size}
    command = [VLLM_PYTHON, str(Path(__file__).parent / "run_vllm.py"), str(folder), json.dumps(request)]
    # On the CPU vLLM wants a NUMA node for each rank, or to be told the cores.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tensor_parallel_size == 2 else {}
    return subprocess.run(command, env={**SETTINGS, **cores}, capture_output=True, text=True, timeout=500)


def tokens_of(done: subprocess.CompletedProcess) -> list[list[int]]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


def expected_tokens(model, count: int = 8) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        found.append(output[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_transformers_tokens(tmp_path, shape):
    model = saved(tmp_path, **SHAPES[shape])
    assert tokens_of(run_vllm(tmp_path)) == expected_tokens(model)


@pytest.mark.parametrize("shape", ["gqa, rope", "mha, learned"])
def test_two_ranks_give_the_same_tokens(tmp_path, shape):
    model = saved(tmp_path, **SHAPES[shape])
    assert tokens_of(run_vllm(tmp_path, tensor_parallel_size=2)) == expected_tokens(model)


def test_alibi_is_refused_by_name(tmp_path):
    saved(tmp_path, position_embedding_type="alibi")
    done = run_vllm(tmp_path)
    assert done.returncode != 0
    assert "cannot add the biases of position_embedding_type='alibi'" in done.stderr + done.stdout


# The server ----------------------------------------------------------------------------------------------------------


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def wait_until_ready(process: subprocess.Popen, url: str, seconds: int = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server was not ready within {seconds} seconds")


@pytest.fixture(scope="module")
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(VLLM_PYTHON).parent / "vllm")
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    options += ["--enforce-eager", "--served-model-name", "reference"]
    process = subprocess.Popen([program, "serve", str(CHECKPOINT), *options], env=SETTINGS)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, -signal.SIGINT, 130)
    finally:
        process.kill()


def continuation(prompt: str, count: int) -> str:
    """What transformers generates, by itself."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_server_completes_many_prompts_at_once(server):
    prompts = ["The cell membrane is", "In the nineteenth century,", "The derivative of a function", "A river"]

    def complete(prompt: str) -> str:
        body = {"model": "reference", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        return post(f"{server}/v1/completions", body)["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(complete, prompts))
    assert answers == [continuation(prompt, 12) for prompt in prompts]


def test_the_server_chats(server):
    body = {"model": "reference", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    message = post(f"{server}/v1/chat/completions", body)["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"]
