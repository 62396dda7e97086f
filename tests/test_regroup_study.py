"""The study's cells: kept with the options that they depend on, and refused to a study of others."""

import argparse
import copy
import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import native_study
from benchmarks.study import Study, with_another_first
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer, regroup

from .helpers import random_ids, randomize, tiny_config


def study(folder, **options) -> Study:
    """A study without a checkpoint, for its cells alone."""
    made = Study.__new__(Study)
    made.options, made.folder, made.fingerprint = argparse.Namespace(**options), folder, "0123"
    made.test_texts, made.cells = ["text"], {}
    return made


def cell(folder, part="uptrain", calibrated=True, **options):
    given = {"calibration_tokens": 64, "calibration_every": 2, "batch_size": 8, "tokenizer": "here/small", **options}
    return study(folder, **given).cell(lambda: {"bits_per_byte": 1.0}, part=part, calibrated=calibrated)


def test_a_cell_keeps_the_options_that_matter(tmp_path):
    assert cell(tmp_path)["options"] == {
        "calibration_tokens": 64,
        "calibration_every": 2,
        "batch_size": 8,
        "tokenizer": "small",
    }
    assert cell(tmp_path, part="merge", calibrated=False)["options"] == {}


def test_a_cell_of_other_options_is_refused(tmp_path):
    cell(tmp_path)
    with pytest.raises(ValueError, match=r"batch_size \(16\) was 8 when .*.json was measured"):
        cell(tmp_path, batch_size=16)
    cell(tmp_path, tokenizer=None)  # the checkpoint's own


def test_older_cells_are_taken(tmp_path):
    cell(tmp_path)
    path = next(tmp_path.glob("*.json"))
    kept = json.loads(path.read_text())
    del kept["options"]
    path.write_text(json.dumps(kept))
    assert cell(tmp_path, batch_size=16)["bits_per_byte"] == 1.0


@pytest.mark.parametrize("kv_heads, head", [(1, 2), (2, 1)])
def test_another_head_comes_first_and_the_function_stays(kv_heads, head):
    model = randomize(GroupFormerForCausalLM(tiny_config(num_attention_heads=4, num_key_value_heads=4))).eval()
    turned = with_another_first(copy.deepcopy(model), kv_heads, head)
    torch.testing.assert_close(turned(random_ids(1, 6)).logits, model(random_ids(1, 6)).logits)
    chosen = regroup(turned, kv_heads, method="first").model.layers[0].self_attn.k_proj.weight
    keys = model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(chosen.unflatten(0, (kv_heads, -1))[0], keys.unflatten(0, (4, -1))[head])


@pytest.mark.slow
def test_the_study_of_a_native_checkpoint_makes_each_state_once(tmp_path, monkeypatch, capsys):
    pandas = pytest.importorskip("pandas")
    tokenizer = GroupFormerTokenizer()
    fields = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    fields |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    randomize(LlamaForCausalLM(LlamaConfig(**fields))).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    for split in ("train", "test"):
        texts = [f"The {split} river number {number} runs from the hills to the sea. " * 120 for number in range(4)]
        pandas.DataFrame({"text": texts}).to_parquet(tmp_path / f"{split}-0.parquet")
    counts = {"calibration": 2048, "closed-form": 2048, "heal": 4096, "uptrain": 1024}
    arguments = [str(tmp_path / "tiny"), "--data", str(tmp_path), "--kv-heads", "1", "--documents", "2"]
    arguments += ["--output", str(tmp_path / "runs"), *(f"--{name}-tokens={count}" for name, count in counts.items())]
    arguments += ["--needle", "64", "128"]
    monkeypatch.setattr(sys, "argv", ["native_study", *arguments])
    native_study.main()
    first = json.loads((tmp_path / "runs" / "tiny-1" / "study.json").read_text())
    states = {state["name"]: state for state in first["states"]}
    assert list(states) == ["original", "mean", "aligned", "svd", "closed form", "healed", "uptrained on 1,024"]
    assert states["original"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert states["original"]["cache_bytes_per_token"] == 2 * states["uptrained on 1,024"]["cache_bytes_per_token"]
    assert states["healed"]["divergence"] < states["closed form"]["divergence"] < states["svd"]["divergence"]
    assert all(0 <= share <= 100 for share in states["healed"]["needle"].values())
    assert list(states["healed"]["needle"]) == ["64", "128"] and "needle" not in states["mean"]
    monkeypatch.setattr(native_study, "heal_folder", None)  # a second run makes nothing
    native_study.main()
    assert json.loads((tmp_path / "runs" / "tiny-1" / "study.json").read_text()) == first
