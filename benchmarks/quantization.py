"""What quantized weights and a quantized KV cache cost: bits per byte, and decoding speed beside float32.

    python benchmarks/quantization.py [--checkpoint hub_card] [--file TEXT]

Prints a Markdown table. What needs a package that is not installed is left out, by name.
"""

import argparse
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, QuantizedCache, TorchAoConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from groupformer import GroupFormerForCausalLM
from groupformer.measuring.evaluation import evaluate
from groupformer.measuring.speed import measure


ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "groupformer" / "samples" / "river.txt"
CHUNK = 32


class WithQuantizedCache:
    """A model whose tokens always go through a quantized cache, also where its text is only scored.

    Scored text comes in chunks: a token sees those of its own chunk as they are and all earlier ones quantized.
    """

    def __init__(self, model: Any, **options: Any):
        self.model, self.options = model, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = True, past_key_values=None, **options: Any) -> Any:
        if past_key_values is None:
            past_key_values = QuantizedCache(config=self.model.config, **self.options)
        if use_cache:
            return self.model(input_ids, past_key_values=past_key_values, use_cache=True, **options)
        chunks = input_ids.split(CHUNK, dim=1)
        logits = [self.model(chunk, past_key_values=past_key_values, use_cache=True).logits for chunk in chunks]
        return CausalLMOutputWithPast(logits=torch.cat(logits, 1))


def hqq_cache(model: Any, bits: int) -> WithQuantizedCache:
    """The model with a cache by hqq, whose residual is one chunk: longer ones keep that many of the last tokens."""
    return WithQuantizedCache(model, backend="hqq", nbits=bits, residual_length=CHUNK, axis_key=1, axis_value=1)


def variants(load: Callable[..., Any]) -> dict[str, tuple[str | None, Callable[[], Any]]]:
    """By name: the package that is needed, and what makes the model."""

    def torchao_int8() -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))

    return {
        "float32": (None, load),
        "bfloat16": (None, lambda: load(dtype=torch.bfloat16)),
        "torchao int8 weights": ("torchao", torchao_int8),
        "bitsandbytes int8 weights": (
            "bitsandbytes",
            lambda: load(quantization_config=BitsAndBytesConfig(load_in_8bit=True)),
        ),
        "fp8 cache": (None, lambda: WithQuantizedCache(load(), backend="fp8")),
        "hqq 8-bit cache": ("hqq", lambda: hqq_cache(load(), 8)),
        "hqq 4-bit cache": ("hqq", lambda: hqq_cache(load(), 4)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "hub_card"))
    parser.add_argument("--file", type=Path, help="text to score; default: the second half of the shipped sample")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its float16 at every product
    if arguments.file:
        text = arguments.file.read_text(encoding="utf-8")
    else:
        text = SAMPLE.read_text(encoding="utf-8")
        text = text[len(text) // 2 :]

    def load(**options: Any) -> Any:
        return GroupFormerForCausalLM.from_pretrained(arguments.checkpoint, **{"dtype": torch.float32, **options})

    models = {}
    for name, (package, make) in variants(load).items():
        if package and find_spec(package) is None:
            print(f"left out: {name} (needs {package})")
        else:
            models[name] = make()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    # One window at a time: rows of padding would be in the caches too.
    bits = {name: evaluate(model, tokenizer, [text], batch_size=1) for name, model in models.items()}
    rows = measure(models, context=arguments.context, new_tokens=24, rounds=arguments.rounds)
    print("| | bits per byte | difference | decoding speed to float32 |\n| --- | --- | --- | --- |")
    plain = bits["float32"]["bits_per_byte"]
    for row in rows:
        here = bits[row["model"]]["bits_per_byte"]
        print(f"| {row['model']} | {here:.4f} | {here - plain:+.4f} | {row['decode_ratio']:.2f} |")


if __name__ == "__main__":
    main()
