"""Any decoder in, the same decoder out: one table of architectures, each regrouped, expanded, refused or proved."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import groupformer
from groupformer import GroupFormerForCausalLM
from groupformer.commands.main import app
from groupformer.regrouping.attention import find_attention
from groupformer.regrouping.heads import join_rotary, split_rotary
from groupformer.regrouping.streaming import expand_folder, regroup_folder

from .helpers import random_ids, tiny_config
from .helpers_attention import ARCHITECTURES, CASES, tiny_native, tiny_native_config


# One option of each family of the bridge, with several key-value heads to merge; and what holds the result.
FAMILIES = {
    ("bloom", "four heads"): GroupFormerForCausalLM,
    ("cohere", "untied, biases, an odd scale"): None,
    ("falcon", "grouped, two norms"): None,
    ("falcon", "in sequence, biases"): GroupFormerForCausalLM,
    ("gpt2", "scores by layer"): GroupFormerForCausalLM,
    ("gpt_bigcode", "every head its own keys"): None,
    ("gpt_neox", "parallel, a quarter rotated"): GroupFormerForCausalLM,
    ("gptj", "half of each head rotated"): GroupFormerForCausalLM,
    ("granite", "biases, wide heads"): None,
    ("llama", "all biases"): None,
    ("mistral", "window shorter than the prompt"): None,
    ("mpt", "four heads"): GroupFormerForCausalLM,
    ("olmo2", "every head its own keys, biases"): None,
    ("opt", "biases"): GroupFormerForCausalLM,
    ("phi", "norms on queries and keys"): None,
    ("phi3", "grouped queries"): None,
    ("qwen2", "windows below"): None,
    ("qwen3", "wide heads"): None,
    ("smollm3", "RoPE in every second layer"): None,
    ("stablelm", "parallel, biases"): None,
    ("starcoder2", "biases"): None,
}
# Understood, but neither their own class nor GroupFormer has a field for fewer key-value heads.
NOWHERE_TO_GO = ("persimmon", "gpt_neo")
REGROUPED = [case for case in CASES if case[0] not in NOWHERE_TO_GO] + list(FAMILIES)
IDS = random_ids(2, 11, 80)
CALIBRATION = random_ids(3, 40, 80, seed=1)


def key_value_heads(model: PreTrainedModel) -> list[int]:
    return [layout.geometry.num_key_value_heads for layout in find_attention(type(model), model.config)]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same_logits(found: PreTrainedModel, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def random_key_map(geometry, key: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A key (D, E) under a random map that the layer's positions and norms leave free."""
    if geometry.qk_norm is not None:
        sign = 1 if not geometry.sign_is_free or torch.rand((), generator=generator) < 0.5 else -1
        return key * sign * (1.7 if geometry.qk_norm == "head" else 1)
    blocks = split_rotary(key[None], geometry.rotary_dim)
    for index, block in enumerate(blocks):
        if block.is_complex():
            blocks[index] = block * torch.randn(len(block), 1, 1, 1, generator=generator, dtype=block.dtype)
        else:
            size = block.shape[2]
            blocks[index] = torch.randn(size, size, generator=generator, dtype=block.dtype) @ block
    return join_rotary(blocks)[0]


@torch.no_grad()
def make_redundant(model: PreTrainedModel) -> int:
    """Makes every second key-value head a mapped copy of the one before; returns the count that is needed."""
    generator = torch.Generator().manual_seed(0)
    for layout in find_attention(type(model), model.config):
        attention = model.get_submodule(layout.path)
        heads = layout.read_heads(attention.state_dict())
        count = len(heads.key) // 2 if len(heads.key) % 2 == 0 else 1
        size = len(heads.key) // count
        key, value, key_norms = heads.key.clone(), heads.value.clone(), copy.deepcopy(heads.key_norms)
        for head in range(len(key)):
            first = head // size * size
            if head != first:
                turn = torch.randn(value.shape[1], value.shape[1], generator=generator, dtype=value.dtype)
                key[head], value[head] = random_key_map(layout.geometry, key[first], generator), turn @ value[first]
                for norm in key_norms.values():
                    norm[head] = norm[first]
        redundant = replace(heads, key=key, value=value, key_norms=key_norms)
        attention.load_state_dict(layout.write_heads(redundant, attention.state_dict()), strict=False)
    return count


@pytest.mark.parametrize("name, option", REGROUPED)
def test_redundant_heads_go_without_loss(name, option):
    model = tiny_native(name, option)
    count = make_redundant(model)
    expected = logits(model)
    merged = groupformer.regroup(model, count, grouping="adjacent")
    assert set(key_value_heads(merged)) == {count}
    assert type(merged) is (FAMILIES.get((name, option)) or type(model))
    assert_same_logits(merged, expected)
    cache = merged(IDS, use_cache=True).past_key_values
    assert name == "falcon" or {layer.keys.shape[1] for layer in cache.layers} == {count}


