"""The app, without a browser: what its tabs compute and draw, and what they say about bad input."""

import json
import socket

import pytest
import torch


pytest.importorskip("gradio", reason="the app needs gradio: make test-app")
pytest.importorskip("matplotlib", reason="the app needs matplotlib: make test-app")

import gradio as gr
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer
from groupformer.app import as_gradio_error, build, check_context, check_port, launch, read_config
from groupformer.app.session import Session
from groupformer.app.views import attention_html, labels, table_html

from .helpers import randomize, tiny_config


@pytest.fixture(scope="module")
def session():
    config = tiny_config(vocab_size=16384, max_position_embeddings=256, num_key_value_heads=4)
    return Session(randomize(GroupFormerForCausalLM(config)), GroupFormerTokenizer(), "tiny")


# Generation ----------------------------------------------------------------------------------------------------------


def test_a_stream_ends_in_what_generate_gives(session):
    pieces = list(session.stream("The river", 5))
    ids = session.tokenizer("The river", return_tensors="pt").input_ids
    tokens = session.model.generate(ids, max_new_tokens=5, do_sample=False)
    assert pieces[-1] == session.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:]))


def test_closing_a_stream_ends_the_generation(session):
    stream = session.stream("The river", 200)
    next(stream)
    stream.close()  # joins the thread that generates


@pytest.mark.parametrize(
    "prompt, message", [("", "empty"), ("  \n", "empty"), ("river " * 300, "exceeds the 256 positions")]
)
def test_text_that_cannot_be_used_is_refused(prompt, message, session):
    with pytest.raises(ValueError, match=message):
        list(session.stream(prompt, 5))


# Regrouping ----------------------------------------------------------------------------------------------------------


def test_the_comparison_shows_the_original_and_the_smaller_cache(session):
    rows = {name: cells for name, *cells in session.compare(1)}
    assert rows["KV heads"] == ["4", "1"]
    original, small = rows["cache, bytes a token"]
    assert original == 4 * small == 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, head_dim, bytes
    assert min(rows["bits per byte"]) > 0


def test_counts_that_do_not_divide_snap_to_the_next_smaller(session):
    assert session.legal_counts() == [1, 2, 4]
    count, model = session.with_kv_heads(3)
    assert count == 2 and model.config.num_key_value_heads == 2
    assert session.with_kv_heads(3)[1] is model  # made once


def test_a_regrouped_model_is_saved_and_nothing_is_replaced(session, tmp_path):
    assert session.save(2, tmp_path / "small") == "GroupFormerForCausalLM"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert saved.config.num_key_value_heads == 2
    with pytest.raises(ValueError, match="is not empty"):
        session.save(1, tmp_path / "small")


def test_a_native_model_stays_in_its_class(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=16384, **shape)).save_pretrained(tmp_path)
    GroupFormerTokenizer().save_pretrained(tmp_path)
    native = Session.load(tmp_path, "cpu")
    assert native.legal_counts() == [1, 2, 4]
    assert native.save(2, tmp_path / "small") == "LlamaForCausalLM"
    assert native.attend("a river", 2).kv_heads == [2, 2]


# Attention -----------------------------------------------------------------------------------------------------------


def test_the_view_shows_the_models_own_probabilities(session):
    attention = session.attend("I am sitting near a river bank")
    eager = AutoModelForCausalLM.from_config(session.model.config, attn_implementation="eager").eval()
    eager.load_state_dict(session.model.state_dict())
    ids = session.tokenizer("I am sitting near a river bank", return_tensors="pt").input_ids
    expected = eager(ids, output_attentions=True).attentions
    assert "".join(attention.tokens) == session.tokenizer.decode(ids[0])
    for found, layer in zip(attention.layers, expected):
        torch.testing.assert_close(found, layer[0])


def test_every_head_stands_in_the_box_of_its_kv_head(session):
    page = attention_html(session.attend("a river", kv_heads=2), 1)
    assert page.count('class="gf-group"') == 2 * 2  # layers, KV heads
    assert page.count("KV head 0, read by 2 query heads") == 2
    assert page.index("head 0<") < page.index("head 1<") < page.index("KV head 1") < page.index("head 2<")


def test_the_view_of_fewer_kv_heads_is_that_of_the_regrouped_model(session):
    _, small = session.with_kv_heads(2)
    found, expected = session.attend("a river", 2), Session(small, session.tokenizer, "small").attend("a river")
    torch.testing.assert_close(found.layers, expected.layers)
    assert found.kv_heads == [2, 2] and not torch.allclose(found.layers[1], session.attend("a river").layers[1])


def test_text_cannot_become_markup(session):
    attention = session.attend("<script>alert(1)</script>")
    page = attention_html(attention, 0)
    assert "<script" not in page and "&lt;" in page


def test_equal_tokens_stay_apart():
    assert labels(["a", " a", "\n"]) == [("1 · a", 0), ("2 · a", 1), ("3 · '\\n'", 2)]


def test_a_sentence_that_is_too_long_to_show_is_refused(session):
    with pytest.raises(ValueError, match="the view shows at most 48"):
        session.attend("river " * 60)


# Memory --------------------------------------------------------------------------------------------------------------


def test_a_config_is_read_from_text():
    config = read_config(json.dumps({**LlamaConfig(num_key_value_heads=4).to_dict()}))
    assert config.model_type == "llama" and config.num_key_value_heads == 4


@pytest.mark.parametrize("text", ['{"hidden_size"', "{}", '{"model_type": "nobody"}', "/no/such/folder", '["llama"]'])
def test_what_is_no_config_becomes_a_message(text):
    with pytest.raises(gr.Error):
        as_gradio_error(read_config)(text)


def test_the_planner_respects_the_models_positions(session):
    check_context(session.model.config, 256)
    with pytest.raises(ValueError, match="257 tokens exceed the 256 positions of this model; choose 256 or fewer"):
        check_context(session.model.config, 257)


def test_a_table_names_its_rows_and_escapes_its_cells():
    page = table_html(["", "original"], [["<b>", 16384]])
    assert '<th scope="row">&lt;b&gt;</th><td>16,384</td>' in page


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_has_its_tabs(session):
    page = build(session)
    names = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert names == ["Regroup", "Generate", "Attention", "Memory"]


def test_a_busy_port_is_named_before_a_model_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port \({port}\) on 127.0.0.1: Address already in use; choose another"):
            launch("no/such/model", port=port)
    check_port("127.0.0.1", port)


def test_starting_prints_nothing_of_its_own(session, capsys, monkeypatch):
    monkeypatch.setattr(Session, "load", lambda source, device: session)
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: page.close())
    addresses = []
    launch(on_start=addresses.append)
    assert addresses[0].startswith("http://127.0.0.1:")
    assert "share" not in capsys.readouterr().out
