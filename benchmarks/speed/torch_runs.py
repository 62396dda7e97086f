"""What is timed on a transformers model, ours or theirs: prefill, decoding through `generate`, a training step."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from .measure import synchronize, timed


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


# A compiler that writes the products of one row itself, and chooses their sizes by trying: minutes of compiling.
TUNED = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}


class StaticDecoding:
    """Decoding with a static cache; the step compiled as one graph if asked for."""

    def __init__(self, model: Any, context: int, tokens: int, compiled: bool, tuned: bool = False) -> None:
        self.model, self.context, self.tokens = model, context, tokens
        self.input_ids = random_prompt(model, 1, context)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # CUDA graphs: no launches to wait for
        options: dict[str, Any] = {"options": TUNED} if tuned else {"mode": mode}
        self.forward = torch.compile(model.forward, fullgraph=True, **options) if compiled else model.forward
        self.cache = StaticCache(config=model.config, max_cache_len=context + tokens + 8)

    @torch.no_grad()
    def __call__(self) -> float:
        """Seconds a token: the median step."""
        self.cache.reset()
        options = {"past_key_values": self.cache, "use_cache": True}
        logits = self.model(self.input_ids, logits_to_keep=1, **options).logits
        token, steps = logits[:, -1:].argmax(-1), []
        for index in range(self.tokens):
            position = torch.tensor([[self.context + index]], device=self.model.device)
            started = time.perf_counter()
            logits = self.forward(input_ids=token, position_ids=position, **options).logits
            token = logits[:, -1:].argmax(-1)
            token.cpu()  # waits for a GPU
            steps.append(time.perf_counter() - started)
        return sorted(steps)[len(steps) // 2]

    @torch.no_grad()
    def one(self) -> None:
        """One more token, for a profiler; the cache has room for a few after a call."""
        token, position = torch.tensor([[[1]], [[self.context + self.tokens]]], device=self.model.device).unbind()
        self.forward(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True)


def kernels(work: Callable[[], Any], times: int = 1) -> tuple[float, str]:
    """Seconds in which a GPU computes during one call, and the table of its kernels, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            work()
        synchronize()
    events = [event for event in profiled.key_averages() if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: -event.self_device_time_total)
    micros = [event.self_device_time_total / times for event in events]
    lines = [f"{spent:10.1f} us {it.count / times:6.0f} x  {it.key[:120]}" for spent, it in zip(micros, events)]
    return sum(micros) * 1e-6, "\n".join(lines[:40])


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
