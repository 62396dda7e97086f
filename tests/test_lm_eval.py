"""lm-evaluation-harness on a GroupFormer; it needs the packages that `make test-serving` brings."""

import json

import pytest
import torch

from groupformer import GroupFormerForCausalLM, GroupFormerTokenizer

from .helpers import randomize, tiny_config


QUESTIONS = [
    {"question": "The ferry crosses the", "choices": [" river", " sum of two coins", " loan"], "gold": 0},
    {"question": "The clerk counts the", "choices": [" heron", " coins", " cold water"], "gold": 1},
    {"question": "Rain fills the", "choices": [" village clerk", " week", " river"], "gold": 2},
    {"question": "Two coins pay for a", "choices": [" perch and an eel", " loan", " bank"], "gold": 1},
]
TASK = """
task: riverside
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

pytestmark = pytest.mark.slow


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Of a continuation after its context, in transformers' own terms."""
    start = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    log_probabilities = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
    return log_probabilities.gather(1, ids[0, start:, None]).sum().item()


def test_the_harness_gives_the_numbers_of_transformers_own_loop(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "riverside.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    tokenizer = GroupFormerTokenizer()
    model = randomize(GroupFormerForCausalLM(tiny_config(vocab_size=16384, bos_token_id=0, eos_token_id=1))).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        tasks=["riverside"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        log_samples=True,
        bootstrap_iters=0,
    )

    expected = [[log_likelihood(model, tokenizer, row["question"], it) for it in row["choices"]] for row in QUESTIONS]
    samples = sorted(results["samples"]["riverside"], key=lambda sample: sample["doc_id"])
    found = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    chosen = torch.tensor(expected).argmax(-1)
    accuracy = (chosen == torch.tensor([row["gold"] for row in QUESTIONS])).float().mean().item()
    assert results["results"]["riverside"]["acc,none"] == accuracy
