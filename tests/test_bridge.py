"""From folder to folder: streaming, legacy files, companions, and what happens when something is wrong."""

import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import groupformer
from groupformer.commands.main import app
from groupformer.conversion import export_folder, folders, import_folder
from groupformer.conversion.configs import plain
from groupformer.families.registry import FAMILIES

from .helpers import random_ids, tiny_config
from .helpers_families import native_model, relative_error


FIRST_OPTION = [(name, next(iter(family.examples))) for name, family in FAMILIES.items()]


@pytest.fixture
def native(tmp_path):
    """A Llama saved in several shards; returns its folder."""
    folder = tmp_path / "native"
    native_model("llama", "all biases").save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# There and back ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("name", "option"), FIRST_OPTION)
def test_folder_goes_there_and_back_bit_for_bit(name, option, tmp_path):
    model = native_model(name, option)
    model.save_pretrained(tmp_path / "native", max_shard_size="8KB")
    import_folder(tmp_path / "native", tmp_path / "ours", max_shard_bytes=9000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = random_ids(2, 9, model.config.vocab_size)
    assert relative_error(ours(ids).logits, model(ids).logits) < 2e-5
    assert same_tensors(ours.state_dict(), groupformer.import_model(tmp_path / "native").state_dict())

    export_folder(tmp_path / "ours", tmp_path / "back", max_shard_bytes=7000)
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "native"))
    again, native = (type(model.config).from_pretrained(tmp_path / folder) for folder in ("back", "native"))
    assert {**plain(again), "_name_or_path": ""} == {**plain(native), "_name_or_path": ""}


def test_one_file_stays_one_file(tmp_path):
    native_model("gpt2", "odd heads").save_pretrained(tmp_path / "native")
    import_folder(tmp_path / "native", tmp_path / "ours")
    assert [file.name for file in (tmp_path / "ours").glob("model*.s*")] == ["model.safetensors"]


def test_imported_folder_has_the_files_of_save_pretrained(native, tmp_path):
    import_folder(native, tmp_path / "ours", max_shard_bytes=9000)
    groupformer.import_model(native).save_pretrained(tmp_path / "saved", max_shard_size=9000)
    ours, saved = listing(tmp_path / "ours"), listing(tmp_path / "saved")
    assert [name for name in ours if ".safetensors" not in name] == [
        name for name in saved if ".safetensors" not in name
    ]
    config, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "saved"))
    assert config == expected


def test_dtypes_are_kept_even_when_mixed(tmp_path):
    model = native_model("gpt2", "odd heads").to(torch.bfloat16)
    model.transformer.ln_f.float()
    model.save_pretrained(tmp_path / "native")
    import_folder(tmp_path / "native", tmp_path / "ours")
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "ours").items()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"model.norm.weight", "model.norm.bias"}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "native"))


def test_parts_of_one_tensor_must_have_one_dtype(tmp_path):
    native_model("gpt2", "odd heads").save_pretrained(tmp_path / "native")
    import_folder(tmp_path / "native", tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].half()
    save_file(tensors, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ValueError, match="q_proj.weight.*different dtypes"):
        export_folder(tmp_path / "ours", tmp_path / "back")


@torch.no_grad()
def test_classifier_folder_comes_with_its_head(tmp_path):
    model = native_model("mistral", "no window", "ForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path / "native")
    import_folder(tmp_path / "native", tmp_path / "ours")
    ours = groupformer.GroupFormerForSequenceClassification.from_pretrained(tmp_path / "ours")
    ids = random_ids(2, 9, model.config.vocab_size)
    assert relative_error(ours(ids).logits, model(ids).logits) < 2e-5
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "native"))


# Older files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_bin_files_are_read(native, tmp_path, sharded, zipped):
    expected = groupformer.import_model(native).state_dict()
    tensors = tensors_of(native)
    for file in native.glob("*.safetensors*"):
        file.unlink()
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)] if sharded else [tensors]
    names = ["a.bin", "b.bin"] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts):
        torch.save(part, native / name, _use_new_zipfile_serialization=zipped)
    if sharded:
        index = {"weight_map": {key: name for name, part in zip(names, parts) for key in part}}
        (native / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    import_folder(native, tmp_path / "ours")
    assert same_tensors(tensors_of(tmp_path / "ours"), {k: v for k, v in expected.items() if k in expected})


def test_bin_file_that_runs_code_is_refused(native, tmp_path):
    for file in native.glob("*.safetensors*"):
        file.unlink()

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (native / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Attack()}, protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        import_folder(native, tmp_path / "ours")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "ours").exists()


