"""Faults: killed runs, full disks, damaged checkpoints, and input that no model should be given."""

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from groupformer import GroupFormerForCausalLM
from groupformer.commands.main import app
from groupformer.conversion.loading import load_checked
from groupformer.training.pretraining import pretrain
from groupformer.training.run import last_checkpoint

from .helpers import random_ids, randomize, tiny_config
from .test_training import INTERRUPTED, losses, tiny_pretraining


# Killed runs ---------------------------------------------------------------------------------------------------------

RESUMED = INTERRUPTED.replace("sys.argv[2])", "sys.argv[2], resume=True)")


def step_of(checkpoint):
    return int(checkpoint.split("-")[-1]) if checkpoint else 0


def kill_once_it_has_gone_on(recipe, output, delay):
    """Resumes a run in a process of its own, and kills it some time after it has saved a checkpoint."""
    before = step_of(last_checkpoint(output)) if output.exists() else 0
    command = [sys.executable, "-c", RESUMED, json.dumps(vars(recipe)), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and step_of(last_checkpoint(output) if output.exists() else None) <= before:
        time.sleep(0.005)
    time.sleep(delay)
    ended = process.poll()
    process.kill()
    _, errors = process.communicate()
    assert ended is None, errors  # it was still running, and was not stopped by an error


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_has_the_losses_of_an_undisturbed_one(tmp_path):
    recipe = tiny_pretraining(tmp_path, max_steps=1500, save_steps=3, eval_steps=500)
    pretrain(recipe, tmp_path / "whole")
    output, moments = tmp_path / "cut", random.Random(0)
    for _ in range(20):
        kill_once_it_has_gone_on(recipe, output, moments.uniform(0, 0.15))
        assert step_of(last_checkpoint(output)) < recipe.max_steps
    pretrain(recipe, output, resume=True)
    assert losses(output) == losses(tmp_path / "whole")
    assert len(losses(output)) == recipe.max_steps


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_checkpoint_whose_saving_was_cut_off_is_passed_over(damage, tmp_path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 2}')
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    changes = {"missing": state.unlink, "empty": lambda: state.write_text(""), "cut": lambda: state.write_text('{"g')}
    changes[damage]()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


# Full disks ----------------------------------------------------------------------------------------------------------

ON_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {disk} && cp -r {source}/. {disk} && {command}
status=$?
cp -r {disk}/. {result}
exit $status
"""


def on_a_small_disk(tmp_path, size, *arguments, source=None):
    """Runs Python with a folder `disk` of limited size; what it held in the end is copied to `result`."""
    for name in ("disk", "result", "nothing"):
        (tmp_path / name).mkdir()
    may_mount = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run(may_mount, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a tmpfs in a namespace of its own")
    names = {"disk": tmp_path / "disk", "result": tmp_path / "result", "source": source or tmp_path / "nothing"}
    script = ON_SMALL_DISK.format(size=size, command='"$@"', **names)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training_keeps_the_checkpoint_before(tmp_path):
    recipe = tiny_pretraining(tmp_path)  # a checkpoint of 6 MB every second step
    done = on_a_small_disk(tmp_path, "16m", "-c", INTERRUPTED, json.dumps(vars(recipe)), tmp_path / "disk" / "run")
    assert done.returncode != 0 and "No space left on device" in done.stderr
    output = tmp_path / "result" / "run"
    assert step_of(last_checkpoint(output)) == 4
    load_checked(AutoModelForCausalLM, last_checkpoint(output))
    pretrain(recipe, output, resume=True)
    pretrain(recipe, tmp_path / "whole")
    assert losses(output) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_up_while_regrouping_keeps_what_was_there(tmp_path):
    model = randomize(GroupFormerForCausalLM(tiny_config(vocab_size=4000)))
    model.save_pretrained(tmp_path / "old" / "model")
    (tmp_path / "old" / "target").mkdir()
    (tmp_path / "old" / "target" / "precious.txt").write_text("keep me")
    arguments = [tmp_path / "disk" / "model", tmp_path / "disk" / "target", "--kv-heads", "2", "--overwrite"]
    command = ["-m", "groupformer", "regroup", *arguments]
    done = on_a_small_disk(tmp_path, "900k", *command, source=tmp_path / "old")
    assert done.returncode == 1 and "No space left on device" in done.stderr
    left = sorted(str(path.relative_to(tmp_path / "result")) for path in (tmp_path / "result").rglob("*.txt"))
    assert left == ["target/precious.txt"]
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == ["model", "target"]


# Damaged checkpoints -------------------------------------------------------------------------------------------------

TENSOR = "model.layers.1.mlp.gate_proj.weight"


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def poison(value):
    def change(tensors):
        tensors[TENSOR][3, 4] = value

    return lambda path: rewrite(path, change)


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), ["model.safetensors", "not fully covered"]),
    "only a part of the header": (lambda path: path.write_bytes(path.read_bytes()[:50]), ["model.safetensors"]),
    "empty": (lambda path: path.write_bytes(b""), ["model.safetensors", "broken"]),
    "a bit flipped in the header": (lambda path: flip(path, 12), ["model.safetensors", "broken"]),
    "a bit flipped in its length": (lambda path: flip(path, 5), ["model.safetensors", "broken"]),
    "NaN": (poison(float("nan")), ["model.safetensors", TENSOR, "holds NaN or infinity in 1 places"]),
    "infinity": (poison(float("inf")), ["model.safetensors", TENSOR, "holds NaN or infinity in 1 places"]),
    "a tensor missing": (lambda path: rewrite(path, lambda tensors: tensors.pop(TENSOR)), [TENSOR, "incomplete"]),
    "another shape": (
        lambda path: rewrite(path, lambda tensors: tensors.update({TENSOR: torch.ones(47, 32)})),
        ["model.safetensors", TENSOR, "(47, 32)", "(48, 32)"],
    ),
    "no file": (lambda path: path.unlink(), ["model.safetensors"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_by_file_and_tensor(damage, tmp_path):
    GroupFormerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    change, words = DAMAGES[damage]
    change(tmp_path / "model.safetensors")
    with pytest.raises((ValueError, OSError)) as error:
        load_checked(AutoModelForCausalLM, tmp_path)
    assert [word for word in words if word not in str(error.value)] == []


def test_the_shard_that_is_missing_or_truncated_is_named(tmp_path):
    GroupFormerForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="20KB")
    second = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=second.name):
        load_checked(AutoModelForCausalLM, tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=second.name):
        load_checked(AutoModelForCausalLM, tmp_path)


def test_every_command_that_loads_a_model_refuses_a_damaged_one(tmp_path):
    from groupformer import GroupFormerTokenizer

    GroupFormerForCausalLM(tiny_config(vocab_size=16384, max_position_embeddings=512)).save_pretrained(
        tmp_path / "model"
    )
    GroupFormerTokenizer().save_pretrained(tmp_path / "model")
    poison(float("nan"))(tmp_path / "model" / "model.safetensors")
    (tmp_path / "text.txt").write_text("The river is wide. " * 50)
    model, text, out = (str(tmp_path / name) for name in ("model", "text.txt", "out"))
    commands = [
        ["generate", model, "The river"],
        ["eval", model, "--file", text],
        ["uptrain", model, "--teacher", model, "--data", text, "--tokens", "1000", "--output", out],
        ["regroup", model, out, "--kv-heads", "2"],
    ]
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and "NaN" in str(done.exception) and TENSOR in str(done.exception), done.exception
        assert not Path(out).exists()


def test_a_whole_checkpoint_loads_as_it_is_and_a_new_head_may_be_fresh(tmp_path):
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    model.save_pretrained(tmp_path)
    loaded = load_checked(AutoModelForCausalLM, tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert load_checked(AutoModelForSequenceClassification, tmp_path, fresh_head=True, num_labels=3).num_labels == 3
    with pytest.raises(ValueError, match=r"lacks the tensor score\.weight"):
        load_checked(AutoModelForSequenceClassification, tmp_path, num_labels=3)


# Input ---------------------------------------------------------------------------------------------------------------

POSITIONS = ["learned", "sinusoidal", "rope", "alibi", "none"]


@pytest.fixture(params=POSITIONS)
def model(request):
    return randomize(GroupFormerForCausalLM(tiny_config(position_embedding_type=request.param)))


ONES = torch.ones(2, 5, dtype=torch.long)
BAD_INPUTS = {
    "an id that is too large": (dict(input_ids=ONES * 99), IndexError, r"input_ids holds 99, but vocab_size \(99\)"),
    "a negative id": (dict(input_ids=-ONES), IndexError, "input_ids holds -1, but vocab_size"),
    "no rows": (dict(input_ids=ONES[:0]), ValueError, r"the input has shape \(0, 5\)"),
    "no tokens": (dict(input_ids=ONES[:, :0]), ValueError, r"the input has shape \(2, 0\)"),
    "no batch": (dict(input_ids=ONES[0]), ValueError, r"the input has shape \(5,\)"),
    "a shorter mask": (dict(input_ids=ONES, attention_mask=ONES[:, :3]), ValueError, r"attention_mask has shape"),
    "another batch's mask": (dict(input_ids=ONES, attention_mask=ONES[:1]), ValueError, r"attention_mask has shape"),
    "an additive mask (B, S)": (
        dict(input_ids=ONES, attention_mask=ONES * -1e4),
        ValueError,
        "must hold 1 for real tokens and 0 for padding",
    ),
    "labels outside the vocabulary": (dict(input_ids=ONES, labels=ONES * 99), IndexError, "99"),
    "labels of another length": (dict(input_ids=ONES, labels=ONES[:, :3]), ValueError, "batch_size"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_input_that_makes_no_sense_is_refused(case, model):
    inputs, error, message = BAD_INPUTS[case]
    with pytest.raises(error, match=message):
        model(**inputs)


def test_a_mask_shorter_than_the_cache_is_refused(model):
    cache = model(random_ids(2, 7)).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1\).*after 7 cached tokens"):
        model(random_ids(2, 1), past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_layers_that_came_in_after_the_model_was_built_are_run():
    model = randomize(GroupFormerForCausalLM(tiny_config())).eval()
    before = model(random_ids(1, 5)).logits
    added = copy.deepcopy(model.model.layers[1])
    added.self_attn.layer_idx = 2
    model.model.layers.append(added)
    model.config.num_hidden_layers = 3
    assert model.config.layer_types == ["full_attention"] * 3  # derived again
    with_three = randomize(GroupFormerForCausalLM(tiny_config(num_hidden_layers=3))).eval()
    with_three.load_state_dict(model.state_dict())
    assert not torch.equal(model(random_ids(1, 5)).logits, before)
    assert torch.equal(model(random_ids(1, 5)).logits, with_three(random_ids(1, 5)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.bool])
def test_a_mask_of_any_dtype_means_the_same(dtype, model):
    ids = random_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    expected, found = (model(ids, attention_mask=each).logits[mask.bool()] for each in (mask, mask.to(dtype)))
    assert torch.equal(found, expected)


def test_a_prompt_ten_times_too_long_is_refused_or_computed(model):
    ids = random_ids(1, 10 * model.config.max_position_embeddings)
    if model.config.position_embedding_type in ("learned", "sinusoidal"):
        with pytest.raises(ValueError, match=r"The sequence has 640 positions, but max_position_embeddings \(64\)"):
            model.generate(ids, max_new_tokens=2)
        return
    tokens = model.generate(ids, max_new_tokens=2, do_sample=False)
    logits = model(tokens[:, :-1]).logits
    assert torch.equal(tokens[0, -2:], logits[0, -2:].argmax(-1)) and torch.isfinite(logits).all()


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_every_head_refuses_empty_input(head):
    import groupformer

    model = getattr(groupformer, f"GroupFormerFor{head}")(tiny_config())
    with pytest.raises(ValueError, match=r"the input has shape \(2, 0\)"):
        model(ONES[:, :0])
