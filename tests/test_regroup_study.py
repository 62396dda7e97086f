"""The study's cells: kept with the options that they depend on, and refused to a study of others."""

import argparse
import json

import pytest

from benchmarks.study import Study


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
