"""KV heads by layer for other engines: what is written as DeciLMForCausalLM, read as vLLM reads it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.conversion.decilm.writer import export_decilm

from .helpers import random_ids, randomize, tiny_config


SIZES = {"num_hidden_layers": 3, "intermediate_size": 256, "norm_eps": 1e-5}
BY_LAYER = {0: {"num_key_value_heads": 1}, 2: {"num_key_value_heads": 2, "intermediate_size": 512}}
SHAPES = {
    "counts and widths by layer": {"per_layer_config": BY_LAYER},
    "one count": {"num_key_value_heads": 2},
    "untied, biases": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "per_layer_config": BY_LAYER,
    },
    "llama3 rope, wide heads": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "per_layer_config": BY_LAYER,
    },
}


def saved(folder, **options) -> GroupFormerForCausalLM:
    model = randomize(GroupFormerForCausalLM(tiny_config(**{**SIZES, **options})))
    model.save_pretrained(folder)
    return model


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """The MLP's width as vLLM, SGLang and llama.cpp compute it: a share of the hidden size, rounded up to 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return -(-width // 256) * 256


def as_engines_read(folder) -> LlamaForCausalLM:
    """Llama's layers, each with the sizes that its block gives, and all tensors of the folder."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    shared = {name: getattr(config, name) for name in LlamaConfig().to_dict() if hasattr(config, name)}
    shared = {name: value for name, value in shared.items() if name not in ("architectures", "model_type", "auto_map")}
    shared["attn_implementation"] = "eager"
    model = LlamaForCausalLM(LlamaConfig(**{**shared, "num_hidden_layers": 0}))
    for layer_idx, block in enumerate(config.block_configs):
        assert not block.attention.no_op and not block.ffn.no_op
        sizes = {
            "num_key_value_heads": config.num_attention_heads // block.attention.n_heads_in_group,
            "intermediate_size": width_of(block.ffn.ffn_mult, config.hidden_size),
        }
        model.model.layers.append(LlamaDecoderLayer(LlamaConfig(**{**shared, **sizes}), layer_idx))
    model.config.num_hidden_layers = len(config.block_configs)
    tensors = load_file(folder / "model.safetensors")
    if config.tie_word_embeddings:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_engines_read_the_same_model(tmp_path, shape):
    model = saved(tmp_path / "ours", **SHAPES[shape])
    export_decilm(tmp_path / "ours", tmp_path / "new")
    ids = random_ids(2, 21)
    expected = model(ids).logits
    found = as_engines_read(tmp_path / "new")(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_the_config_survives_saving_and_names_no_other_counts(tmp_path):
    saved(tmp_path / "ours", per_layer_config=BY_LAYER)
    export_decilm(tmp_path / "ours", tmp_path / "new")
    content = json.loads((tmp_path / "new" / "config.json").read_text())
    assert content["architectures"] == ["DeciLMForCausalLM"] and content["model_type"] == "nemotron-nas"
    assert not {"num_key_value_heads", "intermediate_size", "native_config"} & set(content)
    config = AutoConfig.from_pretrained(tmp_path / "new", trust_remote_code=True)
    assert not hasattr(config.block_configs[0].ffn, "hidden_act")
    assert json.loads(config.to_json_string())["block_configs"] == content["block_configs"]


def test_the_command_writes_what_regroup_made(tmp_path):
    model = groupformer.regroup(saved(tmp_path / "original"), {0: 1, 2: 2})
    model.save_pretrained(tmp_path / "ours")
    arguments = ["export", str(tmp_path / "ours"), str(tmp_path / "new"), "--format", "decilm"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "DeciLMForCausalLM, 4 query heads on 1 to 4 KV heads by layer" in outcome.stdout
    assert (tmp_path / "new" / "configuration_decilm.py").exists()
    (entry,) = json.loads((tmp_path / "new" / "config.json").read_text())["regrouping"]
    assert (entry["from"], entry["to"]) == (4, [1, 4, 2])


def test_info_and_plan_read_the_counts_without_running_the_code_beside_them(tmp_path):
    model = saved(tmp_path / "ours", per_layer_config=BY_LAYER, dtype=torch.float32)
    export_decilm(tmp_path / "ours", tmp_path / "new")
    (tmp_path / "new" / "configuration_decilm.py").write_text("raise SystemExit('was run')")
    facts = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "new"), "--json"]).stdout)
    assert (facts["model_type"], facts["parameters"]) == ("nemotron-nas", model.num_parameters())
    assert [layer["kv_heads"] for layer in facts["layers"]] == [1, 4, 2]
    assert "DeciLMForCausalLM" in facts["held_by"] and "GGUF deci" in facts["held_by"]
    planned = CliRunner().invoke(app, ["plan", str(tmp_path / "new")])
    assert "KV heads: GroupFormerForCausalLM, DeciLMForCausalLM, GGUF deci" in planned.stdout
    assert f"regroup {tmp_path / 'new'} DST" in planned.stdout


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_an_import_gives_back_the_groupformer(tmp_path, shape):
    model = saved(tmp_path / "ours", **SHAPES[shape])
    export_decilm(tmp_path / "ours", tmp_path / "new")
    outcome = CliRunner().invoke(app, ["import", str(tmp_path / "new"), str(tmp_path / "back")])
    assert outcome.exit_code == 0, outcome.output
    imported = groupformer.import_model(tmp_path / "new")
    loaded = GroupFormerForCausalLM.from_pretrained(tmp_path / "back")
    ids = random_ids(2, 21)
    for again in (imported, loaded):
        assert torch.equal(again(ids).logits, model(ids).logits)
    export_decilm(tmp_path / "back", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "again"))
    assert first.keys() == second.keys() and all(torch.equal(second[name], first[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("new", "again")]
    assert configs[0]["block_configs"] == configs[1]["block_configs"]


def test_regroup_takes_it_as_the_groupformer_that_it_is(tmp_path):
    groupformer.regroup(saved(tmp_path / "original"), {0: 2}).save_pretrained(tmp_path / "ours")
    export_decilm(tmp_path / "ours", tmp_path / "new")
    for name in ("ours", "new"):
        words = ["regroup", str(tmp_path / name), str(tmp_path / f"{name}-small"), "--kv-heads", "0:1,2:2"]
        outcome = CliRunner().invoke(app, words)
        assert outcome.exit_code == 0, outcome.output
    expected, found = (load_file(tmp_path / f"{name}-small" / "model.safetensors") for name in ("ours", "new"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    export_decilm(tmp_path / "new-small", tmp_path / "small")
    entries = json.loads((tmp_path / "small" / "config.json").read_text())["regrouping"]
    assert [entry["to"] for entry in entries] == [[2, 4, 4], [1, 4, 2]]


def test_the_commands_read_it_as_the_groupformer_that_it_is(tmp_path):
    tokenizer = GroupFormerTokenizer()
    saved(tmp_path / "ours", per_layer_config=BY_LAYER, vocab_size=len(tokenizer), pad_token_id=0)
    tokenizer.save_pretrained(tmp_path / "ours")
    export_decilm(tmp_path / "ours", tmp_path / "new")
    (tmp_path / "new" / "configuration_decilm.py").write_text("raise SystemExit('was run')")
    (tmp_path / "text.txt").write_text("The river runs from the hills to the sea. " * 3)

    def said(command, name, *options):
        return CliRunner().invoke(app, [command, str(tmp_path / name), *options], input="").stdout

    scores = [
        json.loads(said("eval", name, "--file", str(tmp_path / "text.txt"), "--json")) for name in ("ours", "new")
    ]
    assert scores[0]["bits_per_byte"] == scores[1]["bits_per_byte"]
    short = ("--context", "8", "--new-tokens", "2", "--rounds", "1", "--json")
    timed = [json.loads(said("bench", name, *short))[0] for name in ("ours", "new")]
    assert timed[0]["cache_bytes"] == timed[1]["cache_bytes"]
    written = [
        said("generate", name, "The river", "--max-new-tokens", "4", "--temperature", "0") for name in ("ours", "new")
    ]
    assert written[0] and written[0] == written[1]


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_layer_without_a_part_is_refused_by_its_place(tmp_path, part):
    saved(tmp_path / "ours", per_layer_config=BY_LAYER)
    export_decilm(tmp_path / "ours", tmp_path / "new")
    content = json.loads((tmp_path / "new" / "config.json").read_text())
    content["block_configs"][1][part]["no_op"] = True
    (tmp_path / "new" / "config.json").write_text(json.dumps(content))
    outcome = CliRunner().invoke(app, ["info", str(tmp_path / "new")])
    assert f"block_configs[1].{part}.no_op (True)" in str(outcome.exception)


REFUSALS = {
    "width": ({"intermediate_size": 48}, r"intermediate_size \(48\) cannot be expressed by DeciLM"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act \('gelu'\)"),
    "norms on heads": ({"qk_norm": "head"}, r"qk_norm \('head'\) cannot be expressed by llama"),
    "a window in one layer": ({"per_layer_config": {1: {"sliding_window": 4}}}, "sliding_window"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_format_lacks_is_refused_by_name_and_nothing_written(tmp_path, case):
    options, message = REFUSALS[case]
    saved(tmp_path / "ours", **options)
    with pytest.raises(ValueError, match=message):
        export_decilm(tmp_path / "ours", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
