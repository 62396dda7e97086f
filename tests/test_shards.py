"""The shard writer of import, export and regroup: the files that transformers and safetensors read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from groupformer.conversion.checkpoint import Entry, open_checkpoint
from groupformer.conversion.shards import Piece, unchanged, write_shards


TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a": torch.arange(4, dtype=torch.float32),
    "mask": torch.ones(3, 3, dtype=torch.bool).tril(),
    "scalar": torch.tensor(-1e9),
}


def as_pieces(tensors):
    for name, tensor in tensors.items():
        yield Piece({name: Entry(tensor.dtype, tuple(tensor.shape))}, lambda tensor=tensor: [tensor])


@pytest.mark.parametrize("max_bytes, files", [(1000, 1), (20, 3), (1, 4)])
def test_pieces_are_read_back_as_they_were(max_bytes, files, tmp_path):
    reported = []
    write_shards(as_pieces(TENSORS), tmp_path, max_shard_bytes=max_bytes, progress=lambda *each: reported.append(each))
    written = {}
    for path in tmp_path.glob("*.safetensors"):
        written |= load_file(path)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert written.keys() == TENSORS.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert sum(each[2] for each in reported) == reported[-1][3] == sum(tensor.nbytes for tensor in TENSORS.values())
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == TENSORS.keys()


def test_an_unchanged_tensor_keeps_its_bytes_and_may_get_a_new_name(tmp_path):
    (tmp_path / "old").mkdir(), (tmp_path / "new").mkdir()
    save_file(TENSORS, tmp_path / "old" / "model.safetensors")
    torch.save(TENSORS, tmp_path / "old" / "pytorch_model.bin")
    for _ in range(2):  # safetensors, then the legacy file
        source = open_checkpoint(tmp_path / "old")
        write_shards([unchanged(source, "b", "c"), unchanged(source, "mask")], tmp_path / "new")
        written = load_file(tmp_path / "new" / "model.safetensors")
        assert torch.equal(written["c"], TENSORS["b"]) and torch.equal(written["mask"], TENSORS["mask"])
        (tmp_path / "old" / "model.safetensors").unlink(missing_ok=True)


def test_a_tensor_of_another_shape_than_announced_is_an_error(tmp_path):
    piece = Piece({"a": Entry(torch.float32, (2,))}, lambda: [torch.ones(3)])
    with pytest.raises(RuntimeError, match="a was announced as"):
        write_shards([piece], tmp_path)
