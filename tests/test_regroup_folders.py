"""Regrouping from folder to folder: the same as in memory, whole or not at all, and within little memory."""

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerModel, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.commands.regrouping import wanted_heads
from groupformer.conversion.checkpoint import Entry, open_checkpoint
from groupformer.conversion.shards import Piece, bytes_of, write_shards
from groupformer.regrouping.processes import Processes
from groupformer.regrouping.streaming import regroup_folder

from .helpers import random_ids, randomize, tiny_config


CALIBRATION = random_ids(3, 40, seed=1)
KINDS = {
    "rope": {},
    "learned_bias": {"position_embedding_type": "learned", "norm_type": "layer_norm", "attention_bias": True},
    "alibi": {"position_embedding_type": "alibi", "embedding_norm": True},
    "sinusoidal_after": {"position_embedding_type": "sinusoidal", "norm_position": "after"},
    "windows": {"sliding_window": 8, "tie_word_embeddings": False},
}


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(randomize(GroupFormerForCausalLM(tiny_config())), tmp_path / "source")


@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["norms", "calibrated"])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_to_folder_equals_in_memory(tmp_path, kind, calibration):
    model = randomize(GroupFormerForCausalLM(tiny_config(**KINDS[kind])))
    source = save(model, tmp_path / "source")
    grouping = "adjacent" if kind == "alibi" else "similar"
    regroup_folder(source, tmp_path / "new", 2, grouping=grouping, calibration=calibration, max_shard_bytes=20_000)
    assert (tmp_path / "new" / "model.safetensors.index.json").exists()
    expected = groupformer.regroup(model, 2, grouping=grouping, calibration=calibration)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    ids = random_ids(2, 20)
    torch.testing.assert_close(streamed(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"method": "random", "seed": 3}, {"method": "mean"}], ids=["random", "mean"])
def test_every_method_gives_the_same_bits_as_in_memory(tmp_path, folder, options):
    regroup_folder(folder, tmp_path / "new", {1: 2}, **options)
    expected = groupformer.regroup(GroupFormerForCausalLM.from_pretrained(folder), {1: 2}, **options).state_dict()
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def test_bare_models_and_bfloat16_stream_too(tmp_path):
    model = randomize(GroupFormerModel(tiny_config())).to(torch.bfloat16)
    regroup_folder(save(model, tmp_path / "source"), tmp_path / "new", 1, calibration=CALIBRATION)
    loaded = GroupFormerModel.from_pretrained(tmp_path / "new")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.num_key_value_heads == 1


def test_auto_streams(tmp_path, folder):
    config = regroup_folder(folder, tmp_path / "new", "auto", budget=0.5, calibration=CALIBRATION)
    assert sum(layer.num_key_value_heads for layer in config.per_layer_config) <= 4
    GroupFormerForCausalLM.from_pretrained(tmp_path / "new")


def test_the_command_brings_tokenizer_and_generation_config_along(tmp_path):
    tokenizer = GroupFormerTokenizer()
    model = randomize(GroupFormerForCausalLM(tiny_config(vocab_size=len(tokenizer))))
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    source = save(model, tmp_path / "source")
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("A river runs to the sea. " * 40, encoding="utf-8")
    target = tmp_path / "new"
    arguments = ["regroup", str(source), str(target), "--kv-heads", "2", "--calibration", str(tmp_path / "text.txt")]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "GroupFormerForCausalLM, 4 query heads on 2 KV heads" in outcome.stdout
    assert GenerationConfig.from_pretrained(target).max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(target).get_vocab() == tokenizer.get_vocab()
    assert (target / "modeling_groupformer.py").exists()
    assert (target / "tokenization_groupformer.py").exists()  # which tokenizer_config.json names


def test_the_command_takes_counts_by_layer(tmp_path, folder):
    outcome = CliRunner().invoke(app, ["regroup", str(folder), str(tmp_path / "new"), "--kv-heads", "1:2"])
    assert outcome.exit_code == 0, outcome.output
    assert "4 query heads on 2 to 4 KV heads by layer" in outcome.stdout


@pytest.mark.parametrize(
    "text, message",
    [
        ("two", "--kv-heads ('two') must be a whole number, counts by layer such as 0:4,1:1, or auto"),
        ("0:4,1", "--kv-heads ('0:4,1') must be a whole number, counts by layer"),
        ("0:4,0:2", "--kv-heads ('0:4,0:2') names layer 0 twice"),
    ],
)
def test_other_words_for_counts_are_refused(text, message):
    with pytest.raises(ValueError) as refusal:
        wanted_heads(text)
    assert message in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "norms"])
