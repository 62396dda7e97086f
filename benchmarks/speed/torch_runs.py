"""What is timed on a transformers model, ours or theirs: prefill, decoding through `generate`, a training step."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from .measure import timed


def random_prompt(model: Any, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


class Stopwatch:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def prefill(model: Any, length: int) -> Callable[[], float]:
    """Seconds of a prompt with its cache, the logits of the last token only, as `generate` does it."""
    input_ids = random_prompt(model, 1, length)

    @torch.no_grad()
    def run() -> float:
        return timed(lambda: model(input_ids, use_cache=True, logits_to_keep=1))

    return run


def decode(model: Any, context: int, tokens: int, **options: Any) -> Callable[[], float]:
    """Seconds a token of greedy `generate` at batch 1, without the prompt and the first steps: the median step."""
    input_ids = random_prompt(model, 1, context)

    def run() -> float:
        watch = Stopwatch()
        generate(model, input_ids, torch.ones_like(input_ids), tokens, streamer=watch, **options)
        steps = sorted(later - earlier for earlier, later in zip(watch.times[3:], watch.times[4:]))
        return steps[len(steps) // 2]

    return run


def decode_batch(model: Any, batch: int, context: int, tokens: int) -> Callable[[], float]:
    """Seconds a step of greedy `generate` on left-padded prompts of different lengths, the prompt's time taken off."""
    input_ids = random_prompt(model, batch, context)
    mask = torch.ones_like(input_ids)
    for row in range(batch):
        mask[row, : row * context // (2 * batch)] = 0

    def run() -> float:
        short = timed(lambda: generate(model, input_ids, mask, 2))
        return (timed(lambda: generate(model, input_ids, mask, tokens + 2)) - short) / tokens

    return run


def generate(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    return model.generate(
        input_ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options
    )


def decode_static(model: Any, context: int, tokens: int, compiled: bool) -> Callable[[], float]:
    """Seconds a token with a static cache, the step compiled as one graph if asked for."""
    input_ids = random_prompt(model, 1, context)
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # CUDA graphs: no launches to wait for
    forward = torch.compile(model.forward, fullgraph=True, mode=mode) if compiled else model.forward
    cache = StaticCache(config=model.config, max_cache_len=context + tokens + 1)

    @torch.no_grad()
    def run() -> float:
        cache.reset()
        logits = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token, steps = logits[:, -1:].argmax(-1), []
        for index in range(tokens):
            position = torch.tensor([[context + index]], device=model.device)
            started = time.perf_counter()
            logits = forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            token.cpu()  # waits for a GPU
            steps.append(time.perf_counter() - started)
        return sorted(steps)[len(steps) // 2]

    return run


def training_step(model: Any, batch: int, length: int, compiled: bool = False) -> Callable[[], float]:
    """Seconds of forward, backward and update (plain SGD, so that the model is what is timed) on random tokens."""
    model.train()
    input_ids = random_prompt(model, batch, length)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        forward(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: timed(step)