STREAMED = [(name, next(iter(options))) for name, options in ARCHITECTURES.items() if name not in NOWHERE_TO_GO]
STREAMED = [case for case in STREAMED if case[0] in ("qwen3_moe", "gemma2", "gpt_oss", "olmo3", "glm4", "cohere2")]
STREAMED += [("gpt2", "scores by layer"), ("llama", "every head its own keys"), ("falcon", "grouped, two norms")]


@pytest.mark.parametrize("calibration", [None, CALIBRATION], ids=["norms", "calibrated"])
@pytest.mark.parametrize("name, option", STREAMED)
def test_the_streamed_folder_is_the_result_in_memory_bit_for_bit(tmp_path, name, option, calibration):
    model = tiny_native(name, option)
    model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    expected = groupformer.regroup(model, 1, calibration=calibration)
    regroup_folder(tmp_path / "old", tmp_path / "new", 1, calibration=calibration, max_shard_bytes=20_000)
    loaded = type(expected).from_pretrained(tmp_path / "new")
    assert loaded.config.regrouping == expected.config.regrouping
    found = loaded.state_dict()
    for tensor_name, tensor in expected.state_dict().items():
        assert torch.equal(found[tensor_name], tensor), tensor_name


def test_only_the_count_and_the_provenance_change_in_a_native_config(tmp_path):
    model = tiny_native("qwen3_moe", "experts").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "old")
    regroup_folder(tmp_path / "old", tmp_path / "new", 2)
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("old", "new"))
    assert {name for name in new if new[name] != old.get(name)} == {"num_key_value_heads", "regrouping"}
    assert set(old) <= set(new)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "gpt_oss"])
def test_a_process_without_the_package_loads_and_generates(tmp_path, name):
    tiny_native(name, next(iter(ARCHITECTURES[name]))).save_pretrained(tmp_path / "old")
    regroup_folder(tmp_path / "old", tmp_path / "new", 2)
    child = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4)\n"
        "assert 'groupformer' not in sys.modules\n"
        "print(type(model).__name__, out.shape[1], model.config.num_key_value_heads)"
    )
    run = subprocess.run([sys.executable, "-c", child, str(tmp_path / "new")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[1:] == ["7", "2"]


# By layer, again, and the other way round --------------------------------------------------------------------------


def test_counts_by_layer_become_a_groupformer():
    merged = groupformer.regroup(tiny_native("llama", "every head its own keys"), {0: 3})
    assert type(merged) is GroupFormerForCausalLM
    assert key_value_heads(merged) == [3, 6]


def test_regrouping_again_appends_to_what_was_done():
    once = groupformer.regroup(tiny_native("llama", "every head its own keys"), 3, calibration=CALIBRATION)
    twice = groupformer.regroup(once, 1, method="mean", grouping="adjacent")
    first, second = twice.config.regrouping
    assert (first["from"], first["to"], first["method"], first["calibration_tokens"]) == (6, 3, "svd", 120)
    assert (second["from"], second["to"], second["method"], second["grouping"]) == (3, 1, "mean", "adjacent")
    assert once.config.regrouping == [first]


def test_what_was_done_outlives_import_and_export():
    ours = groupformer.import_model(groupformer.regroup(tiny_native("llama", "every head its own keys"), 3))
    assert [entry["to"] for entry in ours.config.regrouping] == [3]
    back = groupformer.export_model(groupformer.regroup(ours, 1))
    assert [entry["to"] for entry in back.config.regrouping] == [3, 1]


def test_info_and_the_card_say_what_was_done(tmp_path):
    tiny_native("llama", "every head its own keys").save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    regroup_folder(tmp_path / "old", tmp_path / "once", 3, calibration=CALIBRATION)
    with open(tmp_path / "once" / "README.md", "a") as card:
        card.write("\n# Thanks\n")
    regroup_folder(tmp_path / "once", tmp_path / "twice", 1, method="mean", grouping="adjacent")
    card = (tmp_path / "twice" / "README.md").read_text()
    lines = ["6 -> 3 KV heads: svd, similar, calibrated on 120 tokens", "3 -> 1 KV heads: mean, adjacent"]
    assert card.startswith("---\nlicense: mit\n---\n# A model\n") and all(card.count(line) == 1 for line in lines)
    assert card.endswith("\n\n# Thanks\n")  # what its owner wrote
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "twice")]).stdout
    assert all(line in shown for line in lines)
    as_json = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "twice"), "--json"]).stdout)
    assert [entry["to"] for entry in as_json["regrouping"]] == [3, 1]