def test_two_processes_share_out_the_merge(tmp_path, folder, calibrated):
    tokenizer = GroupFormerTokenizer()
    model = randomize(GroupFormerForCausalLM(tiny_config(vocab_size=len(tokenizer), num_hidden_layers=3)))
    source = save(model, tmp_path / "text-model")
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("A river runs to the sea. " * 300, encoding="utf-8")
    arguments = ["--kv-heads", "2", *(["--calibration", str(tmp_path / "text.txt")] if calibrated else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "groupformer"]
    two = [sys.executable, *launcher, "regroup", str(source), str(tmp_path / "two"), *arguments]
    done = subprocess.run(two, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert CliRunner().invoke(app, ["regroup", str(source), str(tmp_path / "one"), *arguments]).exit_code == 0
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == both.keys()
    for name in one:
        torch.testing.assert_close(both[name], one[name], rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "text-model", "text.txt", "two"]


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(ValueError, match="calibration has 3 rows for 4 processes; give more text, or start fewer"):
        Processes(rank=0, count=4).rows(CALIBRATION)


# Refusals: nothing is written, nothing that existed is touched ------------------------------------------------------

REFUSALS = {
    "count": (dict(num_key_value_heads=3), "must divide"),
    "method": (dict(num_key_value_heads=2, method="best"), "method ('best') is unknown"),
    "short": (dict(num_key_value_heads=2, calibration=random_ids(1, 9)), "calibration has 9 tokens"),
    "budget": (dict(num_key_value_heads="auto", budget=0.1), "budget (0.1)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_write_nothing(tmp_path, folder, case):
    arguments, message = REFUSALS[case]
    with pytest.raises(ValueError) as refusal:
        regroup_folder(folder, tmp_path / "new", **arguments)
    assert message in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["norms", "calibrated"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_checkpoint_with_nan_is_refused_and_nothing_written(tmp_path, folder, name, calibration):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite"):
        regroup_folder(folder, tmp_path / "old", 2, calibration=calibration, overwrite=True)
    assert (tmp_path / "old" / "precious.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]


def test_existing_targets_need_overwrite(tmp_path, folder):
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="--overwrite"):
        regroup_folder(folder, tmp_path / "new", 2)
    regroup_folder(folder, tmp_path / "new", 2, overwrite=True)
    assert (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("leads", ["to a folder", "nowhere"])
def test_a_target_that_is_a_link_is_refused(tmp_path, folder, leads):
    if leads == "to a folder":
        (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(ValueError, match="is a link; name the folder itself"):
        regroup_folder(folder, tmp_path / "link", 2, overwrite=True)
    assert (tmp_path / "link").is_symlink()


def test_folders_made_for_a_target_go_with_it(tmp_path, folder):
    def broken(*progress):
        raise OSError("the disk is full")

    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="the disk is full"):
        regroup_folder(folder, tmp_path / "mine" / "a" / "b" / "new", 2, progress=broken)
    assert list((tmp_path / "mine").iterdir()) == []


def test_missing_tensors_are_refused_by_name(tmp_path, folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks model.layers.0.self_attn.v_proj.weight"):
        regroup_folder(folder, tmp_path / "new", 2)


def test_folders_of_unknown_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForPoems"]}))
    with pytest.raises(ValueError, match="'LlamaForPoems'.* is no class of transformers"):
        regroup_folder(tmp_path, tmp_path.parent / "new", 2)


# Memory --------------------------------------------------------------------------------------------------------------

# Linux's own count for this program alone: the peak that `resource` knows begins at what its parent process held.
CHILD = """
import re, sys, torch
torch.set_num_threads(1)
from groupformer.regrouping.streaming import regroup_folder
ids = torch.randint(0, 32000, (4, 512)) if sys.argv[3] == "calibrated" else None
regroup_folder(sys.argv[1], sys.argv[2], 4, calibration=ids, grouping=sys.argv[4], max_shard_bytes=500_000_000)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def file_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Qwen 3's files hold them: each expert by itself, though the class stacks them."""
    with torch.device("meta"):
        state_dict = Qwen3MoeForCausalLM(config).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in state_dict.items():
        stem, _, kind = name.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj"):
            shapes[name] = tuple(tensor.shape)
            continue
        experts, rows, columns = tensor.shape
        parts = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        for expert in range(experts):
            shapes |= {f"{stem}.{expert}.{part}.weight": (rows // len(parts), columns) for part in parts}
    return shapes


def write_experts(folder, **sizes):
    """A synthetic Qwen 3 with experts in bfloat16, written shard by shard."""
    config = Qwen3MoeConfig(dtype=torch.bfloat16, architectures=["Qwen3MoeForCausalLM"], **sizes)
    config.save_pretrained(folder)
    noise = torch.randn(40_000_000 if sizes["vocab_size"] > 1000 else 40_000).mul_(0.02).to(torch.bfloat16)

    def values(name, shape):
        start = len(name) + sum(map(ord, name))
        return noise[start : start + math.prod(shape)].view(shape) + float("norm" in name)

    pieces = (
        Piece({name: Entry(torch.bfloat16, shape)}, lambda name=name, shape=shape: [values(name, shape)])
        for name, shape in file_shapes(config).items()
    )
    write_shards(pieces, folder, max_shard_bytes=500_000_000)
    return folder


def hashes(folder) -> dict[str, str]:
    """Of the bytes of each tensor that is not attention's."""
    found, checkpoint = {}, open_checkpoint(folder)
    for name in checkpoint.entries:
        if "self_attn" not in name:
            found[name] = hashlib.sha256(bytes_of(checkpoint.read(name))).hexdigest()
    return found


def test_bytes_outside_attention_stay_the_same(tmp_path):
    sizes = dict(hidden_size=48, intermediate_size=40, moe_intermediate_size=20, num_experts=3, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=12, vocab_size=83)
    source = write_experts(tmp_path / "old", **sizes, **heads)
    regroup_folder(source, tmp_path / "new", 2)
    expected = hashes(source)
    assert len(expected) == 2 * (3 * 3 + 3) + 3
    assert hashes(tmp_path / "new") == expected


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A checkpoint of 3 GB with experts."""
    folder = write_experts(
        tmp_path_factory.mktemp("large"),
        vocab_size=32000,
        hidden_size=1024,
        moe_intermediate_size=768,
        num_experts=32,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
    )
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 3e9
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("inputs, grouping", [("norms", "similar"), ("calibrated", "adjacent")])
def test_three_gigabytes_regroup_within_one_and_a_half(tmp_path, large_folder, inputs, grouping):
    arguments = [sys.executable, "-c", CHILD, str(large_folder), str(tmp_path / "new"), inputs, grouping]
    child = subprocess.run(arguments, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 1.5e9
    assert hashes(tmp_path / "new") == hashes(large_folder)
