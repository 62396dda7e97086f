"""How fast checkpoints generate on this machine, one beside the other, and what their caches weigh."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..model.cache_groupformer import CACHE_NAME


def measure(
    models: dict[str, Any],
    *,
    context: int = 512,
    batch: int = 1,
    new_tokens: int = 32,
    rounds: int = 3,
    on_round: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Prefill and decoding speed of causal language models, timed in turn, since a machine's speed drifts.

    Args:
        models: By name; each is given random tokens of its own vocabulary.
        context: Tokens of the prompt.
        batch: Sequences at once.
        new_tokens: Tokens to decode after the prompt; at least 2.
        rounds: How often each is timed, after one call to warm up.
        on_round: Called after each timed call.

    Returns:
        A row for each model: medians of tokens a second in prefill and in decoding, of the milliseconds of a decoding
        step, the bytes that the cache holds at the end, and the ratio of decoding speed to the first model.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens ({new_tokens}) must be at least 2: the first comes with the prompt")
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    caches: dict[str, int] = {}
    for index in range(rounds + 1):
        for name in list(models)[:: 1 if index % 2 == 0 else -1]:
            prefill, step, cache = time_once(models[name], context, batch, new_tokens)
            if index:
                timings[name].append((prefill, step))
            caches[name] = cache
            on_round()
    rows = []
    for name, pairs in timings.items():
        prefill, step = (statistics.median(values) for values in zip(*pairs))
        rows.append(
            {
                "model": name,
                "prefill_tokens_per_second": batch * context / prefill,
                "decode_tokens_per_second": batch / step,
                "milliseconds_per_step": step * 1e3,
                "cache_bytes": caches[name],
            }
        )
    for row in rows:
        row["decode_ratio"] = row["decode_tokens_per_second"] / rows[0]["decode_tokens_per_second"]
    return rows


@torch.no_grad()
def time_once(model: Any, context: int, batch: int, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prompt, seconds of one decoding step, and bytes of the cache."""
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, context), device=model.device)
    started = now(model.device)
    output = model(ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = now(model.device)
    for _ in range(new_tokens - 1):
        output = model(token, use_cache=True, **{CACHE_NAME: output[CACHE_NAME]})
        token = output.logits[:, -1:].argmax(-1)
    ended = now(model.device)
    layers = output[CACHE_NAME].layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.keys is not None)
    return prefilled - started, (ended - prefilled) / (new_tokens - 1), held


def now(device: torch.device) -> float:
    """The time when all work so far is done, in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
