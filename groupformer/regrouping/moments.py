"""The second moment of what enters attention, measured on text or derived from the norm before it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig


# Share of the mean energy that is added to every direction, so that none which the text did not visit counts as free.
RIDGE = 1e-3


@dataclass
class Moment:
    """Sums over inputs x (E,): of x xᵀ (E, E), of x, and their number, in float64."""

    products: torch.Tensor
    total: torch.Tensor
    count: float

    @classmethod
    def zeros(cls, size: int) -> "Moment":
        return cls(torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0)

    def add(self, inputs: torch.Tensor) -> None:
        """Counts inputs (..., E)."""
        flat = inputs.detach().flatten(0, -2).cpu().double()  # MPS has no float64
        self.products += flat.T @ flat
        self.total += flat.sum(dim=0)
        self.count += flat.shape[0]

    def matrix(self, has_bias: bool) -> torch.Tensor:
        """E[x xᵀ] plus the ridge; with a bias, of (x, 1): one row and column more."""
        second, mean = self.products / self.count, self.total / self.count
        second.diagonal().add_(RIDGE * second.diagonal().mean())
        if not has_bias:
            return second
        return torch.cat((torch.cat((second, mean[:, None]), 1), torch.cat((mean, mean.new_ones(1)))[None]))


@torch.no_grad()
def moment_from_norm(norm: Callable[[torch.Tensor], torch.Tensor] | None, size: int) -> Moment:
    """The moment of a norm's output when what enters the norm has no preferred direction.

    A norm gives diag(w) z + b for z of mean 0 and variance 1, so w and b are read from its outputs, however it stores
    them. RMSNorm then gives diag(w²); LayerNorm, which centres, diag(w) (I - 1 1ᵀ / E) diag(w) + b bᵀ with mean b;
    where no norm comes before attention, every direction counts alike.

    Args:
        norm: The norm before attention, from (1, E) to (1, E); None where there is none.
        size: E.
    """
    if norm is None:
        return Moment(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 1)
    noise = torch.rand(1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    signs = 1 - 2 * (torch.arange(size) % 2)
    unit = noise * signs
    unit = (unit - unit.mean()) / (unit - unit.mean()).square().mean().sqrt()
    mean, ones = (norm(each).double()[0] for each in (torch.zeros(1, size), torch.ones(1, size)))
    weight = (norm(unit.float()).double()[0] - mean) / unit[0]
    is_centred = bool((ones - mean).abs().max() < 1e-2 * weight.abs().max())
    products = torch.diag(weight.square()) + torch.outer(mean, mean)
    return Moment(products - torch.outer(weight, weight / size) if is_centred else products, mean.clone(), 1)


def check_calibration(calibration: torch.Tensor, config: PreTrainedConfig) -> None:
    """Refuses calibration that is not token ids, or too short to tell the inputs' directions.

    Raises:
        TypeError: no tensor.
        ValueError: wrong shape or dtype, ids outside the vocabulary, rows longer than the positions, or fewer tokens
            than hidden_size.
    """
    check_token_ids("calibration", calibration, config)
    if calibration.numel() < config.hidden_size:
        raise ValueError(
            f"calibration has {calibration.numel()} tokens, but hidden_size ({config.hidden_size}) directions are to "
            "be measured; give at least as many tokens, better ten times as many, or none at all"
        )
    longest = longest_row(config)
    if longest is not None and calibration.shape[1] > longest:
        raise ValueError(
            f"calibration has rows of {calibration.shape[1]} tokens, but max_position_embeddings ({longest}) is all "
            "that the model has; give shorter rows"
        )


def check_token_ids(name: str, token_ids: torch.Tensor, config: PreTrainedConfig) -> None:
    """Refuses what is no batch of a model's token ids.

    Raises:
        TypeError: no tensor.
        ValueError: wrong shape or dtype, or ids outside the vocabulary.
    """
    if not isinstance(token_ids, torch.Tensor):
        raise TypeError(f"{name} ({type(token_ids).__name__}) is no tensor; give token ids, a LongTensor (batch, seq)")
    if token_ids.ndim != 2 or token_ids.dtype not in (torch.int32, torch.int64):  # those that embeddings take
        raise ValueError(
            f"{name} has shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}; "
            "give token ids, a LongTensor (batch, seq)"
        )
    vocab_size = config.get_text_config().vocab_size
    if token_ids.numel() and (token_ids.min() < 0 or token_ids.max() >= vocab_size):
        raise ValueError(
            f"{name} has token ids from {int(token_ids.min())} to {int(token_ids.max())}, but vocab_size is "
            f"{vocab_size}; use the model's own tokenizer"
        )


def longest_row(config: PreTrainedConfig) -> int | None:
    """Positions of a model that has no more than its config says; None where RoPE or ALiBi goes on."""
    if getattr(config, "position_embedding_type", "learned") not in ("learned", "sinusoidal"):
        return None
    return getattr(config, "max_position_embeddings", None)


def adder(moment: Moment) -> Callable:
    """A forward pre-hook that counts a module's inputs."""
    return lambda module, inputs: moment.add(inputs[0])


def calibration_from_texts(
    texts: Sequence[str], tokenizer: Any, config: PreTrainedConfig, tokens: int = 16_384, row_length: int = 512
) -> torch.Tensor:
    """Token ids (batch, row_length) of the beginnings of texts, end to end, up to so many tokens in all.

    Every text gives an equal share, but at least a row. A last short row is left out; texts that fill no row make one
    shorter row.
    """
    row_length = min(row_length, longest_row(config) or row_length)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    share = max(row_length, -(-tokens // max(1, len(texts))))
    input_ids: list[int] = []
    for text in texts:
        # No book is read for its first page: few tokens are longer than 16 characters.
        part = tokenizer(text[: 16 * share], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        input_ids += (begin + part)[:share]
        if len(input_ids) >= tokens:
            break
    row_length = max(1, min(row_length, tokens, len(input_ids)))
    rows = min(tokens, len(input_ids)) // row_length
    return torch.tensor(input_ids[: rows * row_length], dtype=torch.long).view(rows, row_length)