def test_names_of_older_files_are_understood(tmp_path):
    """The Hub's GPT-2 has no base prefix; Pythia calls its head embed_out."""
    for name, changes in {
        "gpt2": lambda key: key.removeprefix("transformer."),
        "bloom": lambda key: key.removeprefix("transformer."),
        "gpt_neox": lambda key: key.replace("lm_head.", "embed_out."),
    }.items():
        folder = tmp_path / name
        native_model(name, next(iter(FAMILIES[name].examples))).save_pretrained(folder)
        expected = groupformer.import_model(folder).state_dict()
        tensors = {changes(key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors")
        assert same_tensors(groupformer.import_model(folder).state_dict(), expected)


# What older files hold beside weights, as the families' layers are called.
BUFFERS = {
    "bias": torch.ones(1, 1, 8, 8).tril(),
    "masked_bias": torch.tensor(-1e9),
    "rotary_emb.inv_freq": torch.ones(4),
    "rotary_emb.cos_cached": torch.ones(1, 1, 8, 4),
}
MASK_DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float32)
ATTENTION = {"gpt2": "h.0.attn", "gpt_bigcode": "h.0.attn", "gpt_neox": "layers.0.attention", "mpt": "blocks.0.attn"}
ATTENTION |= {"bloom": "h.0.self_attention", "falcon": "h.0.self_attention", "opt": "model.decoder.layers.0.self_attn"}


def save_as(tensors: dict[str, torch.Tensor], folder: Path, kind: str) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(("name", "option"), FIRST_OPTION)
def test_buffers_of_older_files_are_passed_over_and_weights_of_integers_are_not(name, option, kind, tmp_path):
    model = native_model(name, option)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = ATTENTION.get(name, "layers.0.self_attn")
    buffers = {f"{layer}.{stem}": tensor for stem, tensor in BUFFERS.items()}
    buffers[f"{layer}.bias"] = buffers[f"{layer}.bias"].to(MASK_DTYPES[list(FAMILIES).index(name) % 4])
    save_as({**tensors, **buffers, "position_ids": torch.arange(8)}, tmp_path, kind)
    assert same_tensors(groupformer.import_model(tmp_path).state_dict(), groupformer.import_model(model).state_dict())
    weight = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    save_as({**tensors, weight: tensors[weight].to(torch.int8)}, tmp_path, kind)
    with pytest.raises(ValueError, match=rf"{weight} has dtype int8, but weights are floats"):
        groupformer.import_model(tmp_path)
    save_as({**tensors, f"{layer}.bias": torch.ones(7)}, tmp_path, kind)
    with pytest.raises(ValueError, match=rf"unknown {layer}\.bias"):  # a vector: perhaps a weight
        groupformer.import_model(tmp_path)


def test_tied_head_that_is_stored_twice_must_be_a_copy(tmp_path):
    native_model("gpt2", "odd heads").save_pretrained(tmp_path)
    expected = groupformer.import_model(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_tensors(groupformer.import_model(tmp_path).state_dict(), expected)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        groupformer.import_model(tmp_path)


# Companions ----------------------------------------------------------------------------------------------------------


def byte_level_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@pytest.mark.parametrize("named", [True, False])
def test_tokenizer_loads_from_the_imported_folder_as_from_the_native_one(tmp_path, named):
    folder = tmp_path / "native"
    native_model("gpt2", "odd heads", vocab_size=300).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    GPT2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    if not named:  # as the Hub's GPT-2: only the model type says which tokenizer it is
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 40}')
    import_folder(folder, tmp_path / "ours")
    expected = AutoTokenizer.from_pretrained(folder)
    got = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert type(got) is type(expected)
    text = "Löss, 3 rivers\n\tand <|endoftext|>"
    assert got(text)["input_ids"] == expected(text)["input_ids"]
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    positions = AutoConfig.from_pretrained(folder).max_position_embeddings
    assert got.model_max_length == min(expected.model_max_length, positions)


@pytest.mark.parametrize("own, limit", [(None, 64), (int(1e30), 64), (40, 40), (4096, 64)])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_an_imported_tokenizer_cuts_to_the_positions_where_these_have_an_end(name, own, limit, tmp_path):
    folder = tmp_path / "native"
    native_model(name, next(iter(FAMILIES[name].examples)), vocab_size=300).save_pretrained(folder)
    positions = {} if name == "bloom" else {"max_position_embeddings": 64}  # ALiBi has no end
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **positions}))
    PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer()).save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written.pop("model_max_length", None)
    written |= {} if own is None else {"model_max_length": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    import_folder(folder, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    expected = limit if name == "llama" else own
    assert tokenizer.model_max_length == (expected if expected is not None else int(1e30))
    assert len(tokenizer("a" * 100, truncation=True)["input_ids"]) == min(100, expected or 100)


def test_generation_config_and_licence_travel_along_as_they_are(native, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer()).save_pretrained(native)
    (native / "generation_config.json").write_text('{"temperature": 0.25,   "do_sample": true}')
    (native / "LICENSE.txt").write_text("free")
    import_folder(native, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    for name in ("generation_config.json", "LICENSE.txt", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (native / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config.temperature == 0.25


def test_our_tokenizer_is_exported_as_one_that_loads_without_us(tmp_path):
    tokenizer = groupformer.GroupFormerTokenizer()
    model = groupformer.GroupFormerForCausalLM(tiny_config(vocab_size=len(tokenizer), hidden_size=8))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "llama", family="llama")
    assert "groupformer" not in (tmp_path / "llama" / "tokenizer_config.json").read_text().lower()
    text = "Löss, 3 rivers\n\tand <|end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")(text)["input_ids"] == tokenizer(text)["input_ids"]


# What must not happen ------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    return shard.name


def remove(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return shard.name


def fill_with_garbage(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(b"\xff" * 100)
    return shard.name


def promise_another_header(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    return shard.name


def rewrite_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def leave_the_folder(folder: Path) -> str:
    shard = next(folder.glob("*.safetensors"))
    shutil.copy(shard, folder.parent / "elsewhere.safetensors")
    rewrite_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": "../elsewhere.safetensors"}))
    return "leaves the folder"


def name_an_absolute_path(folder: Path) -> str:
    rewrite_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": "/etc/passwd"}))
    return "leaves the folder"


def promise_a_tensor(folder: Path) -> str:
    shard = next(folder.glob("*.safetensors")).name
    rewrite_index(folder, lambda index: index["weight_map"].update({"model.more.weight": shard}))
    return "model.more.weight"


def forget_a_tensor(folder: Path) -> str:
    rewrite_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
    return "lacks model.norm.weight"


def break_the_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3')
    return "index.json"


def break_the_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json"


def remove_all_weights(folder: Path) -> str:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return "holds no model.safetensors"


def claim_another_size(folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 41}))
    return "has shape"


DAMAGES = [
    truncate, remove, fill_with_garbage, promise_another_header, leave_the_folder, name_an_absolute_path,
    promise_a_tensor, forget_a_tensor, break_the_index, break_the_config, remove_all_weights, claim_another_size,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_nothing_is_left_behind(native, tmp_path, damage):
    reason = damage(native)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=reason):
        import_folder(native, tmp_path / "ours")
    with pytest.raises(ValueError, match=reason):
        groupformer.import_model(native)
    assert listing(tmp_path) == before


def test_existing_folder_is_only_touched_with_overwrite(native, tmp_path):
    target = tmp_path / "ours"
    target.mkdir()
    (target / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="--overwrite"):
        import_folder(native, target)
    assert listing(target) == ["diary.txt"]
    import_folder(native, target, overwrite=True)
    assert "diary.txt" not in listing(target)
    AutoModelForCausalLM.from_pretrained(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=["interrupt", "disk full"])
def test_failure_on_the_way_leaves_the_old_folder_and_nothing_else(native, tmp_path, monkeypatch, error):
    target = tmp_path / "ours"
    target.mkdir()
    (target / "diary.txt").write_text("dear")
    seen = []

    def fail_late(shard, shards, written, total):
        seen.append(written)
        if sum(seen) > total / 2:
            raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        import_folder(native, target, overwrite=True, progress=fail_late)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]
    assert listing(target) == ["diary.txt"]


def test_source_is_never_overwritten(native):
    for target in (native, native.parent, native / ".." / "native"):
        with pytest.raises(ValueError, match="source"):
            import_folder(native, target, overwrite=True)
    assert (native / "config.json").exists()


def test_wrong_directions_are_refused(native, tmp_path):
    import_folder(native, tmp_path / "ours")
    with pytest.raises(ValueError, match="GroupFormer already"):
        import_folder(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match="'llama', not a GroupFormer"):
        export_folder(native, tmp_path / "again")
    with pytest.raises(ValueError, match="is not there"):
        import_folder(tmp_path / "nowhere" / "at" / "all", tmp_path / "again")


def test_repository_that_cannot_be_reached_is_named():
    with pytest.raises(ValueError, match="nobody/nothing"):
        folders.local_folder("nobody/nothing")


def test_progress_counts_every_byte(native, tmp_path):
    calls = []
    import_folder(native, tmp_path / "ours", max_shard_bytes=9000, progress=lambda *call: calls.append(call))
    shards, total = calls[0][1], calls[0][3]
    assert sum(call[2] for call in calls) == total == sum(t.nbytes for t in tensors_of(tmp_path / "ours").values())
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][0] == shards > 1


# The command line ----------------------------------------------------------------------------------------------------


def test_commands_go_there_and_back(native, tmp_path):
    runner = CliRunner()
    result = runner.invoke(app, ["import", str(native), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    assert "GroupFormerForCausalLM" in result.output
    result = runner.invoke(app, ["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--family", "llama"])
    assert result.exit_code == 0, result.output
    assert same_tensors(tensors_of(tmp_path / "back"), tensors_of(native))


def test_command_says_in_one_line_what_is_wrong(native, tmp_path):
    import subprocess

    arguments = [sys.executable, "-m", "groupformer", "import", str(native), str(native)]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the target")
    assert "Traceback" not in result.stderr


def test_model_of_our_own_is_exported_from_a_folder(tmp_path):
    model = groupformer.GroupFormerForCausalLM(tiny_config(num_key_value_heads=2))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="family"):
        export_folder(tmp_path / "ours", tmp_path / "llama")
    export_folder(tmp_path / "ours", tmp_path / "llama", family="llama")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(exported).__name__ == "LlamaForCausalLM"
    ids = random_ids(1, 9)
    assert relative_error(exported(ids).logits, model(ids).logits) < 2e-5


def test_the_code_of_our_tokenizer_travels_along(native, tmp_path):
    groupformer.GroupFormerTokenizer().save_pretrained(native)
    import_folder(native, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenization_groupformer.py").exists()
