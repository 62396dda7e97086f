"""Training on two processes, over gloo on the CPU: the losses, checkpoints and weights of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from groupformer import GroupFormerForCausalLM

from .helpers import random_ids, randomize, tiny_config


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS, GLOBAL_BATCH = 6, 8
DDP, FSDP = {"ddp_backend": "gloo"}, {"ddp_backend": "gloo", "fsdp": True}
SPLIT = {"ddp": ("wrapped", "DistributedDataParallel"), "fsdp": ("parameter", "DTensor")}
# Transformers' own sharding cannot resume, and says so unless the optimizer is left out of the checkpoints.
OWN_SHARDING = {"ddp_backend": "gloo", "save_only_model": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, tied in {"tied": True, "untied": False}.items():
        config = tiny_config(num_key_value_heads=2, tie_word_embeddings=tied)
        randomize(GroupFormerForCausalLM(config), std=0.1).save_pretrained(folder / name)
    return folder


def train(model: Path, output: Path, processes: int, arguments: dict | None = None, **options) -> dict:
    """Trains in fresh processes; what the first one wrote."""
    fields = {"max_steps": STEPS, "save_steps": 3, "learning_rate": 1e-2}
    fields["per_device_train_batch_size"] = GLOBAL_BATCH // processes
    job = {"model": str(model), "output": str(output), "rows": random_ids(64, 12).tolist(), **options}
    job["arguments"] = {**fields, **(arguments or {})}
    output.mkdir(exist_ok=True)
    (output / "job.json").write_text(json.dumps(job))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distributed_training", str(output / "job.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """The run of one process, for each model."""
    folders = {name: tmp_path_factory.mktemp(f"alone-{name}") for name in ("tied", "untied")}
    return {name: (train(models / name, folder, 1)["losses"], folder) for name, folder in folders.items()}


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def run(request, models, tmp_path_factory):
    arguments = DDP if request.param == "ddp" else FSDP
    output = tmp_path_factory.mktemp(request.param)
    return request.param, arguments, train(models / "tied", output, 2, arguments), output


def same_weights(folder: Path, other: Path) -> None:
    found, expected = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, other))
    assert found.keys() == expected.keys()
    for name in expected:
        # Adam's first steps turn rounding of gradients near 0 into differences of a part of the learning rate.
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=0, msg=name)


def test_two_processes_have_the_losses_of_one(run, alone):
    name, _, result, _ = run
    what, kind = SPLIT[name]
    assert result[what] == kind  # not one process's training twice
    assert len(result["losses"]) == STEPS
    assert result["losses"] == pytest.approx(alone["tied"][0], abs=1e-4)


def test_what_two_processes_saved_loads_in_one(run, alone):
    output = run[3]
    same_weights(output, alone["tied"][1])
    assert (output / "modeling_groupformer.py").exists()
    auto_map = json.loads((output / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_groupformer.GroupFormerForCausalLM"


def test_two_processes_resume_from_their_checkpoint(run, models, tmp_path):
    _, arguments, whole, output = run
    checkpoint = str(output / "checkpoint-3")
    resumed = train(models / "tied", tmp_path / "resumed", 2, arguments, resume=checkpoint)
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    same_weights(tmp_path / "resumed", output)


def test_transformers_own_sharding_has_the_losses_of_one_process(models, alone, tmp_path):
    result = train(models / "untied", tmp_path, 2, OWN_SHARDING, distributed={"fsdp_size": 2})
    assert result["parameter"] == "DTensor"
    assert result["losses"] == pytest.approx(alone["untied"][0], abs=1e-4)
    same_weights(tmp_path, alone["untied"][1])


@pytest.mark.xfail(strict=True, reason="transformers 5.23 and 5.24: wrong from the second step on, for a Llama too")
def test_transformers_own_sharding_trains_tied_embeddings(models, alone, tmp_path):
    result = train(models / "tied", tmp_path, 2, OWN_SHARDING, distributed={"fsdp_size": 2})
    assert result["losses"] == pytest.approx(alone["tied"][0], abs=1e-4)
