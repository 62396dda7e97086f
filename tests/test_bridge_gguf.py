"""GGUF: what is written can be read back, what llama.cpp would compute otherwise is refused, and, where llama.cpp is
installed, it generates the same tokens."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from typer.testing import CliRunner

import groupformer
from groupformer.commands.main import app
from groupformer.conversion import import_folder
from groupformer.conversion.configs import read_config
from groupformer.conversion.gguf.shapes import ARCHITECTURES
from groupformer.conversion.gguf.writer import export_gguf, plan_gguf
from groupformer.families.registry import FAMILIES

from .helpers import random_ids, randomize, tiny_config
from .helpers_families import cases, native_config, native_model


# The interpreter whose environment has llama-cpp-python; it is not needed for anything else, and long to build.
LLAMA_CPP_PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)

RUN_LLAMA_CPP = """
import json, sys
import llama_cpp, numpy
path, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.Llama(path, n_ctx=64, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)
if isinstance(ids, str):
    ids = model.tokenize(ids.encode(), add_bos=False, special=True)
prompt = list(ids)
model.eval(ids)
tokens = []
for _ in range(count):
    tokens.append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
    model.eval(tokens[-1:])
print(json.dumps([prompt, tokens]))
"""


def supported() -> list[tuple[str, str]]:
    """Examples of the families that llama.cpp computes."""
    able = []
    for name, option in cases():
        config = read_config(native_config(FAMILIES[name], option), FAMILIES[name])
        try:
            plan_gguf(config, "GroupFormerForCausalLM", name)
        except ValueError:
            continue
        able.append((name, option))
    return able


def imported(tmp_path, name: str, option: str, **changes):
    """A native model, and the folder of its import."""
    model = native_model(name, option, **changes)
    model.save_pretrained(tmp_path / "native")
    import_folder(tmp_path / "native", tmp_path / "ours", overwrite=True)
    return model, tmp_path / "ours"


def value_of(reader: gguf.GGUFReader, key: str):
    return reader.get_field(key).contents()


def llama_cpp(path, prompt, count: int = 8):
    """Prompt ids and greedily chosen tokens."""
    command = [LLAMA_CPP_PYTHON, "-c", RUN_LLAMA_CPP, str(path), json.dumps(prompt), str(count)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_architecture_has_an_example():
    assert {name for name, _ in supported()} == set(ARCHITECTURES) - {"gpt_neox", "smollm3"}  # these need other tinies


def test_tensors_and_sizes_are_written(tmp_path):
    model, folder = imported(tmp_path, "qwen2", "no window")
    assert export_gguf(folder, tmp_path / "model.gguf", tokenizer=False) == "qwen2"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert value_of(reader, "general.architecture") == "qwen2"
    assert value_of(reader, "qwen2.attention.head_count_kv") == 2
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = model.state_dict()
    assert len(tensors) == len(expected)
    for ours, native in {
        "blk.1.attn_k.bias": "layers.1.self_attn.k_proj.bias",
        "output_norm.weight": "norm.weight",
    }.items():
        assert np.array_equal(tensors[ours], expected["model." + native].numpy())


BY_LAYER = {0: {"num_key_value_heads": 1}, 2: {"num_key_value_heads": 2, "intermediate_size": 96}}


def saved_by_layer(folder, **options):
    """A Llama whose layers have counts and widths of their own."""
    config = tiny_config(num_hidden_layers=3, norm_eps=1e-5, per_layer_config=BY_LAYER, **options)
    model = randomize(groupformer.GroupFormerForCausalLM(config))
    model.save_pretrained(folder)
    return model


def test_counts_by_layer_are_the_architecture_deci(tmp_path):
    saved_by_layer(tmp_path / "ours")
    assert export_gguf(tmp_path / "ours", tmp_path / "model.gguf", family="llama", tokenizer=False) == "deci"
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert value_of(reader, "deci.attention.head_count_kv") == [1, 4, 2]
    assert value_of(reader, "deci.attention.head_count") == [4, 4, 4]
    assert value_of(reader, "deci.feed_forward_length") == [48, 48, 96]
    shapes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
    assert [shapes[f"blk.{layer}.attn_k.weight"] for layer in range(3)] == [(8, 32), (32, 32), (16, 32)]


@pytest.mark.parametrize(
    ("options", "field"), [({"mlp_bias": True}, "mlp_bias"), ({"qk_norm": "head"}, "qk_norm"), ({}, None)]
)
def test_counts_by_layer_are_refused_where_deci_has_no_field(tmp_path, options, field):
    saved_by_layer(tmp_path / "ours", **options)
    family, field = ("llama", field) if field else ("mistral", "num_key_value_heads")
    with pytest.raises(ValueError, match=field):
        export_gguf(tmp_path / "ours", tmp_path / "model.gguf", family=family, tokenizer=False)
    assert not (tmp_path / "model.gguf").exists()


def test_llama_queries_are_laid_out_for_neighbouring_rope(tmp_path):
    model, folder = imported(tmp_path, "llama", "grouped queries")
    export_gguf(folder, tmp_path / "model.gguf", tokenizer=False)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    half = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].view(6, 2, 2, 24)  # (heads, half, pair, width)
    assert np.array_equal(tensors["blk.0.attn_q.weight"], half.transpose(1, 2).reshape(24, 24).numpy())


def test_bfloat16_stays_and_norms_become_float32(tmp_path):
    model = native_model("llama", "grouped queries").to(torch.bfloat16)
    groupformer.import_model(model).save_pretrained(tmp_path / "ours")
    export_gguf(tmp_path / "ours", tmp_path / "model.gguf", tokenizer=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [24, 40]
    bits = model.state_dict()["model.layers.0.mlp.up_proj.weight"].view(torch.uint8).numpy()
    assert np.array_equal(tensors["blk.0.ffn_up.weight"].data.reshape(bits.shape), bits)
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    expected = model.state_dict()["model.layers.0.input_layernorm.weight"].float().numpy()
    assert np.array_equal(norm.data, expected)


@pytest.mark.parametrize(
    ("name", "option", "field"),
    [
        ("llama", "another activation", "hidden_act"),
        ("llama", "dynamic rope", "rope_parameters"),
        ("mistral", "window shorter than the prompt", "sliding_window"),
        ("gpt2", "scores by layer", "attention_multiplier"),
        ("gpt_neox", "parallel, a quarter rotated", "hidden_act"),
        ("smollm3", "RoPE in every second layer", "no_rope_layers"),
        ("olmo2", "odd heads, wide, one layer", "head_dim"),
        ("qwen3", "biases, tied", "attention_bias"),
        ("falcon", "one key head", "family"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path, name, option, field):
    _, folder = imported(tmp_path, name, option)
    with pytest.raises(ValueError, match=rf"^{field} \("):
        export_gguf(folder, tmp_path / "model.gguf", tokenizer=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]


def test_existing_file_is_only_replaced_with_overwrite(tmp_path):
    _, folder = imported(tmp_path, "llama", "grouped queries")
    target = tmp_path / "model.gguf"
    target.write_text("mine")
    with pytest.raises(ValueError, match="--overwrite"):
        export_gguf(folder, target, tokenizer=False)
    assert target.read_text() == "mine"
    export_gguf(folder, target, tokenizer=False, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def test_failure_on_the_way_leaves_nothing(tmp_path):
    _, folder = imported(tmp_path, "llama", "grouped queries")

    def fail(*call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(folder, tmp_path / "model.gguf", tokenizer=False, progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "ours"]


def test_classifier_is_refused(tmp_path):
    groupformer.GroupFormerForSequenceClassification(tiny_config(family="llama")).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="architectures"):
        export_gguf(tmp_path / "ours", tmp_path / "model.gguf", tokenizer=False)


# Tokenizers ----------------------------------------------------------------------------------------------------------

TEXT = ["the river ran past 1234 mills, and the miller's daughter ran past the river"] * 4


def save_tokenizer(folder, *steps) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return fast


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(("steps", "name"), [((WORDS,), "gpt-2"), ((DIGITS, WORDS), "smollm")])
def test_byte_level_tokenizer_is_written(tmp_path, steps, name):
    _, folder = imported(tmp_path, "llama", "grouped queries", vocab_size=310)
    tokenizer = save_tokenizer(folder, *steps)
    export_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert value_of(reader, "tokenizer.ggml.pre") == name
    tokens = value_of(reader, "tokenizer.ggml.tokens")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == 310
    types = value_of(reader, "tokenizer.ggml.token_type")
    assert (types[0], types[5], types[-1]) == (3, 1, 5)
    assert len(value_of(reader, "tokenizer.ggml.merges")) == len(tokenizer) - 257


def test_qwen2_tokenizer_as_transformers_makes_it_is_written(tmp_path):
    _, folder = imported(tmp_path, "qwen2", next(iter(FAMILIES["qwen2"].examples)))
    Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]).save_pretrained(folder)  # normalizes to NFC
    export_gguf(folder, tmp_path / "model.gguf")
    assert value_of(gguf.GGUFReader(tmp_path / "model.gguf"), "tokenizer.ggml.pre") == "qwen2"


def test_every_token_that_ends_a_generation_is_written(tmp_path):
    _, folder = imported(tmp_path, "llama", "grouped queries", vocab_size=310)
    save_tokenizer(folder, WORDS)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 5, 3]}))
    export_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert [value_of(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")] == [7, 5, 3]
    path.write_text(json.dumps({"eos_token_id": [7, 5, 3, 2]}))
    with pytest.raises(ValueError, match=r"eos_token_id \(\[7, 5, 3, 2\]\) names 4 tokens"):
        export_gguf(folder, tmp_path / "other.gguf")


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC()])
def test_a_normalizer_that_llama_cpp_has_not_is_refused_by_name(normalizer, tmp_path):
    _, folder = imported(tmp_path, "llama", "grouped queries", vocab_size=310)
    fast = save_tokenizer(folder, WORDS)
    fast.backend_tokenizer.normalizer = normalizer
    fast.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"its normalizer is .*{type(normalizer).__name__}"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_tokenizer_that_splits_otherwise_is_refused(tmp_path):
    _, folder = imported(tmp_path, "llama", "grouped queries", vocab_size=310)
    save_tokenizer(folder, pre_tokenizers.Punctuation(), WORDS)
    with pytest.raises(ValueError, match="Punctuation.*--no-tokenizer"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_command_writes_gguf(tmp_path):
    _, folder = imported(tmp_path, "llama", "grouped queries")
    arguments = ["export", str(folder), str(tmp_path / "model.gguf"), "--format", "gguf", "--no-tokenizer"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "GGUF of architecture llama" in result.output


# llama.cpp itself ----------------------------------------------------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif(
    subprocess.run([LLAMA_CPP_PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode != 0,
    reason="llama-cpp-python is not installed; set LLAMA_CPP_PYTHON to an interpreter that has it",
)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(("name", "option"), supported())
def test_llama_cpp_generates_the_same_tokens(tmp_path, name, option):
    model, folder = imported(tmp_path, name, option)
    export_gguf(folder, tmp_path / "model.gguf", tokenizer=False)
    ids = random_ids(1, 21, model.config.vocab_size)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert llama_cpp(tmp_path / "model.gguf", ids[0].tolist())[1] == expected[0, 21:].tolist()


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "option", "changes"),
    [
        ("gpt_neox", "parallel, a quarter rotated", {"hidden_act": "gelu_new"}),
        ("gpt_neox", "in sequence", {"hidden_act": "gelu_new"}),
        ("smollm3", "RoPE in every second layer", {"no_rope_layers": [1, 1, 1, 0, 1], "num_hidden_layers": 5}),
    ],
)
def test_llama_cpp_generates_the_same_tokens_with_its_own_options(tmp_path, name, option, changes):
    model, folder = imported(tmp_path, name, option, **changes)
    export_gguf(folder, tmp_path / "model.gguf", tokenizer=False)
    ids = random_ids(1, 21, model.config.vocab_size)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert llama_cpp(tmp_path / "model.gguf", ids[0].tolist())[1] == expected[0, 21:].tolist()


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "head_dim": 16}], ids=["tied", "wide heads"])
def test_llama_cpp_generates_the_same_tokens_with_counts_by_layer(tmp_path, options):
    model = saved_by_layer(tmp_path / "ours", **options)
    export_gguf(tmp_path / "ours", tmp_path / "model.gguf", family="llama", tokenizer=False)
    ids = random_ids(1, 21)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert llama_cpp(tmp_path / "model.gguf", ids[0].tolist())[1] == expected[0, 21:].tolist()


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("steps", [(WORDS,), (DIGITS, WORDS)], ids=["words", "digits"])
def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path, steps):
    _, folder = imported(tmp_path, "llama", "grouped queries", vocab_size=310)
    tokenizer = save_tokenizer(folder, *steps)
    export_gguf(folder, tmp_path / "model.gguf")
    text = "The river's 2024 mills,\n\n  ran past — ünïcode <|endoftext|>"
    assert llama_cpp(tmp_path / "model.gguf", text, 1)[0] == tokenizer(text)["input_ids"]
