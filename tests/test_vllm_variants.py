"""Every variant of the architecture in vLLM, a process for all of a kind: what transformers gives, or a refusal."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import groupformer

from .helpers import random_ids, randomize, tiny_config
from .test_vllm import SETTINGS, VLLM_PYTHON
from .test_vllm import pytestmark as pytestmark


NEW_TOKENS = 12
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 9, 17)]
GPT2 = dict(
    norm_type="layer_norm",
    mlp_type="plain",
    hidden_act="gelu_new",
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

GENERATES = {
    **{
        f"{positions} {kv_heads} of 4": dict(position_embedding_type=positions, num_key_value_heads=kv_heads)
        for positions in ("rope", "learned")
        for kv_heads in (4, 2, 1)
    },
    "GPT-2's variants": dict(position_embedding_type="learned", **GPT2),
    "sinusoidal": dict(position_embedding_type="sinusoidal"),
    "no positions": dict(position_embedding_type="none"),
    "layers without rope": dict(no_rope_layers=[1, 0]),
    "yarn": dict(rope_parameters=YARN),
    "partial rope": dict(rope_parameters=HALF),
    "rope by layer type": dict(
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 20.0}},
    ),
    "heads by layer": dict(per_layer_config={0: {"num_key_value_heads": 1}}),
    "window": dict(sliding_window=4),
    "window in one layer": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "scalars": dict(logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0),
    "norm of heads": dict(qk_norm="head", num_key_value_heads=2),
    "norm of projections": dict(qk_norm="projection", num_key_value_heads=2),
    "parallel": dict(parallel_residual=True, norm_type="layer_norm", norm_bias=False),
    "head with a bias": dict(lm_head_bias=True, tie_word_embeddings=False),
    "norm after": dict(norm_position="after"),
    "norms before and after": dict(norm_position="both"),
    "norms around one": dict(
        norm_type="rms_norm_1p",
        norm_position="both",
        qk_norm="head",
        embedding_multiplier=32**0.5,
        round_embedding_multiplier=True,
    ),
    "embedding norm": dict(embedding_norm=True, position_offset=2, position_embedding_type="learned"),
}
SPLIT = {
    "rope": dict(num_key_value_heads=2),
}
BIDIRECTIONAL = dict(is_causal=False)
REFUSED = {  # the field that the error names, the config, and vLLM's options
    "position_embedding_type": (dict(position_embedding_type="alibi"), {}),
    "sliding_window": (dict(sliding_window=4, per_layer_config={0: {"sliding_window": 7}}), {}),
    "is_causal": (BIDIRECTIONAL, {}),
    "qk_norm": (dict(qk_norm="projection"), dict(tensor_parallel_size=2)),
    "num_key_value_heads": (dict(num_key_value_heads=1), dict(tensor_parallel_size=2)),
    "embedding_norm": (dict(embedding_norm=True), dict(pipeline_parallel_size=2)),
}
CLASSIFIES = {"causal": dict(num_key_value_heads=2), "bidirectional": BIDIRECTIONAL}


def build(model_class, overrides):
    """A model whose heads are 32 wide, the narrowest that vLLM has attention for on the CPU."""
    sizes = dict(hidden_size=64, head_dim=32, max_position_embeddings=128)
    return randomize(model_class(tiny_config(**{**sizes, **overrides})), std=0.1)


def run_jobs(folder: Path, models: dict, task: str, **options) -> dict:
    """Runs models in one vLLM process after the other's end; returns the jobs by name, with "result" or "error"."""
    jobs = []
    for name, model in models.items():
        model.save_pretrained(folder / name)
        jobs.append({"path": str(folder / name), "prompts": PROMPTS, "task": task, "options": options})
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    # One rank needs no engine process beside this one, which starts faster.
    processes = str(int(options.get("tensor_parallel_size", 1) > 1))
    subprocess.run(
        [VLLM_PYTHON, Path(__file__).with_name("vllm_offline.py"), file],
        env={**SETTINGS, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": processes},
        cwd=folder,  # not the checkout: the package must be found where it is installed
        check=True,
    )
    return dict(zip(models, json.loads(file.read_text())))


def result_of(job: dict):
    assert "error" not in job, job["error"]
    return job["result"]


def transformers_tokens(model):
    with torch.no_grad():
        return [
            model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)[
                0, len(ids) :
            ].tolist()
            for ids in PROMPTS
        ]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    models = {name: build(groupformer.GroupFormerForCausalLM, case) for name, case in GENERATES.items()}
    return models, run_jobs(tmp_path_factory.mktemp("generate"), models, "generate")


@pytest.mark.parametrize("name", GENERATES)
def test_vllm_generates_the_tokens_of_transformers(generated, name):
    models, jobs = generated
    assert result_of(jobs[name]) == transformers_tokens(models[name])


def test_compiled_vllm_generates_the_tokens_of_transformers(tmp_path):
    model = build(groupformer.GroupFormerForCausalLM, dict(num_key_value_heads=2))
    jobs = run_jobs(tmp_path, {"compiled": model}, "generate", enforce_eager=False)
    assert result_of(jobs["compiled"]) == transformers_tokens(model)


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_generate_the_tokens_of_transformers(tmp_path, name):
    model = build(groupformer.GroupFormerForCausalLM, SPLIT[name])
    jobs = run_jobs(tmp_path, {name: model}, "generate", tensor_parallel_size=2)
    assert result_of(jobs[name]) == transformers_tokens(model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_would_get_wrong_is_refused_by_field(tmp_path, name):
    overrides, options = REFUSED[name]
    model = build(groupformer.GroupFormerForCausalLM, overrides)
    job = run_jobs(tmp_path, {name: model}, "generate", **options)[name]
    assert re.search(rf"[Ee]rror[:,] .*\b{name}\b", job["error"])


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    models = {
        name: build(groupformer.GroupFormerForSequenceClassification, {"num_labels": 3, **case})
        for name, case in CLASSIFIES.items()
    }
    return models, run_jobs(tmp_path_factory.mktemp("classify"), models, "classify")


@pytest.mark.parametrize("name", CLASSIFIES)
def test_vllm_classifies_sequences_as_transformers(classified, name):
    models, jobs = classified
    with torch.no_grad():
        expected = [models[name](torch.tensor([ids])).logits[0].softmax(-1) for ids in PROMPTS]
    torch.testing.assert_close(torch.tensor(result_of(jobs[name])), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    models = {
        name: build(groupformer.GroupFormerForTokenClassification, {"num_labels": 3, **case})
        for name, case in CLASSIFIES.items()
    }
    return models, run_jobs(tmp_path_factory.mktemp("tag"), models, "token_classify")


@pytest.mark.parametrize("name", CLASSIFIES)
def test_vllm_classifies_tokens_as_transformers(tagged, name):
    models, jobs = tagged
    for ids, result in zip(PROMPTS, result_of(jobs[name])):
        with torch.no_grad():
            expected = models[name](torch.tensor([ids])).logits[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(result), expected, atol=1e-4, rtol=1e-4)
