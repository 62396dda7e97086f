"""Fields that follow from others: a config loaded with overrides, or changed, is the one built with them."""

import copy
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from groupformer import GroupFormerConfig, GroupFormerForCausalLM

from . import strategies
from .helpers import tiny_config


YARN = {"rope_type": "yarn", "factor": 2.0}

# The fields of a config, what is overridden in it, and what the override must have changed with it.
OVERRIDES = {
    "window": ({}, {"sliding_window": 4}, {"layer_types": ["sliding_attention"] * 2}),
    "no window": ({"sliding_window": 4}, {"sliding_window": None}, {"layer_types": ["full_attention"] * 2}),
    "encoder": ({}, {"is_causal": False}, {"use_cache": False}),
    "decoder": ({"is_causal": False}, {"is_causal": True}, {"use_cache": True}),
    "no cache": ({"use_cache": False, "is_causal": False}, {"is_causal": True}, {"use_cache": False}),
    "heads": ({}, {"num_attention_heads": 8}, {"num_key_value_heads": 8, "head_dim": 4}),
    "width": ({}, {"hidden_size": 64}, {"head_dim": 16}),
    "head width": ({}, {"head_dim": 16}, {"head_dim": 16}),
    "given heads": ({"num_key_value_heads": 4, "head_dim": 8}, {"num_attention_heads": 8}, {"num_key_value_heads": 4, "head_dim": 8}),  # noqa: E501
    "kv heads": ({}, {"num_key_value_heads": 2}, {"num_key_value_heads": 2}),
    "kv heads by default again": ({"num_key_value_heads": 2}, {"num_key_value_heads": None}, {"num_key_value_heads": 4}),  # noqa: E501
    "layers": ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"layer_types": ["full_attention"] * 2}),
    "more layers": ({}, {"num_hidden_layers": 3}, {"layer_types": ["full_attention"] * 3}),
    "positions": ({}, {"position_embedding_type": "alibi"}, {"rope_parameters": None}),
    "rope": ({"position_embedding_type": "none"}, {"position_embedding_type": "rope"}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),  # noqa: E501
    "base of rope": ({}, {"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "length": ({"rope_parameters": YARN}, {"max_position_embeddings": 32}, {"rope_parameters": {**YARN, "rope_theta": 10000.0, "original_max_position_embeddings": 32}}),  # noqa: E501
    "plain": ({}, {"mlp_type": "plain"}, {}),
    "gated": ({"mlp_type": "plain"}, {"mlp_type": "gated"}, {}),
    "by layer": ({}, {"per_layer_config": {1: {"sliding_window": 4}}}, {"layer_types": ["full_attention", "sliding_attention"]}),  # noqa: E501
    "not by layer": ({"per_layer_config": {1: {"sliding_window": 4}}}, {"per_layer_config": None}, {"layer_types": ["full_attention"] * 2}),  # noqa: E501
    "a layer that has the default": ({"per_layer_config": {1: {"num_key_value_heads": 4}}}, {"num_key_value_heads": 2}, {}),  # noqa: E501
    "labels": ({"id2label": {0: "a", 1: "b", 2: "c"}}, {"id2label": {0: "b", 1: "a"}}, {"label2id": {"b": 0, "a": 1}}),
}  # fmt: skip


# What a loaded config has, and a built one has not; and a plan to which older transformers add their own, once.
OF_A_FILE = ("model_type", "transformers_version", "base_model_tp_plan")


def assert_same(config, built):
    """The same values, what follows from them, and what is written."""
    found, expected = (
        {name: value for name, value in vars(each).items() if not name.startswith("_") and name not in OF_A_FILE}
        for each in (config, built)
    )
    assert found == expected
    plans = ({name for name in each.base_model_tp_plan if name.startswith("layers.")} for each in (config, built))
    assert len({*map(frozenset, plans)}) == 1
    for name in ("num_key_value_heads", "sliding_window", "intermediate_size"):
        found, expected = ([getattr(layer, name) for layer in each.per_layer_config] for each in (config, built))
        assert found == expected
    assert config.to_dict() == built.to_dict()


def loaded(config, folder, **overrides):
    """What is saved in the folder, loaded with overrides; its path is no part of the comparison."""
    config.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, **overrides)
    config.name_or_path = ""
    return config


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_config_loaded_or_changed_is_the_one_built_so(name, tmp_path):
    fields, overrides, expected = OVERRIDES[name]
    config, built = tiny_config(**fields), tiny_config(**{**fields, **overrides})
    assert {field: getattr(built, field) for field in expected} == expected
    assert_same(loaded(config, tmp_path, **overrides), built)
    assert_same(GroupFormerConfig.from_dict(config.to_dict(), **overrides), built)
    assert_same(GroupFormerConfig(**{**config.to_dict(), **overrides}), built)
    if "rope_theta" not in overrides:  # a word of older configs, and no field
        for copied in (
            config,
            copy.deepcopy(tiny_config(**fields)),
            pickle.loads(pickle.dumps(tiny_config(**fields))),
        ):
            copied.update(overrides)
            assert_same(copied, built)


@pytest.mark.parametrize(
    "name", [name for name in OVERRIDES if name not in ("given heads", "no cache", "a layer that has the default")]
)
def test_a_file_with_every_derived_value_loads_with_overrides_too(name, tmp_path):
    """As files were written at first. A given value that equals the derived one cannot be told from it."""
    fields, overrides, _ = OVERRIDES[name]
    config = tiny_config(**fields)
    content = config.to_dict()
    content |= {name: content["derived_fields"][name] for name in ("rope_parameters",) if name in fields}
    del content["derived_fields"], content["derived_values"]
    (tmp_path / "config.json").write_text(json.dumps(content, default=str))
    config = AutoConfig.from_pretrained(tmp_path, **overrides)
    config.name_or_path = ""
    assert_same(config, tiny_config(**{**fields, **overrides}))


