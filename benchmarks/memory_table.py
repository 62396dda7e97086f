"""Writes docs/memory.md: what the KV cache of well-known shapes costs, and regrouping them, from 100M to 70B.

    python benchmarks/memory_table.py

Each row is what `groupformer plan --config FILE` says of the same config; no weights are needed, and none are read.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from groupformer.measuring.planning import Hardware, plan
from groupformer.regrouping.costs import Sizes, regrouping_steps


PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
CONTEXT = 8192
MEMORY = 80e9

# Public shapes, as their config.json files give them: model type, then hidden size, layers, heads, KV heads, MLP,
# vocabulary.
CONFIGS: dict[str, tuple] = {
    "GPT-2 small": ("gpt2", 768, 12, 12, 12, 3072, 50257),
    "SmolLM2 135M": ("llama", 576, 30, 9, 3, 1536, 49152),
    "Pythia 1.4B": ("gpt_neox", 2048, 24, 16, 16, 8192, 50304),
    "SmolLM2 1.7B": ("llama", 2048, 24, 32, 32, 8192, 49152),
    "Llama 2 7B": ("llama", 4096, 32, 32, 32, 11008, 32000),
    "Llama 3 8B": ("llama", 4096, 32, 32, 8, 14336, 128256),
    "Llama 2 13B": ("llama", 5120, 40, 40, 40, 13824, 32000),
    "Llama 3 70B": ("llama", 8192, 80, 64, 8, 28672, 128256),
}
TIED = ("SmolLM2 135M", "SmolLM2 1.7B")

HEAD = f"""# Memory

What the KV cache costs at each number of KV heads, as `groupformer plan` computes it from the config alone: two times
`head_dim` numbers for each KV head, layer and token. bfloat16 throughout; the cache is that of one sequence of
{CONTEXT:,} tokens, and the last column counts how many of them fit beside the weights into {MEMORY / 1e9:.0f} GB. The
**bold** row is the model as it was published; the others are what [regroup](regroup.md) can make of it. GPT-2's own
positions end at 1,024 tokens: its rows show the shape.

```bash
groupformer plan meta-llama/Llama-2-7b-hf --context {CONTEXT} --gpu-memory {MEMORY / 1e9:.0f}
python benchmarks/memory_table.py    # writes this page
```

Engines allot the cache in blocks, and a layer with a window holds the chunk of a prompt that is read beside it:
`--block-size` and `--prefill-chunk` count so. With vLLM's numbers `plan` gives the sequences that vLLM 0.32 reports,
exactly for a Llama, a Qwen 3, a Mixtral, a Gemma 3 with windows, counts by layer and an eight-bit cache
(`tests/test_vllm_plan.py`).

| model | KV heads | weights | cache a token | cache, {CONTEXT:,} tokens | sequences in {MEMORY / 1e9:.0f} GB |
| --- | --- | --- | --- | --- | --- |
"""


HEALED_TOKENS = 196_608
COSTS_HEAD = f"""
## What regrouping needs
On paper, with {HEALED_TOKENS:,} tokens of text in rows of 512 and the default recipe: the most memory of each step
beside torch itself (about half a gigabyte), and the floating point operations of the steps that take long. 1 PFLOP, or
10^15 of them, is four seconds of a GPU that does 250 TFLOP a second, and under three hours of a CPU core at the 100
GFLOP a second that healing SmolLM2-135M reached (by AMX). `groupformer/regrouping/costs.py` has the arithmetic;
`tests/test_costs.py` runs each step but the last one and finds its memory within 30 %.

| model | weights | merged by the norms | merged by text | healed layer by layer | healed together | uptrained |
| --- | --- | --- | --- | --- | --- | --- |
"""


def config_of(shape: tuple, tied: bool = False) -> PreTrainedConfig:
    """The transformers config of a row of CONFIGS."""
    model_type, hidden, layers, heads, kv_heads, intermediate, vocabulary = shape
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }
    if model_type != "gpt2":  # GPT-2's MLP is four times its width
        fields["intermediate_size"] = intermediate
    if model_type == "llama":
        fields |= {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    return AutoConfig.for_model(model_type, **fields)


def page() -> str:
    """The whole page."""
    lines = []
    for name, shape in CONFIGS.items():
        for row in plan(config_of(shape, name in TIED), CONTEXT, 1, Hardware(memory=MEMORY)):
            cells = [
                name,
                row.kv_heads,
                f"{row.weights / 1e9:.2f} GB",
                f"{row.bytes_per_token / 1024:,.0f} KiB",
                f"{row.cache / 1e9:.2f} GB",
                f"{row.sequences:,}",
            ]
            lines.append("| " + " | ".join(f"**{cell}**" if row.is_present else str(cell) for cell in cells) + " |\n")
    return HEAD + "".join(lines) + COSTS_HEAD + "".join(cost_row(name) for name in CONFIGS)


def cost_row(name: str) -> str:
    """What regrouping a shape needs."""
    sizes = Sizes.of(config_of(CONFIGS[name], name in TIED))
    cells = [name, f"{2 * sizes.model / 1e9:.2f} GB"]
    for step in regrouping_steps(sizes, HEALED_TOKENS).values():
        count = step.operations / 1e15
        operations = f", {count:,.{2 if count < 1 else 1 if count < 10 else 0}f} PFLOP" if count else ""
        cells.append(f"{step.memory / 1e9:,.1f} GB{operations}")
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
