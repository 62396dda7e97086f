"""More than one process: two ranks on the CPU, over gloo, compute what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupformer import GroupFormerForCausalLM
from groupformer.model.configuration_groupformer import divisors
from tests.helpers import random_ids, randomize, tiny_config


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TENSOR_PARALLEL, PIPELINE = {"tp_plan": "auto", "tp_size": 2}, {"pp_size": 2}
BIASES = dict(attention_bias=True, attention_output_bias=True, mlp_bias=True, lm_head_bias=True, mlp_type="plain")

# Name: the config, how it is split, and the word of the error where it cannot be.
HEADS = {
    f"{heads} heads, {kv_heads} KV heads": (
        dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8),
        TENSOR_PARALLEL,
        "num_key_value_heads" if kv_heads % 2 else None,
    )
    for heads in range(1, 9)
    for kv_heads in divisors(heads)
}
CASES = {
    **HEADS,
    "learned positions": (dict(position_embedding_type="learned"), TENSOR_PARALLEL, None),
    "alibi": (dict(position_embedding_type="alibi", num_key_value_heads=2), TENSOR_PARALLEL, None),
    "norm of heads": (dict(qk_norm="head"), TENSOR_PARALLEL, None),
    "norm of projections": (dict(qk_norm="projection", num_key_value_heads=1), TENSOR_PARALLEL, None),
    "biases": (BIASES, TENSOR_PARALLEL, None),
    "heads by layer": (dict(per_layer_config={0: {"num_key_value_heads": 2}}), TENSOR_PARALLEL, None),
    "odd heads in a layer": (dict(per_layer_config={1: {"num_key_value_heads": 1}}), TENSOR_PARALLEL, "of layer 1"),
    "pipeline": (dict(num_key_value_heads=1), PIPELINE, None),
    "pipeline, head of its own": (dict(tie_word_embeddings=False), PIPELINE, None),
    "pipeline, alibi": (dict(position_embedding_type="alibi"), PIPELINE, None),
    "pipeline, learned positions": (dict(position_embedding_type="learned"), PIPELINE, "position_embedding_type"),
    "pipeline, embedding norm": (dict(embedding_norm=True), PIPELINE, "embedding_norm"),
}


def torchrun(*arguments) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=500)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    token_ids, jobs, expected = random_ids(2, 7), [], {}
    for number, (name, (overrides, parallel, _)) in enumerate(CASES.items()):
        model = randomize(GroupFormerForCausalLM(tiny_config(**overrides)))
        model.save_pretrained(folder / str(number))
        with torch.no_grad():
            expected[name] = model(token_ids).logits
        jobs.append({"path": str(folder / str(number)), "parallel": parallel, "token_ids": token_ids.tolist()})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun("-m", "tests.parallel_logits", str(folder / "jobs.json"))
    return expected, dict(zip(CASES, json.loads((folder / "jobs.json").read_text())))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_logits_of_one_process_or_say_why_not(split, name):
    expected, jobs = split
    refusal = CASES[name][2]
    if refusal is not None:
        assert refusal in jobs[name]["error"]
        return
    assert "error" not in jobs[name], jobs[name]["error"]
    torch.testing.assert_close(torch.tensor(jobs[name]["logits"]), expected[name], atol=1e-4, rtol=1e-4)