@settings(max_examples=150, deadline=None)
@given(fields=strategies.legal_fields(), others=strategies.legal_fields(), data=st.data())
@example(fields={"num_attention_heads": 2}, others={"num_attention_heads": 4}, data=None)
@example(
    fields={"num_hidden_layers": 1},
    others={"per_layer_config": {1: {"num_key_value_heads": 1}}, "num_hidden_layers": 2},
    data=None,
)
def test_loading_with_overrides_equals_building_with_them(fields, others, data, tmp_path_factory):
    """Some derived fields are not given, and any fields of another config are overridden."""
    if data is not None:
        derived = ["head_dim", "num_key_value_heads", "rope_parameters", "layer_types"]
        left_out = data.draw(st.sets(st.sampled_from(derived)), label="left out")
        fields = {name: value for name, value in fields.items() if name not in left_out}
        names = data.draw(st.sets(st.sampled_from(sorted(others))), label="overridden")
        others = {name: others[name] for name in names}
    try:
        config = GroupFormerConfig(**fields)
        built = GroupFormerConfig(**{**fields, **others})
    except (ValueError, StrictDataclassError):
        assume(False)
    assert_same(loaded(config, tmp_path_factory.mktemp("config"), **others), built)
    # A layer must be there before something of its own can be set.
    for name in sorted(others, key=lambda name: name != "num_hidden_layers"):
        if name != "attn_implementation":
            setattr(config, name, others[name])
    config._attn_implementation = built._attn_implementation
    assert_same(config, built)
    config.validate()


@pytest.mark.parametrize("how", ["loaded", "changed"])
def test_fewer_layers_are_the_first_ones(how, tmp_path):
    fields = dict(
        num_hidden_layers=4,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        per_layer_config={0: {"num_key_value_heads": 2}, 3: {"num_key_value_heads": 1}},
    )
    config = tiny_config(**fields)
    if how == "loaded":
        config = loaded(config, tmp_path, num_hidden_layers=2)
    else:
        config.num_hidden_layers = 2
    shorter = {
        "num_hidden_layers": 2,
        "layer_types": fields["layer_types"][:2],
        "per_layer_config": {0: {"num_key_value_heads": 2}},
    }  # noqa: E501
    assert_same(config, tiny_config(**{**fields, **shorter}))


def test_the_config_of_a_layer_differs_in_its_own_values_only():
    """Transformers makes it for each layer, and masks ask for it at every token: nothing else is derived for it."""
    config = tiny_config(sliding_window=4, per_layer_config={1: {"num_key_value_heads": 1, "sliding_window": None}})
    derived = ("head_dim", "layer_types", "rope_parameters", "use_cache", "label2id")
    first, second = config.per_layer_config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (first.num_key_value_heads, first.sliding_window) == (4, 4)
    assert (second.num_key_value_heads, second.sliding_window) == (1, None)
    for name in derived:
        assert getattr(first, name) == getattr(second, name) == getattr(config, name)
    config.per_layer_config = None
    assert config.layer_types == ["sliding_attention"] * 2


def test_an_override_that_cannot_be_built_is_refused_when_it_is_loaded(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"num_key_value_heads \(3\); choose 1, 2 or 4"):
        AutoConfig.from_pretrained(tmp_path, num_key_value_heads=3)


def test_what_is_changed_in_place_is_given_from_then_on(tmp_path):
    config = tiny_config()
    config.rope_parameters["rope_theta"] = 500.0
    config.layer_types[0] = "sliding_attention"
    config.sliding_window = 4
    assert config.rope_parameters["rope_theta"] == 500.0
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert_same(loaded(config, tmp_path), config)


@pytest.mark.parametrize("saved", [{"num_labels": 3}, {"id2label": {0: "no", 1: "yes", 2: "maybe"}}])
def test_labels_loaded_with_another_number_are_new_ones(saved, tmp_path):
    config = loaded(tiny_config(**saved), tmp_path, num_labels=4)
    assert config.id2label == {number: f"LABEL_{number}" for number in range(4)}
    assert config.label2id == {f"LABEL_{number}": number for number in range(4)}


def test_a_saved_config_holds_what_was_given_and_names_the_rest(tmp_path):
    config = tiny_config(head_dim=8, is_causal=False, rope_parameters=YARN)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["head_dim"] == 8 and content["rope_parameters"] == YARN
    derived = ["label2id", "layer_types", "num_key_value_heads", "rope_parameters", "use_cache"]
    assert content["derived_fields"] == derived
    assert not {*derived, "_given", "_derived", "derived_values"} - {"rope_parameters"} & set(content)


def test_the_dictionary_holds_every_value_for_whoever_reads_it():
    content = tiny_config(is_causal=False).to_dict()
    assert content["head_dim"] == 8 and content["num_key_value_heads"] == 4 and content["use_cache"] is False
    assert content["layer_types"] == ["full_attention"] * 2


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_file_edited_by_hand_is_read_as_it_stands(name, tmp_path):
    fields, overrides, _ = OVERRIDES[name]
    tiny_config(**fields).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **overrides}))
    config = AutoConfig.from_pretrained(tmp_path)
    config.name_or_path = ""
    assert_same(config, tiny_config(**{**fields, **overrides}))


def test_a_model_loads_with_a_config_that_was_changed(tmp_path):
    GroupFormerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.sliding_window = 4
    given = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=4)
    assert given.config.layer_types == by_name.config.layer_types == ["sliding_attention"] * 2
    assert AutoModelForCausalLM.from_config(config).model.layers[0].self_attn.sliding_window == 4
