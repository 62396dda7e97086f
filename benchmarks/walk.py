"""Walks a cached token through a GroupFormer and transformers' Llama: functions, calls and changes of file.

    python benchmarks/walk.py

Counted are Python functions of transformers' and our model code: modeling, masks, cache, attention. Not counted are
operations, those of torch and transformers' activations (of which some are torch's own modules, by their name in the
config); attributes of configs, output containers, decorators; and comprehensions, which are calls in Python 3.11 only.
With comprehensions and without the head a Llama has 33 functions, 124 calls and 32 changes of file (transformers 5.23
and 5.24).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import groupformer


LAYERS = 8
COUNTED = ("modeling_", "masking_", "cache_", "loss_", "sdpa_attention.py")
NOT_COUNTED = ("modeling_outputs", "modeling_layers", "modeling_utils")


def is_counted(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename)
    is_model_code = "transformers" in file.parts or "groupformer" in file.parts
    return (
        is_model_code
        and file.name.startswith(COUNTED)
        and not file.name.startswith(NOT_COUNTED)
        and not frame.f_code.co_name.startswith("<")
    )


def walk(call: Callable[[], Any]) -> dict[str, int]:
    """What is called, as {"functions", "calls", "changes of file"}."""
    calls: list[tuple[str, int]] = []

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and is_counted(frame):
            calls.append((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    changes = sum(before[0] != after[0] for before, after in zip(calls, calls[1:]))
    return {"functions": len(set(calls)), "calls": len(calls), "changes of file": changes}


@torch.no_grad()
def walk_of_token(model: Any) -> dict[str, int]:
    ids = torch.arange(5, 12)[None]
    cache = model(ids[:, :5], use_cache=True).past_key_values
    model(ids[:, 5:6], past_key_values=cache)
    name = groupformer.model.cache_groupformer.CACHE_NAME
    return walk(lambda: model(ids[:, 6:], use_cache=True, **{name: cache}))


def build_models() -> tuple[Any, Any]:
    """A Llama, and a GroupFormer with its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    native = LlamaForCausalLM(config).eval()
    return native, groupformer.import_model(native).eval()


def main() -> None:
    for model in build_models():
        print(type(model).__name__, walk_of_token(model))


if __name__ == "__main__":
    main()