def test_a_model_of_a_repositorys_own_code_is_recognised_by_its_config(tmp_path):
    from transformers import AutoConfig

    groupformer.GroupFormerForCausalLM(tiny_config()).save_pretrained(tmp_path / "old")
    child = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'groupformer' not in sys.modules\n"
        "import groupformer\n"
        "small = groupformer.regroup(model, 2)\n"
        "assert type(small) is type(model) is not groupformer.GroupFormerForCausalLM\n"
        "print(small.config.num_key_value_heads, small(torch.tensor([[1, 2]])).logits.shape[-1])"
    )
    run = subprocess.run([sys.executable, "-c", child, str(tmp_path / "old")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["2", str(AutoConfig.from_pretrained(tmp_path / "old").vocab_size)]


EXPANDED = [
    ("llama", "one key head", 3),
    ("qwen3", "wide heads", 6),
    ("falcon", "grouped, two norms", 6),
    ("gpt_bigcode", "one key head", 3),
    ("olmo2", "grouped queries", 6),
    ("llama", "head_dim apart from hidden_size", 4),  # needs query heads that give nothing
    ("qwen3", "wide heads", 7),
]


@pytest.mark.parametrize("name, option, count", EXPANDED)
def test_expanded_models_compute_the_same(tmp_path, name, option, count):
    model = tiny_native(name, option)
    larger = groupformer.expand(model, count)
    assert type(larger) is type(model)
    assert set(key_value_heads(larger)) == {count}
    assert_same_logits(larger, logits(model))
    model.save_pretrained(tmp_path / "old")
    expand_folder(tmp_path / "old", tmp_path / "new", count)
    streamed = type(model).from_pretrained(tmp_path / "new").state_dict()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in larger.state_dict().items())


def test_a_groupformer_expands_by_layer_to_one_count():
    model = groupformer.regroup(tiny_native("llama", "every head its own keys"), {0: 1, 1: 2})
    larger = groupformer.expand(model, 6)
    assert key_value_heads(larger) == [6, 6]
    assert_same_logits(larger, logits(model))


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOWHERE_TO_GO)
def test_understood_models_without_a_place_for_the_result_are_refused(name):
    model = tiny_native(name, next(iter(ARCHITECTURES[name])))
    message = f"has no config field for these key-value heads, .*model_type \\('{name}'\\)"
    with pytest.raises(ValueError, match=message):
        groupformer.regroup(model, 2)


REFUSED = {
    "latent attention": (
        "deepseek_v3",
        dict(n_routed_experts=4, n_group=1, topk_group=1),
        r"\(MLA\) has no key-value",
    ),
    "shared keys": ("gemma3n_text", dict(num_kv_shared_layers=1), "layers share keys and values"),
    "state spaces": ("mamba", {}, "mixes tokens by MambaMixer"),
    "a hybrid": ("falcon_h1", {}, "mixes tokens by FalconH1Mixer"),
    "linear attention": ("qwen3_next", {}, "mixes tokens by Qwen3NextGatedDeltaNet"),
    "differences of two softmaxes": ("diffllama", {}, "keeps heads apart"),
    "code that fails on a probe": ("gemma4_text", {}, "Gemma4ForCausalLM cannot be regrouped: it fails on a probe"),
    "clamped values": ("olmo", dict(clip_qkv=3.0), "a clamp such as clip_qkv"),
    "a norm behind the values": ("bitnet", {}, "keeps heads apart"),
    "an encoder and a decoder": ("t5", {}, "an encoder and a decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_attention_is_refused_by_what_differs(case):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    from .helpers_attention import SIZES

    name, changes, message = REFUSED[case]
    config = CONFIG_MAPPING[name](**{**SIZES, **changes})
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    with pytest.raises(ValueError, match=message):
        find_attention(mapping[type(config)], config)


def test_expansion_that_is_not_exact_is_refused():
    with pytest.raises(ValueError, match="a norm over all queries would count them; choose a multiple of 2"):
        groupformer.expand(tiny_native("olmo2", "grouped queries"), 4)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no config for 10 query and 5 key-value heads"):
        groupformer.expand(tiny_native("llama", "head_dim apart from hidden_size"), 5)  # 24 is no multiple of 10
    with pytest.raises(ValueError, match=r"num_key_value_heads \(1\) is less than the 2 there are; use regroup"):
        groupformer.expand(tiny_native("llama", "grouped queries"), 1)


def test_a_quantized_model_is_refused():
    config = tiny_native_config("mixtral", "experts")
    config.quantization_config = {"quant_method": "fp8"}
    from transformers import MixtralForCausalLM

    with pytest.raises(ValueError, match="quantized .quantization_config.; regroup before quantizing"):
        find_attention(MixtralForCausalLM, config)
