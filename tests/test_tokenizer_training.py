"""Training and measuring a tokenizer: the pieces, the mix, the recipe of the one that ships, what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from typer.testing import CliRunner

from groupformer import GroupFormerTokenizer
from groupformer.commands.main import app
from groupformer.model.tokenization_groupformer import SHIPPED_VOCABULARY, SPECIAL_TOKENS
from groupformer.training.data import read_column
from groupformer.training.tokenizer import (
    PIECES,
    SPOKEN_WEIGHT,
    evaluate_tokenizer,
    spoken_sentences,
    train_tokenizer,
    training_mix,
)


DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the shared data sets, which are no part of this project"
)

PROSE = ["The river rises in the hills. Where does it end? We follow it to the sea, and you may come.\nIt's far."] * 4
CODE = ["def depth(river):\n    return river.depth\n"] * 4


# What is one piece before any merge


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("two rivers", ["two", " rivers"]),
        ("It's we’LL", ["It", "'s", " we", "’LL"]),
        ('"quoted" (word)', ['"quoted', '"', " (", "word", ")"]),
        ("snake_case.name", ["snake", "_case", ".name"]),
        ("in 1987.5", ["in", " 1", "9", "8", "7", ".", "5"]),
        ("e\u0301tude", ["e\u0301tude"]),
        ("a:\n    b", ["a", ":\n   ", " b"]),
        ("a\n\n    b", ["a", "\n\n   ", " b"]),
        ("a\n    # b", ["a", "\n   ", " #", " b"]),
        ("a  \r\nb", ["a", "  \r\n", "b"]),
        ("a   b", ["a", "  ", " b"]),
        ("a == b  ", ["a", " ==", " b", "  "]),
    ],
)
def test_pieces(text, pieces):
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


# The mix


def test_spoken_sentences_are_those_of_requests_in_lower_case():
    assert list(spoken_sentences(["The sea is near. You’ll see it! Is it deep?\nIt rises."])) == [
        "you'll see it!",
        "is it deep?",
    ]


def test_the_mix_holds_prose_once_spoken_sentences_often_and_code_one_and_a_half_times():
    counts = Counter(training_mix(["Where is it?"], ["a = 1", "b = 2"]))
    assert counts == {"Where is it?": 1, "where is it?": SPOKEN_WEIGHT, "a = 1": 2, "b = 2": 1}


# Training


def test_a_vocabulary_has_the_size_asked_for_and_special_tokens_first():
    tokenizer = train_tokenizer(PROSE, CODE, vocab_size=300)
    assert type(tokenizer) is GroupFormerTokenizer
    assert len(tokenizer) == 300
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4, 5]) == list(SPECIAL_TOKENS)


def test_training_twice_gives_the_same_tokenizer():
    first, second = (train_tokenizer(PROSE, CODE, vocab_size=320).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_any_text_comes_back_from_a_tokenizer_that_never_saw_its_like():
    tokenizer = train_tokenizer(PROSE, [], vocab_size=280)
    text = "漢字 \x00 👨‍👩‍👧 \t\r\n 12"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_shipped_file_has_the_pieces_of_the_code():
    """Cheap half of the proof that the defaults give the shipped file; the slow test below is the other."""
    shipped = GroupFormerTokenizer().backend_tokenizer
    trained = train_tokenizer(PROSE, CODE, vocab_size=270).backend_tokenizer
    shipped, trained = json.loads(shipped.to_str()), json.loads(trained.to_str())
    for part in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert shipped[part] == trained[part]


@needs_data
@pytest.mark.slow
def test_the_defaults_give_the_shipped_file_byte_for_byte(tmp_path):
    prose = read_column([DATA / "textbooks" / "train-*.parquet"])
    code = read_column([DATA / "code" / "train.parquet"])
    train_tokenizer(prose, code).backend_tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=False)
    assert (tmp_path / "tokenizer.json").read_bytes() == SHIPPED_VOCABULARY.read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vocab_size": 261}, r"vocab_size \(261\) must hold bytes and special tokens; choose at least 262"),
        ({"vocab_size": 9999}, r"vocab_size \(9999\) is more than the texts fill \(\d+ tokens\); give more text"),
        ({"prose": [], "code": []}, r"is more than the texts fill \(262 tokens\)"),
        ({"prose": ["a", None]}, r"prose\[1\] \(None\) is not a text; leave such rows out"),
        ({"code": "a = 1"}, r"code \('a = 1'\) is a single text; give a list of texts"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(**{"prose": PROSE, "code": CODE, "vocab_size": 300, **arguments})


# Measuring


def test_bytes_per_token_of_each_list_of_texts():
    tokenizer = train_tokenizer(PROSE, CODE, vocab_size=262)  # bytes alone
    rows = evaluate_tokenizer(tokenizer, {"ascii": ["abc", "de"], "greek": ["Ω"]})
    assert rows == {
        "ascii": {"bytes": 5, "tokens": 5, "bytes_per_token": 1.0},
        "greek": {"bytes": 2, "tokens": 2, "bytes_per_token": 1.0},
    }


def test_begin_and_end_tokens_do_not_count():
    tokenizer = GroupFormerTokenizer(add_bos_token=True, add_eos_token=True)
    assert evaluate_tokenizer(tokenizer, {"one": ["a"]})["one"]["tokens"] == 1


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_measure_is_refused_by_name(texts):
    with pytest.raises(ValueError, match=r"texts\['empty'\] is empty"):
        evaluate_tokenizer(GroupFormerTokenizer(), {"empty": texts})


# How many tokens GPT-2's own tokenizer makes of each file, and what share of its bytes per token is to be beaten.
TARGETS = [("textbooks/test-*.parquet", 226062, 0.98), ("clinc150/test.parquet", 49840, 0.93)]


@needs_data
@pytest.mark.parametrize("file, gpt2_tokens, target", TARGETS)
def test_it_compresses_nearly_as_well_as_a_vocabulary_three_times_its_size(file, gpt2_tokens, target):
    rows = evaluate_tokenizer(GroupFormerTokenizer(), {file: read_column([DATA / file])})
    assert gpt2_tokens / rows[file]["tokens"] > target


# The commands


def test_the_commands_train_and_measure(tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE[0])
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": CODE[0]}))
    files = {name: str(tmp_path / name) for name in ("prose.txt", "code.jsonl", "tokenizer")}
    options = ["--prose", files["prose.txt"], "--code", files["code.jsonl"], "--output", files["tokenizer"]]
    done = CliRunner().invoke(app, ["tokenizer", "train", *options, "--vocab-size", "280"])
    assert done.exit_code == 0, done.output
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 280
    options = ["--tokenizer", files["tokenizer"], "--baseline", files["tokenizer"], "--json"]
    done = CliRunner().invoke(app, ["tokenizer", "eval", files["prose.txt"], *options])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)[files["prose.txt"]]
    assert row["bytes"] == len(PROSE[0])
    assert row["ratio_to_baseline"] == 1
