"""A regrouped native model is the native class: PEFT and TRL train it as they train any Llama."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

import groupformer
from groupformer import GroupFormerTokenizer

from .helpers import random_ids
from .helpers_families import native_model


@pytest.fixture
def regrouped(tmp_path) -> LlamaForCausalLM:
    """A Llama with 1 KV head instead of 2, as its folder gives it."""
    tokenizer = GroupFormerTokenizer()
    llama = native_model("llama", "grouped queries", vocab_size=len(tokenizer))
    groupformer.regroup(llama, 1).save_pretrained(tmp_path / "small")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert model.config.num_key_value_heads == 1
    return model


def test_lora_learns_merges_and_is_saved(regrouped, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = random_ids(4, 12)
    adapted = get_peft_model(regrouped, LoraConfig(task_type="CAUSAL_LM", r=4))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(8):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(ids).logits
        base = LlamaForCausalLM.from_pretrained(tmp_path / "small")
        merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(ids).logits, merged(ids).logits)
    assert again.config.regrouping[0]["to"] == 1


def test_trl_fine_tunes_it(regrouped, tmp_path):
    from trl import SFTConfig, SFTTrainer

    before = {name: tensor.clone() for name, tensor in regrouped.state_dict().items()}
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    rows = Dataset.from_dict({"input_ids": random_ids(4, 12).tolist()})
    trainer = SFTTrainer(model=regrouped, args=arguments, train_dataset=rows, processing_class=GroupFormerTokenizer())
    trainer.train()
    changed = {name for name, tensor in regrouped.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "model.layers.0.self_attn.k_proj.weight" in changed
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["train_loss"]))
