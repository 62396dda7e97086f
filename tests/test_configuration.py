"""GroupFormerConfig: defaults, round trips, and what it refuses."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from groupformer import GroupFormerConfig, GroupFormerModel

from .helpers import tiny_config


REFUSALS = (StrictDataclassError, ValueError)

# A bad combination, and what its message must say: the field, the value and the remedy.
ILLEGAL = [
    ({"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 5}, "num_attention_heads (12) must be a multiple of num_key_value_heads (5); choose 1, 2, 3, 4, 6 or 12"),  # noqa: E501
    ({"num_key_value_heads": 0}, "num_key_value_heads (0); choose 1, 2 or 4"),
    ({"num_key_value_heads": -2}, "num_key_value_heads (-2); choose 1, 2 or 4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads (8); choose 1, 2 or 4"),
    ({"hidden_size": 30}, "hidden_size (30) must be a multiple of num_attention_heads (4); choose another, or set head_dim"),  # noqa: E501
    ({"num_attention_heads": 0}, "num_attention_heads (0) must be at least 1"),
    ({"vocab_size": -1}, "vocab_size (-1) must be at least 1"),
    ({"hidden_size": -32}, "hidden_size (-32) must be at least 1"),
    ({"intermediate_size": 0}, "intermediate_size (0) must be at least 1"),
    ({"num_hidden_layers": -1}, "num_hidden_layers (-1) must be at least 0"),
    ({"head_dim": 0}, "head_dim (0) must be at least 1"),
    ({"max_position_embeddings": 0}, "max_position_embeddings (0) must be at least 1"),
    ({"norm_eps": -1e-6}, "norm_eps (-1e-06) must be at least 0.0"),
    ({"attention_dropout": 1.5}, "attention_dropout (1.5) must be at least 0 and below 1"),
    ({"logits_scaling": 0}, "logits_scaling (0) must not be 0"),
    ({"norm_type": "batch_norm"}, "norm_type"),
    ({"position_embedding_type": "rotary"}, "position_embedding_type"),
    ({"mlp_type": "mixture"}, "mlp_type"),
    ({"qk_norm": "layer"}, "qk_norm"),
    ({"norm_position": "between"}, "norm_position"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"hidden_act": "sillu"}, "hidden_act ('sillu') is unknown; choose gelu"),
    ({"parallel_residual": True, "norm_position": "after"}, "parallel_residual (True) needs norm_position='before'"),
    ({"shared_parallel_norm": True}, "shared_parallel_norm (True) needs parallel_residual=True"),
    ({"sliding_window": 0}, "sliding_window (0) must be at least 1"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 2"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types[1] ('chunked_attention') is unknown; choose full_attention or sliding_attention"),  # noqa: E501
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types[1] is 'sliding_attention', but sliding_window (None)"),  # noqa: E501
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters['rope_type'] ('spiral') is unknown; choose default, linear"),  # noqa: E501
    ({"rope_parameters": {"rope_type": "yarn"}}, "is incomplete: Missing required keys"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "rope_parameters['factor'] (-2.0) must be greater than 0"),  # noqa: E501
    ({"rope_parameters": {"rope_theta": 0.0}}, "rope_parameters['rope_theta'] (0.0) must be greater than 0"),
    ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor'] (1.5)"),
    ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "give 3 rotary dimensions, but RoPE rotates pairs"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs by layer type; give one for each of"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": None}}, "differs by layer type"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 0.0}}}, "rope_parameters['rope_theta'] (0.0) must be greater than 0"),  # noqa: E501
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}}, "is incomplete"),
    ({"head_dim": 7}, "head_dim"),
    ({"position_embedding_type": "alibi", "rope_parameters": {"rope_theta": 1e4}}, "needs position_embedding_type='rope', but it is 'alibi'"),  # noqa: E501
    ({"position_embedding_type": "learned", "no_rope_layers": [1, 0]}, "no_rope_layers ([1, 0]) needs position_embedding_type='rope'"),  # noqa: E501
    ({"no_rope_layers": [1]}, "no_rope_layers ([1]) needs one entry for each of the 2 layers"),
    ({"no_rope_layers": [1, 2]}, "no_rope_layers ([1, 2]) needs one entry for each"),
    ({"position_embedding_type": "sinusoidal", "hidden_size": 5, "num_attention_heads": 1, "head_dim": 4}, "hidden_size (5) must be even"),  # noqa: E501
    ({"per_layer_config": {0: {"num_key_value_heads": 3}}}, "num_key_value_heads (3) in layer 0; choose 1, 2 or 4"),
    ({"per_layer_config": {0: {"norm_eps": 1.0}}}, "per_layer_config overrides norm_eps, which is one for the whole model"),  # noqa: E501
    ({"per_layer_config": {7: {"num_key_value_heads": 1}}}, "[0, 2)"),
    ({"per_layer_config": {1: {"sliding_window": -1}}}, "sliding_window (-1) in layer 1 must be at least 1"),
    ({"pad_token_id": 99}, "pad_token_id (99) is outside the vocabulary; choose None or a number from 0 to vocab_size - 1 (98)"),  # noqa: E501
    ({"bos_token_id": -1}, "bos_token_id (-1) is outside the vocabulary"),
    ({"eos_token_id": [1, 500]}, "eos_token_id (500) is outside the vocabulary"),
]  # fmt: skip

LEGAL = {
    "default": {},
    "mqa": {"num_key_value_heads": 1},
    "heads by layer": {"per_layer_config": {0: {"num_key_value_heads": 1}, 1: {"num_key_value_heads": 2}}},
    "windows by layer": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "two windows": {"per_layer_config": {0: {"sliding_window": 2}, 1: {"sliding_window": 4}}},
    "alibi": {"position_embedding_type": "alibi"},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "partial": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "rope by layer type": {
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 500.0},
        },
    },
    "bidirectional": {"is_causal": False},
    "ends": {"eos_token_id": [1, 2]},
    "labels": {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}},
}


@pytest.mark.parametrize("fields,message", ILLEGAL)
def test_what_cannot_be_built_is_refused_with_field_value_and_remedy(fields, message):
    with pytest.raises(REFUSALS) as error:
        tiny_config(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize("fields,message", ILLEGAL)
def test_a_file_that_cannot_be_built_is_refused_when_loaded(fields, message, tmp_path):
    content = json.loads(tiny_config().to_json_string(use_diff=False))
    for derived in ("head_dim", "layer_types", "rope_parameters", "num_key_value_heads"):
        content.pop(derived, None)
    per_layer = {str(index): layer for index, layer in fields.get("per_layer_config", {}).items()}
    content |= fields | ({"per_layer_config": per_layer} if per_layer else {})
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(REFUSALS) as error:
        AutoConfig.from_pretrained(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", LEGAL)
def test_a_config_survives_its_dictionary_its_file_and_auto_config(name, tmp_path):
    config = tiny_config(**LEGAL[name])
    assert GroupFormerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GroupFormerConfig
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()
    heads = [layer.num_key_value_heads for layer in config.per_layer_config]
    assert [layer.num_key_value_heads for layer in loaded.per_layer_config] == heads


def test_an_old_file_with_missing_fields_loads_with_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "groupformer", "num_attention_heads": 4}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 64
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.norm_type == "rms_norm"


def test_equal_fields_are_equal_configs():
    per_layer = {0: {"num_key_value_heads": 1}}
    assert tiny_config(per_layer_config=per_layer) == tiny_config(per_layer_config=per_layer)
    assert tiny_config(per_layer_config=per_layer) != tiny_config()


def test_the_defaults_are_multi_head_attention():
    config = GroupFormerConfig()
    assert config.num_key_value_heads == config.num_attention_heads == 8
    assert (config.position_embedding_type, config.mlp_type, config.hidden_act) == ("rope", "gated", "silu")
    assert (config.norm_type, config.norm_eps, config.norm_position) == ("rms_norm", 1e-6, "before")
    assert config.is_causal and config.use_cache and config.qk_norm is None and not config.parallel_residual


def test_the_callers_rope_parameters_are_left_as_they_were():
    given = {"rope_type": "linear", "factor": 2.0}
    tiny_config(rope_parameters=given)
    assert given == {"rope_type": "linear", "factor": 2.0}


def test_a_window_makes_every_layer_slide():
    assert tiny_config(sliding_window=4).layer_types == ["sliding_attention"] * 2
    assert tiny_config().layer_types == ["full_attention"] * 2


def test_a_bidirectional_model_keeps_no_cache():
    assert tiny_config(is_causal=False).use_cache is False


def test_a_config_changed_after_it_was_built_is_checked_when_the_model_is_built():
    config = tiny_config()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"num_key_value_heads \(3\)"):
        GroupFormerModel(config)


def test_the_code_of_every_auto_class_is_named_beside_the_config():
    names = set(tiny_config().auto_map)
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    assert names == {"AutoConfig", "AutoModel", *(f"AutoModelFor{head}" for head in heads)}


def test_a_config_from_a_hub_repository_names_the_files_beside_it_again():
    config = tiny_config(auto_map={"AutoConfig": "someone/model--configuration_groupformer.GroupFormerConfig"})
    assert config.auto_map == {"AutoConfig": "configuration_groupformer.GroupFormerConfig"}
