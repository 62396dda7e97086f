"""Training: packing, pre-training, fine-tuning, and the tools that its users bring along."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    pipeline,
)

from groupformer import GroupFormerForCausalLM, GroupFormerForSequenceClassification, GroupFormerTokenizer
from groupformer.training.data import collate_flat, expand, load_files, pack, read_column
from groupformer.training.finetuning import FinetuneRecipe, finetune
from groupformer.training.pretraining import PretrainRecipe, pretrain
from groupformer.training.run import SaveOnInterrupt, prepare_output

from .flash_stand_in import flash_attention_on_cpu  # noqa: F401
from .helpers import randomize, tiny_config


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SENTENCES = [
    ("the ferry crosses the river in the morning", "river"),
    ("a perch and an eel swim in the cold water", "river"),
    ("the heron waits near the reeds of the bank", "river"),
    ("rain fills the river and the ferry stops", "river"),
    ("she counts the coins and writes down the sum", "money"),
    ("the clerk keeps the coins of the village", "money"),
    ("two coins pay for a loan of one week", "money"),
    ("he saves a coin every day in the bank", "money"),
]
TAGGED = [
    (["Tobias", "Wren", "lives", "in", "Harrow"], ["B-PER", "I-PER", "O", "O", "B-LOC"]),
    (["Marta", "Bell", "keeps", "the", "inn"], ["B-PER", "I-PER", "O", "O", "O"]),
    (["Harrow", "lies", "near", "Ister"], ["B-LOC", "O", "O", "B-LOC"]),
    (["Ida", "Crane", "teaches", "in", "Harrow"], ["B-PER", "I-PER", "O", "O", "B-LOC"]),
]


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [str(path)]


@pytest.fixture
def sentences(tmp_path):
    return write_rows(tmp_path / "sentences.jsonl", [{"text": text, "label": label} for text, label in SENTENCES])


@pytest.fixture
def tagged(tmp_path):
    return write_rows(tmp_path / "tagged.jsonl", [{"tokens": words, "tags": tags} for words, tags in TAGGED])


def tiny_pretraining(tmp_path, **options):
    text = tmp_path / "text.jsonl"
    if not text.exists():
        write_rows(text, [{"text": text} for text, _ in SENTENCES * 4])
    fields = {"model": TINY, "train_files": [str(text)], "row_length": 16, "max_steps": 6, "batch_size": 2}
    return PretrainRecipe(**{**fields, "save_steps": 2, "logging_steps": 1, "eval_steps": 3, **options})


def losses(folder):
    return {
        row["step"]: row["loss"] for row in json.loads((folder / "results.json").read_text())["log"] if "loss" in row
    }


# Packing -------------------------------------------------------------------------------------------------------------


def test_packed_rows_are_full_and_positions_start_again_with_each_document():
    rows = list(pack([[1, 2, 3], [4, 5, 6, 7, 8], [9, 9]], row_length=4))
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert [row["labels"] for row in rows] == [[-100, 2, 3, -100], [-100, 6, 7, 8]]


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_a_packed_row_has_the_loss_of_its_documents_apart(position):
    model = randomize(GroupFormerForCausalLM(tiny_config(position_embedding_type=position)))
    documents = [[5, 6, 7, 8, 9], [11, 12, 13, 14]]
    row = next(pack(documents, row_length=9))
    together = model(**{name: torch.tensor([value]) for name, value in row.items()}, use_cache=False).loss
    apart = [model(torch.tensor([doc]), labels=torch.tensor([doc])).loss * (len(doc) - 1) for doc in documents]
    torch.testing.assert_close(together, sum(apart) / 7)


def test_flat_batches_keep_documents_apart_under_flash_attention(flash_attention_on_cpu):  # noqa: F811
    model = randomize(GroupFormerForCausalLM(tiny_config()))
    rows = list(pack([[5, 6, 7, 8, 9], [11, 12, 13], [14, 15, 16, 17]], row_length=6))
    expected = [model(**{name: torch.tensor([row[name]]) for name in row}, use_cache=False).loss for row in rows]
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    model.set_attn_implementation("flash_attention_2")
    batch = collate_flat(rows)
    assert batch["input_ids"].shape == (1, 12)
    flat = model(**batch, use_cache=False).loss
    torch.testing.assert_close(flat, sum(loss * count for loss, count in zip(expected, counts)) / sum(counts))


# Pre-training --------------------------------------------------------------------------------------------------------


def test_pretraining_learns_saves_and_loads(tmp_path):
    results = pretrain(tiny_pretraining(tmp_path, max_steps=30, learning_rate=1e-2), tmp_path / "run")
    log = losses(tmp_path / "run")
    assert log[30] < log[1] - 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert type(model) is GroupFormerForCausalLM and type(tokenizer) is GroupFormerTokenizer
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert results["tokens"] == 30 * 2 * 16


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(tmp_path):
    pretrain(tiny_pretraining(tmp_path), tmp_path / "whole")
    output = tmp_path / "cut"
    pretrain(tiny_pretraining(tmp_path), output, keep_checkpoints=True)
    (output / "checkpoint-6" / "trainer_state.json").unlink()  # as if the run had been killed while it was saved
    pretrain(tiny_pretraining(tmp_path), output, resume=True)
    assert losses(output) == losses(tmp_path / "whole")


def test_a_finished_run_keeps_its_model_alone_and_says_that_nothing_is_left_to_resume(tmp_path):
    pretrain(tiny_pretraining(tmp_path), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(ValueError, match="holds a finished run without checkpoints.*pass --keep-checkpoints"):
        pretrain(tiny_pretraining(tmp_path, max_steps=9), tmp_path / "run", resume=True)


INTERRUPTED = """
import json, sys
from groupformer.training.pretraining import PretrainRecipe, pretrain
pretrain(PretrainRecipe(**json.loads(sys.argv[1])), sys.argv[2])
"""


def test_ctrl_c_before_the_first_step_has_ended_stops_at_once(tmp_path):
    callback = SaveOnInterrupt()
    with pytest.raises(KeyboardInterrupt):
        callback.handle(2, None)
    state, control = TrainerState(epoch=0.5), TrainerControl()
    callback.on_step_end(None, state, control)
    callback.handle(2, None)  # waits for the step to end, and for its checkpoint
    assert callback.on_step_end(None, state, control).should_save
    with pytest.raises(KeyboardInterrupt):
        callback.on_save(None, state, control)


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_loss(tmp_path):
    recipe = tiny_pretraining(tmp_path, max_steps=300, save_steps=1000)
    pretrain(recipe, tmp_path / "whole")
    fields = json.dumps(vars(recipe))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, fields, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:  # the first logged step: training is under way
        if "loss" in line:
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    checkpoints = list((tmp_path / "cut").glob("checkpoint-*"))
    assert len(checkpoints) == 1 and process.returncode != 0
    assert int(checkpoints[0].name.split("-")[1]) < 300
    pretrain(recipe, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut")[300] == losses(tmp_path / "whole")[300]


def test_streamed_data_trains_too(tmp_path):
    results = pretrain(tiny_pretraining(tmp_path, streaming=True), tmp_path / "run")
    assert results["steps"] == 6


BAD_RECIPES = [
    ({"row_length": 0}, "row_length (0) must be at least 1"),
    ({"train_files": []}, "train_files or dataset must be given, and not both"),
    ({"train_files": ["nowhere.parquet"]}, "file (nowhere.parquet) is not there"),
    ({"text_column": "body"}, "column ('body') is not in the data; choose from text"),
    ({"model": {**TINY, "num_key_value_heads": 3}}, "num_key_value_heads (3); choose 1, 2 or 4"),
    ({"model": {**TINY, "position_embedding_type": "learned", "max_position_embeddings": 8}}, "row_length (16) is longer than max_position_embeddings (8)"),  # noqa: E501
    ({"model": {**TINY, "vocab_size": 100}}, "vocab_size (100) is below the tokenizer's 16384 tokens"),
    ({"row_length": 100_000}, "row_length (100000) is longer than all the training text"),
]  # fmt: skip


@pytest.mark.parametrize("options,message", BAD_RECIPES)
def test_a_bad_recipe_is_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(Exception) as error:
        pretrain(tiny_pretraining(tmp_path, **options), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_file_with_an_unknown_field_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lerning_rate: 1.0")
    with pytest.raises(ValueError, match=r"unknown fields \(lerning_rate\); choose from model"):
        PretrainRecipe.from_file(tmp_path / "recipe.yaml")


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not empty; choose another folder, or pass --resume or --overwrite"):
        pretrain(tiny_pretraining(tmp_path), tmp_path / "run")
    assert (tmp_path / "run" / "precious.txt").read_text() == "keep me"


# Fine-tuning ---------------------------------------------------------------------------------------------------------


def recipe(task, files, **options):
    fields = {"config": TINY, "epochs": 12, "batch_size": 4, "learning_rate": 1e-2}
    return FinetuneRecipe(**{"task": task, "train_files": files, "validation_files": files, **fields, **options})


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_classifier_learns_its_sentences_and_answers_in_a_pipeline(sentences, bidirectional, tmp_path):
    options = {"bidirectional": bidirectional, "test_files": sentences}
    results = finetune(recipe("sequence-classification", sentences, **options), tmp_path / "run")
    assert results["validation_accuracy"] == results["test_accuracy"] == results["test_macro_f1"] == 1.0
    classify = pipeline("text-classification", model=str(tmp_path / "run"))
    assert classify([text for text, _ in SENTENCES], batch_size=4)[0]["label"] == "river"
    assert classify(SENTENCES[-1][0])[0]["label"] == "money"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_tagger_learns_its_entities_and_answers_in_a_pipeline(tagged, bidirectional, tmp_path):
    results = finetune(
        recipe("token-classification", tagged, epochs=40, bidirectional=bidirectional), tmp_path / "run"
    )
    assert results["validation_entity_f1"] == 1.0
    tag = pipeline("token-classification", model=str(tmp_path / "run"), aggregation_strategy="max")
    entities = tag("Tobias Wren lives in Harrow")
    assert [entity["entity_group"] for entity in entities] == ["PER", "LOC"]
    assert entities[0]["word"].strip() == "Tobias Wren"


def test_a_language_model_is_tuned_and_generates_in_a_pipeline(sentences, tmp_path):
    options = {"max_length": 16, "validation_files": sentences}
    results = finetune(recipe("causal-lm", sentences, **options), tmp_path / "run")
    assert results["validation_loss"] < 8
    generate = pipeline("text-generation", model=str(tmp_path / "run"))
    assert generate("the ferry", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("the ferry")


def test_lora_trains_few_weights_and_is_merged_on_request(sentences, tmp_path):
    plan = recipe("sequence-classification", sentences, lora=True, merge=True, learning_rate=5e-2)
    results = finetune(plan, tmp_path / "run")
    assert results["trained_parameters"] < results["parameters"] / 10
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert type(model) is GroupFormerForSequenceClassification
    assert model.config.id2label == {0: "money", 1: "river"}


def test_words_are_scored_where_they_are_known(tmp_path):
    from groupformer.training.tasks import TokenClassificationTask

    word_ids = [0, 0, 1, 2, 2, 2]
    tasks = {
        causal: TokenClassificationTask(GroupFormerTokenizer(), "tokens", "tags", None, causal=causal)
        for causal in (True, False)
    }
    assert tasks[True].scored(word_ids) == [False, True, True, False, False, True]
    assert tasks[False].scored(word_ids) == [True, False, True, True, False, False]


def bad_rows(tmp_path, rows):
    return write_rows(tmp_path / "bad.jsonl", rows)


def test_a_label_that_training_never_saw_is_refused(sentences, tmp_path):
    unseen = bad_rows(tmp_path, [{"text": "a", "label": "sky"}])
    with pytest.raises(ValueError, match=r"validation has labels that are not in the training data \(sky\)"):
        finetune(recipe("sequence-classification", sentences, validation_files=unseen), tmp_path / "run")


def test_bad_fine_tuning_input_is_refused(sentences, tagged, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    uneven = bad_rows(tmp_path, [{"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": ["a"], "tags": ["B-PER"]}])
    cases = [
        ({"task": "translation"}, "task ('translation') is unknown; choose from causal-lm"),
        ({"train_files": [str(empty)]}, "is empty; give one with at least one row"),
        ({"text_column": "body"}, "column ('body') is not in the data; choose from text, label"),
        ({"label_column": "tag"}, "column ('tag') is not in the data"),
        (
            {"train_files": tagged},
            "no column named text or sentence or utterance; pass --text-column with one of: tokens, tags",
        ),
        ({"merge": True}, "merge (True) needs lora=True"),
        ({"task": "causal-lm", "bidirectional": True}, "bidirectional (True) would let causal-lm see"),
        (
            {"task": "token-classification", "train_files": uneven, "validation_files": uneven},
            "has 2 words but 1 tags",
        ),
        (
            {"config": {**TINY, "position_embedding_type": "learned", "max_position_embeddings": 4}},
            "is all that position_embedding_type='learned' has; pass a max_length",
        ),
    ]
    for options, message in cases:
        with pytest.raises(ValueError) as error:
            options = {"validation_files": [], **options}
            finetune(recipe(options.pop("task", "sequence-classification"), sentences, **options), tmp_path / "run")
        assert message in str(error.value), str(error.value)
        assert not (tmp_path / "run").exists()


# The tools that users bring ------------------------------------------------------------------------------------------


def test_a_plain_trainer_script_works(tmp_path):
    tokenizer = GroupFormerTokenizer()
    model = GroupFormerForSequenceClassification(tiny_config(vocab_size=16384, pad_token_id=2, num_labels=2))
    rows = [{**tokenizer(text), "label": int(label == "money")} for text, label in SENTENCES]
    arguments = TrainingArguments(str(tmp_path), max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    predictions = trainer.predict(rows).predictions.argmax(-1)
    assert predictions.tolist() == [row["label"] for row in rows]


def test_trls_sft_trainer_works_on_conversations(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}
        for text, label in SENTENCES
    ]
    tokenizer = GroupFormerTokenizer()
    model = GroupFormerForCausalLM(
        tiny_config(vocab_size=16384, bos_token_id=0, eos_token_id=1, pad_token_id=2, max_position_embeddings=128)
    )
    config = SFTConfig(
        str(tmp_path),
        max_steps=12,
        learning_rate=2e-2,
        assistant_only_loss=True,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(model, args=config, train_dataset=Dataset.from_list(turns), processing_class=tokenizer)
    trainer.train()
    steps = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert steps[-1] < steps[0] / 2


def test_heads_of_every_task_share_one_auto_api(tmp_path):
    randomize(GroupFormerForCausalLM(tiny_config())).save_pretrained(tmp_path)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.score.out_features == 5


@pytest.mark.slow
def test_trls_dpo_trainer_widens_the_margin_of_what_is_preferred(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    labels = {"river": "money", "money": "river"}
    pairs = [{"prompt": text, "chosen": f" {label}", "rejected": f" {labels[label]}"} for text, label in SENTENCES]
    start = GroupFormerForCausalLM(
        tiny_config(vocab_size=16384, bos_token_id=0, eos_token_id=1, pad_token_id=2, max_position_embeddings=128)
    )
    start.save_pretrained(tmp_path / "start")  # TRL loads its reference model from there
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    config = DPOConfig(
        str(tmp_path / "run"),
        max_steps=20,
        learning_rate=5e-3,
        per_device_train_batch_size=len(pairs),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=GroupFormerTokenizer()
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[-1] > 0.2
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    input_ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids).logits, trainer.model.eval()(input_ids).logits, atol=0, rtol=0)


# Files ---------------------------------------------------------------------------------------------------------------


def test_patterns_may_stand_in_any_part_of_a_path(tmp_path):
    for name in ("b/1/text.txt", "a/2/text.txt", "a/text.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert expand([tmp_path / "*" / "*" / "text.txt"]) == [tmp_path / "a/2/text.txt", tmp_path / "b/1/text.txt"]
    assert len(expand([tmp_path / "**" / "*.txt"])) == 3
    with pytest.raises(ValueError, match="is not there"):
        expand([tmp_path / "*"])  # folders alone


def test_brackets_in_a_folders_name_are_taken_as_they_are(tmp_path):
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "text.txt").write_text("text")
    assert expand([tmp_path / "set[1]" / "*.txt"]) == [tmp_path / "set[1]" / "text.txt"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "one"}, {"text": None}], "column ('text') has rows without text; remove them"),
        ([{"text": 1}, {"text": 2}], "not text; choose a column of text"),
    ],
    ids=["null", "numbers"],
)
def test_a_column_that_is_not_all_text_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError) as refusal:
        read_column(write_rows(tmp_path / "rows.jsonl", rows))
    assert message in str(refusal.value)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_an_output_that_is_the_model_to_start_from_is_refused(tmp_path, options):
    (tmp_path / "config.json").write_text("{}")
    flags = {"resume": False, "overwrite": False, **options}
    with pytest.raises(ValueError, match="is, or lies inside, .*, which is read; choose another folder"):
        prepare_output(tmp_path, inputs=[str(tmp_path)], **flags)
    prepare_output(tmp_path / "tuned", inputs=[str(tmp_path)], **flags)  # loses nothing


@pytest.mark.parametrize("text", ["a\r\nb\rc", "\ufeffa mark of order\n\n", "é\x0b\x85z\n"])
def test_text_files_are_read_as_datasets_reads_them_and_without_it(text, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    expected = list(load_files([path])["text"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_column([path]) == expected


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"\xff\xfe", "cannot be read: 'utf-8'")])
def test_a_text_file_that_is_none_is_refused(content, message, tmp_path):
    (tmp_path / "text.md").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_column([tmp_path / "text.md"])
