"""A needle in a haystack: can a checkpoint with fewer KV heads, or a 4-bit cache, still find a number far back?

    python -m benchmarks.needle ../data/textbooks SmolLM2-135M-Instruct runs/smollm2-1 --contexts 1024 2048 4096
    pip install hqq && python -m benchmarks.needle ../data/textbooks SmolLM2-135M-Instruct --cache-bits 4

A pass key of five digits (Mohtashami and Jaggi 2023, arXiv 2305.16300, section 4.2) stands between the sentences of
test documents, at depths spread over the context; the prompt ends by asking for it. The score is the share of prompts
after which greedy decoding gives all its digits. `--cache-bits` keeps all but the last 64 tokens in transformers'
quantized cache, by hqq. Models are read in bfloat16 where the machine multiplies faster in it.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupformer.commands.tables import print_table
from groupformer.conversion.loading import best_device, has_fast_bf16
from groupformer.training.data import read_column


NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"


def prompts(text_ids: list[int], tokenizer: Any, context: int, count: int) -> list[tuple[torch.Tensor, list[int]]]:
    """Prompts (1, context) and the token ids of each answer; depths are spread from the beginning to the end."""
    generator = random.Random(0)
    found = []
    for index in range(count):
        key = str(generator.randint(10_000, 99_999))
        needle, question, answer = (
            tokenizer(part, add_special_tokens=False).input_ids
            for part in (NEEDLE.format(key=key), QUESTION, f" {key}")
        )
        size = context - len(needle) - len(question) - len(answer)
        start = generator.randrange(len(text_ids) - size)
        hay, depth = text_ids[start : start + size], round(size * (index + 0.5) / count)
        found.append((torch.tensor([[*hay[:depth], *needle, *hay[depth:], *question]]), answer))
    return found


@torch.no_grad()
def found_share(model: Any, cases: list[tuple[torch.Tensor, list[int]]], cache_bits: int | None) -> float:
    """Share of the prompts after which greedy decoding gives the answer."""
    cache: dict[str, Any] = {}
    if cache_bits is not None:
        cache_config = {"backend": "hqq", "nbits": cache_bits, "residual_length": 64}
        cache = {"cache_implementation": "quantized", "cache_config": cache_config}
    found = 0
    for prompt, answer in cases:
        prompt = prompt.to(model.device)
        output = model.generate(
            prompt, max_new_tokens=len(answer), min_new_tokens=len(answer), do_sample=False, **cache
        )
        found += output[0, prompt.shape[1] :].tolist() == answer
    return found / len(cases)


def needle(
    checkpoint: str | Path, tokenizer: Any, text_ids: list[int], contexts: list[int], count: int, bits: int | None
) -> dict[int, float]:
    """Percent found at each context."""
    device = best_device(None)
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    return {size: 100 * found_share(model, prompts(text_ids, tokenizer, size, count), bits) for size in contexts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Folder with test-*.parquet.")
    parser.add_argument("checkpoints", nargs="+", help="All with the first one's tokenizer.")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--prompts", type=int, default=20, help="For each context.")
    parser.add_argument("--cache-bits", type=int, choices=(2, 4, 8))
    parser.add_argument("--output", type=Path, help="JSON to write.")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoints[0])
    text = " ".join(read_column([options.data / "test-*.parquet"])[:40])
    text_ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = [
        (name, needle(name, tokenizer, text_ids, options.contexts, options.prompts, options.cache_bits))
        for name in options.checkpoints
    ]
    columns = ["checkpoint", *(f"{context:,}" for context in options.contexts)]
    print_table("% found", columns, [[Path(name).name, *(f"{v:.0f}" for v in found.values())] for name, found in rows])
    if options.output:
        options.output.write_text(json.dumps(dict(rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
