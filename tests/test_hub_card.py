"""What ships in `hub_card/`: the checkpoint, its card, and the template of cards."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.integrations.model_card import cache_bytes_per_token, render_card, sharing
from groupformer.training.pretraining import PretrainRecipe

from .helpers import random_ids, tiny_config


FOLDER = Path(__file__).parent.parent / "hub_card"
RESULTS = {"steps": 10, "tokens": 40960, "validation_loss": 5.25, "validation_bits_per_byte": 1.625}


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)


def test_the_shipped_checkpoint_is_the_reference_model(shipped):
    model, tokenizer = shipped
    assert type(model) is GroupFormerForCausalLM and type(tokenizer) is GroupFormerTokenizer
    assert model.dtype == torch.bfloat16
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 8
    assert len(tokenizer) == model.config.vocab_size
    assert (FOLDER / "model.safetensors").stat().st_size <= 25_000_000


def test_the_shipped_checkpoint_has_learned_english(shipped):
    model, tokenizer = shipped
    inputs = tokenizer("The water of the river flows into the sea, and the sun warms it.", return_tensors="pt")
    with torch.no_grad():
        loss = model.float()(**inputs, labels=inputs["input_ids"]).loss
    assert loss < torch.log(torch.tensor(float(len(tokenizer)))) - 3


def test_the_shipped_card_has_valid_metadata_and_no_gaps(shipped):
    card = ModelCard.load(FOLDER / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert card.data.eval_results[0].metric_name == "bits per byte"
    assert "{{" not in card.content and "openstax.org" in card.content
    figure = cache_bytes_per_token(shipped[0].config, torch.bfloat16)
    assert f"{figure:,} bytes in bfloat16" in card.content


def test_the_card_holds_no_code():
    assert not list(FOLDER.glob("*.py"))


def test_the_template_is_filled_for_any_model():
    model = GroupFormerForCausalLM(tiny_config(num_key_value_heads=2))
    card = render_card(FOLDER / "card_template.md", model, RESULTS, PretrainRecipe(), rows=100)
    assert not re.search(r"{{|}}|None", card.content)
    assert "| key-value heads | 2 (grouped-query attention: 2 query heads share one) |" in card.content
    assert card.data.eval_results[0].metric_value == 1.625


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_figure_is_what_a_cache_takes(kv_heads):
    model = GroupFormerForCausalLM(tiny_config(num_key_value_heads=kv_heads))
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 5
    assert cache_bytes_per_token(model.config, torch.float32) == measured


def test_sharing_in_words():
    assert sharing(tiny_config()) == "multi-head attention: nothing is shared"
    assert sharing(tiny_config(num_key_value_heads=1)) == "multi-query attention: all query heads share one"
    assert "differing by layer" in sharing(tiny_config(per_layer_config={0: {"num_key_value_heads": 2}}))
