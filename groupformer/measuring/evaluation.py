"""How well a causal language model predicts text: bits per byte and perplexity, with sliding windows.

Each document is read by itself. Windows of `window` tokens move on by `stride`; a window scores only the tokens that
no earlier window scored, so every token is scored once, with at least `window - stride` tokens before it (fewer only
at the document's start). Bits per byte does not depend on the tokenizer; perplexity is per token, and does.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..conversion.loading import best_device, check_token_ids, load_checked, load_tokenizer
from .cache import positions_of


DEFAULT_WINDOW = 1024
IGNORED = -100
UNREADABLE = "\ufffd"  # what a decoder writes for a part of a character
FURTHEST = 32  # tokens in which a character ends: it has 4 bytes, but a token may hold parts of two


@dataclass(frozen=True)
class Window:
    """Tokens that a model sees at once, and how many of the last ones are scored."""

    input_ids: list[int]
    scored: int


def windows_of(input_ids: list[int], window: int, stride: int, given: int = 1) -> Iterator[Window]:
    """The windows of one document; together they score every token but the first `given` ones, each once."""
    ready = given
    start = 0
    while ready < len(input_ids):
        end = min(start + window, len(input_ids))
        if end > ready:  # more tokens can be given than one window holds
            yield Window(input_ids[start:end], end - ready)
            ready = end
        start += stride


def read_document(tokenizer: Any, text: str) -> tuple[list[int], int, int]:
    """A text's tokens, after the tokenizer's begin token; how many are given, and the bytes of the others.

    Without a begin token nothing predicts the text's first token, so neither it nor its bytes count. Where it is only
    a part of a character, the tokens of the rest do not count either: a part has no bytes of its own in a text.
    """
    tokens = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    size = len(text.encode("utf-8"))
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id, *tokens], 1, size
    given = 1 if UNREADABLE in text else whole_characters(tokenizer, tokens)
    return tokens, given, max(0, size - len(tokenizer.decode(tokens[:given]).encode("utf-8")))


def whole_characters(tokenizer: Any, tokens: list[int]) -> int:
    """The length of the shortest beginning that decodes to whole characters; 1 where there is none nearby."""
    lengths = range(1, min(len(tokens), FURTHEST) + 1)
    return next((length for length in lengths if UNREADABLE not in tokenizer.decode(tokens[:length])), 1)


def batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Lists of `size` windows, the last one shorter."""
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def batch_loss(model: Any, batch: list[Window]) -> float:
    """The sum of the scored tokens' losses, in nats."""
    longest = max(len(window.input_ids) for window in batch)
    shape = (len(batch), longest)
    input_ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, window in enumerate(batch):
        length = len(window.input_ids)
        input_ids[row, :length] = torch.tensor(window.input_ids)
        attention_mask[row, :length] = 1
        labels[row, length - window.scored : length] = input_ids[row, length - window.scored : length]
    inputs = {"input_ids": input_ids.to(model.device), "use_cache": False}
    if not bool(attention_mask.all()):
        inputs["attention_mask"] = attention_mask.to(model.device)
    logits = model(**inputs).logits[:, :-1]
    targets = labels[:, 1:].to(logits.device)
    scored = targets != IGNORED
    # Only scored rows become float32: logits are the largest tensor here.
    return float(torch.nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum"))


def evaluate(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float]:
    """Bits per byte and perplexity of a causal language model on texts, each read by itself.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        texts: Documents; empty ones are passed over.
        window: Tokens that the model sees at once. Default: 1024, or the model's positions where it has fewer.
        stride: Tokens by which the window moves on. Default: half a window. A smaller stride gives more context, and
            takes longer.
        batch_size: Windows in one forward pass.
        progress: Called with the number of tokens scored since the last call.

    Returns:
        "bits_per_byte", "perplexity" (per token), "loss" (nats per token), "tokens", "bytes", "documents", "window"
        and "stride".

    Raises:
        ValueError: a model that sees the future, a window longer than the positions or shorter than the stride, a
            tokenizer of another vocabulary, no text to score, or a loss that is not finite.
    """
    window, stride = checked_window(model.config, window, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    counted = {"tokens": 0, "bytes": 0, "documents": 0}
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)

    def all_windows() -> Iterator[Window]:
        for text in texts:
            input_ids, given, size = read_document(tokenizer, text) if text else ([], 1, 0)
            if len(input_ids) > given and size:
                check_token_ids(input_ids, tokenizer, "the text", vocab_size)
                counted["documents"] += 1
                counted["bytes"] += size
                yield from windows_of(input_ids, window, stride, given)

    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for batch in batches(all_windows(), batch_size):
            total += batch_loss(model, batch)
            if not math.isfinite(total):
                raise ValueError(f"loss is not finite ({total}): the model's numbers overflow; try dtype float32")
            scored = sum(item.scored for item in batch)
            counted["tokens"] += scored
            progress(scored)
    finally:
        model.train(was_training)
    if not counted["tokens"]:
        raise ValueError("the text has nothing to score; give at least one document of two tokens")
    loss = total / counted["tokens"]
    return {
        "bits_per_byte": total / math.log(2) / counted["bytes"],
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "loss": loss,
        **counted,
        "window": window,
        "stride": stride,
    }


def checked_window(config: Any, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with their defaults, after refusing what the model cannot do."""
    if getattr(config, "is_causal", True) is False:
        raise ValueError("is_causal (False) lets the model see the tokens it is to predict; evaluate a causal model")
    positions = positions_of(config)
    if window is None:
        window = min(DEFAULT_WINDOW, positions or DEFAULT_WINDOW)
    if window < 2 or (positions is not None and window > positions):
        limit = f" and at most max_position_embeddings ({positions})" if positions is not None else ""
        raise ValueError(f"window ({window}) must be at least 2{limit}")
    if stride is None:
        stride = max(1, window // 2)
    if not 1 <= stride < window:
        raise ValueError(f"stride ({stride}) must be at least 1 and below window ({window})")
    return window, stride


def evaluate_checkpoint(
    source: str,
    texts: list[str],
    *,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> dict[str, float]:
    """`evaluate` for a folder or Hub id, with its own tokenizer unless another is named.

    Args:
        source: Folder, GGUF file, adapter folder or Hub id of any causal language model.
        texts: Documents.
        tokenizer: Folder or Hub id of another tokenizer.
        device: Default: the accelerator, if there is one.
        dtype: Of the weights; "auto" keeps the checkpoint's.
        options: As in `evaluate`.
    """
    device = best_device(device)
    chosen = load_tokenizer(source, tokenizer)  # refused before weights are read
    model = load_checked(AutoModelForCausalLM, source, dtype=dtype).to(device)
    return evaluate(model, chosen, texts, **options)
