"""`plan`, `info` and `generate`: the arithmetic against what real models hold, and what is printed."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from typer.testing import CliRunner

from benchmarks.memory_table import CONFIGS, PAGE, config_of, page
from groupformer import GroupFormerConfig, GroupFormerForCausalLM
from groupformer.commands.main import app
from groupformer.conversion.convert import plan_import
from groupformer.conversion.formats import classes_for
from groupformer.measuring.cache import LayerCache, decoder_of, layer_caches
from groupformer.measuring.planning import Hardware, parameter_counts, plan


SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 50}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 50}
NATIVE = {
    "llama": {**SMALL, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 64},
    "gpt2": GPT2,
    "gpt_bigcode": {**GPT2, "multi_query": True},
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 6, "vocab_size": 50},
    "gpt_neox": {**SMALL, "intermediate_size": 64},
    "qwen3": {**SMALL, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 64},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 8, "intermediate_size": 64},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "intermediate_size": 64},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 2},
    "groupformer": {**SMALL, "intermediate_size": 64, "per_layer_config": {1: {"num_key_value_heads": 1}}},
}


def config_for(name: str):
    return AutoConfig.for_model(name, **NATIVE[name], bos_token_id=None, eos_token_id=None, pad_token_id=None)


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_the_cache_is_what_a_model_holds(name):
    config = config_for(name)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys[:, :, :5].nbytes + layer.values[:, :, :5].nbytes for layer in cache.layers)
    (present,) = (row for row in plan(config, 5, 1, Hardware(weight_bytes=4, cache_bytes=4)) if row.is_present)
    assert present.cache == held
    assert present.bytes_per_token * 5 == held
    assert present.weights == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "groupformer"])
def test_other_counts_are_other_models(name):
    config = config_for(name)
    for row in plan(config, 5, 1, Hardware(weight_bytes=4)):
        if row.is_present:
            continue
        fields = {**NATIVE[name], "num_key_value_heads": row.kv_heads, "per_layer_config": None}
        fields = {key: value for key, value in fields.items() if value is not None}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields, bos_token_id=None))
        assert row.weights == 4 * model.num_parameters()


def test_windows_cap_what_is_kept():
    config = LlamaConfig(**{**NATIVE["llama"]})
    windowed = config_for("mistral")
    assert [layer.numbers(100) for layer in layer_caches(decoder_of(windowed))] == [2 * 2 * 8 * 8] * 3
    assert [layer.numbers(100) for layer in layer_caches(decoder_of(config))] == [2 * 2 * 10 * 100] * 3


def test_speed_and_sequences_follow_from_the_bytes():
    config = config_for("llama")
    (row,) = (row for row in plan(config, 64, 3, Hardware(memory=1e6, bandwidth=1e6)) if row.is_present)
    total, read = parameter_counts(decoder_of(config))
    assert row.sequences == int((1e6 - 2 * total) // (row.cache / 3))
    assert row.tokens_per_second == pytest.approx(3 * 1e6 / (2 * read + row.cache))
    assert total - read == 50 * 48  # the untied input embeddings are read by rows


def test_experts_get_no_bound_on_the_speed():
    assert plan(config_for("mixtral"), 5, 1, Hardware())[0].tokens_per_second is None


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("t5", {}, "encoder-decoder"),
        ("deepseek_v3", {"num_hidden_layers": 2}, "kv_lora_rank"),
        ("mamba", {}, "state"),
        ("qwen3_next", {"num_hidden_layers": 4}, "linear_attention"),
    ],
)
def test_models_without_a_cache_of_heads_are_refused_by_name(name, fields, message):
    with pytest.raises(ValueError, match=message):
        plan(AutoConfig.for_model(name, **fields), 5, 1, Hardware())


@pytest.mark.parametrize("field", ["context", "batch", "memory", "bandwidth"])
def test_numbers_must_be_positive(field):
    arguments = {"context": 5, "batch": 1}
    hardware = Hardware(**({field: 0} if field not in arguments else {}))
    arguments |= {field: 0} if field in arguments else {}
    with pytest.raises(ValueError, match=rf"{field} \(0\)"):
        plan(config_for("llama"), hardware=hardware, **arguments)


# Commands ------------------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def test_plan_prints_json_and_draws(tmp_path):
    config_for("llama").save_pretrained(tmp_path)
    result = run("plan", tmp_path, "--context", 64, "--json", "--plot", tmp_path / "plan.png")
    rows = json.loads(result.stdout)
    assert [row["kv_heads"] for row in rows] == [6, 3, 2, 1]
    assert [row["is_present"] for row in rows] == [False, False, True, False]
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_plan_reads_a_config_by_itself(tmp_path):
    config_for("gpt2").save_pretrained(tmp_path)
    result = run("plan", "--config", tmp_path / "config.json")
    assert result.exit_code == 0 and "6 (now)" in result.stdout


def test_the_next_line_of_plan_regroups_into_another_folder(tmp_path):
    LlamaConfig(num_attention_heads=8, num_key_value_heads=8).save_pretrained(tmp_path / "small")
    result = run("plan", tmp_path / "small")
    assert f"next: groupformer regroup {tmp_path / 'small'} DST --kv-heads 4" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "x", "--config", "y"], ["plan", "--config", "missing.json"]])
def test_plan_says_what_is_missing(arguments):
    result = run(*arguments)
    assert result.exit_code == 1 and "config" in str(result.exception)


def test_info_draws_who_shares_what(tmp_path):
    config = GroupFormerConfig(
        **SMALL,
        intermediate_size=64,
        num_key_value_heads=2,
        per_layer_config={2: {"num_key_value_heads": 1}},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config.save_pretrained(tmp_path)
    lines = [" ".join(line.split()) for line in run("info", tmp_path).stdout.splitlines()]
    assert "layers 0 to 1: 6 query heads on 2 KV heads (grouped-query)" in lines
    assert "query heads | 0 1 2 | 3 4 5 |" in lines and "KV head | 0 | 1 |" in lines
    assert "layer 2: 6 query heads on 1 KV head (multi-query: all share one)" in lines


def test_info_counts(tmp_path):
    config_for("gpt2").save_pretrained(tmp_path)
    facts = json.loads(run("info", tmp_path, "--json").stdout)
    assert facts["parameters"] == AutoModelForCausalLM.from_config(config_for("gpt2")).num_parameters()
    assert facts["cache_bytes_per_token"] == 2 * 2 * 3 * 48


def test_generate_streams_what_generate_gives():
    prompt = "The cell membrane is"
    result = run("generate", "hub_card", prompt, "--max-new-tokens", 8)
    tokenizer = AutoTokenizer.from_pretrained("hub_card")
    model = AutoModelForCausalLM.from_pretrained("hub_card")
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert result.stdout.strip() == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_generate_reads_standard_input_and_chats():
    piped = run("generate", "hub_card", "-", "--max-new-tokens", 2, input="A river")
    assert piped.exit_code == 0 and "A river" in piped.stdout
    assert run("generate", "hub_card", "Hello", "--chat", "--max-new-tokens", 2).exit_code == 0


def test_generate_refuses_an_empty_prompt_by_name():
    result = run("generate", "hub_card", "", "--seed", 1)
    assert result.exit_code == 1 and "prompt" in str(result.exception)


def test_an_unknown_dtype_is_a_wrong_option_and_the_choices_are_shown():
    result = run("generate", "hub_card", "a", "--dtype", "int3")
    assert result.exit_code == 2 and "int3" in result.stderr and "bfloat16" in result.stderr


# docs/memory.md ------------------------------------------------------------------------------------------------------


def test_the_page_is_what_plan_computes():
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(("name", "billions"), [("Llama 2 7B", 6.738), ("Llama 3 8B", 8.030), ("Llama 3 70B", 70.554)])
def test_sizes_are_the_published_ones(name, billions):
    assert parameter_counts(decoder_of(config_of(CONFIGS[name])))[0] / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize(
    "window, block_size, prefill_chunk, kept",
    [
        (None, 1, 1, 1000),
        (None, 128, 512, 1024),  # whole blocks
        (256, 1, 1, 256),
        (256, 1, 512, 767),  # the window of the chunk's first token, and the chunk
        (256, 128, 512, 896),  # and a block more, as a window begins within one
        (256, 1, 4096, 1000),  # never more than there is
    ],
)
def test_engines_allot_blocks_and_chunks(window, block_size, prefill_chunk, kept):
    assert LayerCache(3, 10, window).numbers(1000, block_size, prefill_chunk) == 2 * 3 * 10 * kept


def test_the_command_counts_in_the_engines_blocks():
    arguments = ["plan", "hub_card", "--gpu-memory", "1", "--context", "1000", "--json"]
    plain, blocks = (
        json.loads(CliRunner().invoke(app, [*arguments, *extra]).stdout) for extra in ([], ["--block-size", "128"])
    )
    room = [1e9 - row["weights"] for row in plain]
    assert [row["sequences"] for row in plain] == [left // row["cache"] for left, row in zip(room, plain)]
    assert [row["sequences"] for row in blocks] == [left // (row["cache"] * 1.024) for left, row in zip(room, plain)]
    assert [row["cache"] for row in plain] == [row["cache"] for row in blocks]  # what a step reads


def test_a_config_of_remote_code_is_planned_without_a_question(tmp_path):
    GroupFormerForCausalLM(GroupFormerConfig(**SMALL)).save_pretrained(tmp_path)
    remote = get_class_from_dynamic_module("configuration_groupformer.GroupFormerConfig", tmp_path)
    config = remote.from_pretrained(tmp_path)
    assert type(config) is not GroupFormerConfig
    assert [row.kv_heads for row in plan(config, 8, 1, Hardware())] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match="is a GroupFormer already"):
        plan_import(config, "GroupFormerForCausalLM")


@pytest.mark.parametrize("count", [None, 6, 2, 1, [6, 6, 1]])
@pytest.mark.parametrize("name", NATIVE)
def test_what_can_hold_a_model_is_told_for_every_family_and_count(name, count):
    """Of the families that are asked, some have config classes that refuse a value by an error of their own."""
    config = config_for(name)
    assert "ForCausalLM" in str(classes_for(config, count)) or "LMHead" in str(classes_for(config, count))


HOLDERS = {
    "one count": ({}, 2, "LlamaForCausalLM, GGUF llama"),
    "counts by layer": ({}, [6, 6, 1], "GroupFormerForCausalLM, DeciLMForCausalLM, GGUF deci"),
    "by layer, a width that engines round": (
        {"intermediate_size": 64},
        [6, 6, 1],
        "GroupFormerForCausalLM, GGUF deci",
    ),
    "by layer, biases": ({"attention_bias": True}, [6, 6, 1], "GroupFormerForCausalLM, DeciLMForCausalLM"),
}


def test_of_the_classes_that_can_hold_a_model_without_a_family_llama_comes_first():
    config = GroupFormerConfig(norm_bias=False)
    assert str(classes_for(config)).startswith("LlamaForCausalLM")


@pytest.mark.parametrize("case", HOLDERS)
def test_formats_of_other_engines_are_told_where_layers_differ(case):
    fields, counts, expected = HOLDERS[case]
    config = LlamaConfig(**{**SMALL, "intermediate_size": 256, "num_key_value_heads": 6, **fields})
    assert str(classes_for(config, counts)) == expected
