"""Regrouping the reference checkpoint, a really trained model: the order of the methods, on text that ships."""

from pathlib import Path

import pytest
import torch

import groupformer
from groupformer import GroupFormerForCausalLM
from groupformer.evaluation import evaluate
from groupformer.regrouping.moments import calibration_from_texts


ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "hub_card"
TEXT = (ROOT / "groupformer" / "samples" / "river.txt").read_text(encoding="utf-8")
MIDDLE = TEXT.index("\n", len(TEXT) // 2)  # the first half calibrates, the second is scored

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REFERENCE / "model.safetensors").exists(), reason="hub_card/ holds no checkpoint yet"),
]


@pytest.fixture(scope="module")
def losses():
    """Nats per token lost by each method, for 4, 2 and 1 of 8 key-value heads."""
    tokenizer = groupformer.GroupFormerTokenizer()
    model = GroupFormerForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    calibration = calibration_from_texts([TEXT[:MIDDLE]], tokenizer, model.config)

    def loss(scored):
        return evaluate(scored, tokenizer, [TEXT[MIDDLE:]], window=512)["loss"]

    start = loss(model)
    lost = {}
    for count in (4, 2, 1):
        for method in ("random", "first", "mean"):
            lost[count, method] = loss(groupformer.regroup(model, count, method=method)) - start
        best = groupformer.regroup(model, count, method="svd", grouping="similar", calibration=calibration)
        lost[count, "svd"] = loss(best) - start
    return lost


@pytest.mark.parametrize("count", [4, 2, 1])
def test_methods_lose_in_the_papers_order(losses, count):
    assert losses[count, "mean"] < losses[count, "first"] < losses[count, "random"]


@pytest.mark.parametrize("count", [4, 2, 1])
def test_svd_loses_at_most_a_quarter_of_what_the_mean_loses(losses, count):
    assert losses[count, "svd"] <= losses[count, "mean"] / 4
