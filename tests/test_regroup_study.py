"""The study's cells: kept with the options that they depend on, and refused to a study of others."""

import argparse
import copy
import json

import pytest
import torch

from benchmarks.study import Study, with_another_first
from groupformer import GroupFormerForCausalLM, regroup

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
