"""Every family, every option of its table: the imported model computes what the native one does, and goes back as it
came. The cases come from the families' own tables."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

import groupformer
from groupformer.conversion.configs import config_class_of, coverage, plain, read_config, table_of, write_config
from groupformer.conversion.weights import build_plan
from groupformer.families.registry import FAMILIES

from .helpers import random_ids
from .helpers_families import cases, left_padded, native_config, native_model, relative_error


TOLERANCE = 2e-5  # of the largest logit, in float32
EXAMPLES = cases()


@pytest.fixture(scope="module", params=EXAMPLES, ids=[" ".join(case) for case in EXAMPLES])
def pair(request):
    """A native model and its import."""
    native = native_model(*request.param)
    return native, groupformer.import_model(native)


@torch.no_grad()
def test_logits_equal_the_native_ones(pair):
    native, ours = pair
    ids = random_ids(2, 21, native.config.vocab_size)  # longer than every window and scaled RoPE range in the tables
    assert relative_error(ours(ids).logits, native(ids).logits) < TOLERANCE


@torch.no_grad()
def test_left_padded_rows_equal_the_native_ones(pair):
    native, ours = pair
    ids, mask, positions = left_padded(native.config.vocab_size)
    given = {} if native.config.model_type in ("bloom", "mpt") else {"position_ids": positions}  # ALiBi takes none
    expected = native(ids, attention_mask=mask, **given).logits
    got = ours(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert relative_error(got[real], expected[real]) < TOLERANCE


@torch.no_grad()
def test_cached_steps_equal_the_native_ones(pair):
    native, ours = pair
    ids = random_ids(2, 12, native.config.vocab_size)
    caches = {native: None, ours: None}
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        logits = {}
        for model in caches:
            outputs = model(ids[:, start:end], past_key_values=caches[model], use_cache=True)
            caches[model], logits[model] = outputs.past_key_values, outputs.logits
        assert relative_error(logits[ours], logits[native]) < TOLERANCE


def test_greedy_generation_equals_the_native_one(pair):
    native, ours = pair
    ids, mask, _ = left_padded(native.config.vocab_size)
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    arguments = dict(attention_mask=mask, generation_config=greedy)
    assert torch.equal(ours.generate(ids, **arguments), native.generate(ids, **arguments))


def test_export_gives_back_the_same_model(pair):
    native, ours = pair
    exported = groupformer.export_model(ours)
    assert type(exported) is type(native)
    assert plain(exported.config) == plain(native.config)
    expected, got = native.state_dict(), exported.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_import_shares_no_storage(pair):
    native, ours = pair
    before = {tensor.untyped_storage().data_ptr() for tensor in native.state_dict().values()}
    assert not before & {tensor.untyped_storage().data_ptr() for tensor in ours.state_dict().values()}


def test_import_from_a_folder_equals_import_from_memory(pair, tmp_path):
    native, ours = pair
    native.save_pretrained(tmp_path)
    loaded = groupformer.import_model(tmp_path)
    expected, got = ours.state_dict(), loaded.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    ours_again = groupformer.import_model(type(native).from_pretrained(tmp_path))
    assert plain(loaded.config) == plain(ours_again.config)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma", "gemma3_text"])
def test_bfloat16_is_rounded_where_gemma_rounds(name):
    native = native_model(name, next(iter(FAMILIES[name].examples))).bfloat16()
    ours = groupformer.import_model(native)
    ids = random_ids(2, 9, native.config.vocab_size)
    embedded = ours(ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(embedded, native(ids, output_hidden_states=True).hidden_states[0])
    assert torch.equal(ours.model.norm(embedded), native.model.norm(embedded))
    exported = groupformer.export_model(ours).state_dict()
    assert all(torch.equal(exported[key], value) for key, value in native.state_dict().items())


# The tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_table_covers_every_field_of_the_native_config(name):
    assert coverage(FAMILIES[name]) == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_table_maps_to_fields_that_exist(name):
    ours = {field.name for field in dataclasses.fields(groupformer.GroupFormerConfig)} | {"id2label", "label2id"}
    family = FAMILIES[name]
    assert {row for row in table_of(family).values() if isinstance(row, str)} | set(family.constants) <= ours


@pytest.mark.parametrize(("name", "field"), cases("refused"))
def test_inexact_option_is_refused_by_name(name, field):
    native = native_config(FAMILIES[name], field, "refused")
    with pytest.raises(ValueError, match=rf"{field}\b.*\("):
        read_config(native, FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_new_field_of_the_native_class_is_refused(name, monkeypatch):
    """As if transformers had added a field that nobody has looked at yet."""
    native = native_config(FAMILIES[name], next(iter(FAMILIES[name].examples)))
    field = next(n for n, row in FAMILIES[name].fields.items() if isinstance(row, str) and getattr(native, n))
    fewer = {name: row for name, row in FAMILIES[name].fields.items() if name != field}
    default = {f.name: f.default for f in dataclasses.fields(native)}[field]
    changed = native_config(FAMILIES[name], next(iter(FAMILIES[name].examples)))
    if getattr(changed, field) == default:
        pytest.fail("choose another field for this test: this one has its default")
    with pytest.raises(ValueError, match=field):
        read_config(changed, dataclasses.replace(FAMILIES[name], fields=fewer))


def test_field_that_nobody_reads_is_harmless():
    family = FAMILIES["gpt2"]
    native = native_config(family, "odd heads", n_ctx=40, gradient_checkpointing=False)
    assert plain(write_config(read_config(native, family), family)) == plain(native)


def test_forgotten_weight_is_an_error():
    family = FAMILIES["llama"]
    weights = {name: row for name, row in family.weights.items() if name != "norm"}
    native = native_config(family, "grouped queries")
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        build_plan(dataclasses.replace(family, weights=weights), "ForCausalLM", native, read_config(native, family))


@pytest.mark.parametrize("name", FAMILIES)
def test_default_config_of_the_class_is_expressible(name):
    family = FAMILIES[name]
    native = config_class_of(family)()
    assert plain(write_config(read_config(native, family), family)) == plain(native)


# Heads ---------------------------------------------------------------------------------------------------------------

LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}


def kinds() -> list[tuple[str, str]]:
    pairs = []
    for name, family in FAMILIES.items():
        for kind in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"):
            try:
                groupformer.conversion.weights.native_class(family, kind)
            except ValueError:
                continue
            pairs.append((name, kind))
    return pairs


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), kinds())
def test_heads_come_along(name, kind, tmp_path):
    # A span has a start and an end, whatever the labels; before 5.24 GPT-J's head had a row for each label.
    labels = {} if kind == "ForQuestionAnswering" else LABELS
    native = native_model(name, next(iter(FAMILIES[name].examples)), kind, **labels)
    ours = groupformer.import_model(native)
    ids = random_ids(3, 9, native.config.vocab_size)
    expected, got = native(ids).to_tuple(), ours(ids).to_tuple()
    assert relative_error(got[0], expected[0]) < TOLERANCE
    assert ours.config.id2label == native.config.id2label
    exported = groupformer.export_model(ours)
    assert type(exported) is type(native)
    assert plain(exported.config) == plain(native.config)
    assert all(torch.equal(exported.state_dict()[key], value) for key, value in native.state_dict().items())


def test_kind_without_a_counterpart_is_refused():
    from transformers import GPT2Config, GPT2DoubleHeadsModel

    model = GPT2DoubleHeadsModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=10))
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel"):
        groupformer.import_model(model)


# Export to another family --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "option", "family"),
    [
        ("llama", "grouped queries", "mistral"),
        ("mistral", "no window", "llama"),
        ("qwen3", "windows in the upper layers", "qwen3"),
        ("gpt2", "odd heads", "gpt_bigcode"),
        ("gpt_bigcode", "every head its own keys", "gpt2"),
        ("llama", "grouped queries", "smollm3"),
    ],
)
def test_export_to_another_family_is_exact(name, option, family):
    ours = groupformer.import_model(native_model(name, option))
    exported = groupformer.export_model(ours, family)
    assert exported.config.model_type == family
    ids = random_ids(2, 9, ours.config.vocab_size)
    assert relative_error(exported(ids).logits, ours(ids).logits) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "option", "family", "field"),
    [
        ("bloom", "four heads", "llama", "position_embedding_type"),
        ("qwen2", "no window", "llama", "attention_output_bias"),
        ("llama", "all biases", "mistral", "attention_bias"),
        ("mistral", "window shorter than the prompt", "llama", "sliding_window"),
        ("qwen3", "wide heads", "llama", "qk_norm"),
        ("olmo2", "grouped queries", "qwen3", "norm_position"),
        ("phi", "half of each head rotated", "gpt_neox", "shared_parallel_norm"),
        ("gpt2", "scores by layer", "gpt_bigcode", "attention_multiplier"),
        ("llama", "grouped queries", "gpt2", "position_embedding_type"),
        ("smollm3", "RoPE in every second layer", "llama", "no_rope_layers"),
        ("glm4", "half of each head rotated", "glm", "norm_position"),
        ("gemma", "grouped queries, tied", "llama", "norm_type"),
        ("olmo3", "yarn rope where no window is", "olmo2", "rope_parameters"),
    ],
)
def test_export_names_the_field_that_a_family_lacks(name, option, family, field):
    ours = groupformer.import_model(native_model(name, option))
    with pytest.raises(ValueError, match=field):
        groupformer.export_model(ours, family)


def test_export_of_a_model_of_our_own_names_the_families_that_fit():
    from .helpers import tiny_config

    model = groupformer.GroupFormerForCausalLM(tiny_config(num_key_value_heads=2, norm_eps=1e-5))
    with pytest.raises(ValueError, match="llama, ministral, mistral, phi3"):
        groupformer.export_model(model)
    assert groupformer.export_model(model, "llama").config.num_key_value_heads == 2


def test_a_family_that_needs_a_special_token_is_refused_by_the_field():
    from .helpers import tiny_config

    model = groupformer.GroupFormerForCausalLM(tiny_config(norm_eps=1e-5))
    with pytest.raises(ValueError, match="cwm cannot express the config: .*'bos_token_id'"):
        groupformer.export_model(model, "cwm")


def test_export_follows_changes_made_after_the_import():
    """Remembered native values give way to fields that were changed."""
    ours = groupformer.import_model(native_model("gpt2", "odd heads"))
    ours.config.intermediate_size = 10
    changed = groupformer.GroupFormerForCausalLM(ours.config)
    assert groupformer.export_model(changed).config.n_inner == 10


def test_heads_that_differ_by_layer_cannot_be_exported_to_llama():
    from .helpers import tiny_config

    model = groupformer.GroupFormerForCausalLM(tiny_config(per_layer_config={1: {"num_key_value_heads": 1}}))
    with pytest.raises(ValueError, match=r"num_key_value_heads \(\[4, 1\]\) .*; choose --format decilm"):
        groupformer.export_model(model, "llama")


def test_unknown_family_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match="'t5'"):
        groupformer.import_model(model)
    with pytest.raises(ValueError, match="not a GroupFormer"):
        groupformer.export_model(model)
