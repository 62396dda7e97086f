"""What the inputs of attention look like: their second moment, measured on text or told by the norm before them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_groupformer import GroupFormerConfig


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
        flat = inputs.detach().flatten(0, -2).to("cpu", torch.float64)
        self.products += flat.T @ flat
        self.total += flat.sum(dim=0)
        self.count += flat.shape[0]

    def matrix(self, has_bias: bool) -> torch.Tensor:
        """E[x xᵀ] plus the ridge; with a bias, of (x, 1): one row and column more."""
        second, mean = self.products / self.count, self.total / self.count
        size = second.shape[0]
        second = second + RIDGE * second.diagonal().mean() * torch.eye(size, dtype=second.dtype)
        if not has_bias:
            return second
        return torch.cat((torch.cat((second, mean[:, None]), 1), torch.cat((mean, mean.new_ones(1)))[None]))


def moment_from_norm(config: GroupFormerConfig, norm: Mapping[str, torch.Tensor]) -> Moment:
    """The moment of a norm's output when what enters the norm has no preferred direction.

    RMSNorm gives diag(w²); LayerNorm gives diag(w) (I - 1 1ᵀ / E) diag(w) + b bᵀ with mean b; where no norm comes
    before attention (`norm_position="after"`), every direction counts alike.

    Args:
        config: The model's config.
        norm: "weight" and "bias" of the norm before attention; empty where there is none.
    """
    size = config.hidden_size
    weight = norm["weight"].double() if "weight" in norm else torch.ones(size, dtype=torch.float64)
    mean = norm["bias"].double() if "bias" in norm else torch.zeros(size, dtype=torch.float64)
    spread = torch.eye(size, dtype=torch.float64)
    if config.norm_type == "layer_norm" and "weight" in norm:
        spread -= 1 / size
    return Moment(weight[:, None] * spread * weight + torch.outer(mean, mean), mean.clone(), 1)


def check_calibration(calibration: torch.Tensor, config: GroupFormerConfig) -> None:
    """Refuses calibration that is not token ids, or too short to tell the inputs' directions.

    Raises:
        TypeError: no tensor.
        ValueError: wrong shape or dtype, ids outside the vocabulary, rows longer than the positions, or fewer tokens
            than hidden_size.
    """
    if not isinstance(calibration, torch.Tensor):
        raise TypeError(
            f"calibration ({type(calibration).__name__}) is no tensor; give token ids, a LongTensor (batch, seq)"
        )
    if calibration.ndim != 2 or calibration.dtype not in (torch.int32, torch.int64):  # those that embeddings take
        raise ValueError(
            f"calibration has shape {tuple(calibration.shape)} and dtype {calibration.dtype}; "
            "give token ids, a LongTensor (batch, seq)"
        )
    if calibration.numel() < config.hidden_size:
        raise ValueError(
            f"calibration has {calibration.numel()} tokens, but hidden_size ({config.hidden_size}) directions are to "
            "be measured; give at least as many tokens, better ten times as many, or none at all"
        )
    if calibration.min() < 0 or calibration.max() >= config.vocab_size:
        raise ValueError(
            f"calibration has token ids from {int(calibration.min())} to {int(calibration.max())}, but vocab_size is "
            f"{config.vocab_size}; use the model's own tokenizer"
        )
    limited = config.position_embedding_type in ("learned", "sinusoidal")
    if limited and calibration.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"calibration has rows of {calibration.shape[1]} tokens, but max_position_embeddings "
            f"({config.max_position_embeddings}) is all that position_embedding_type="
            f"{config.position_embedding_type!r} has; give shorter rows"
        )


@torch.no_grad()
def measure_moments(model: Any, calibration: torch.Tensor) -> list[Moment]:
    """The moment of each layer's attention inputs on token ids (batch, seq), by hooks; the model stays as it is."""
    base: Any = model.base_model
    moments = [Moment.zeros(model.config.hidden_size) for _ in base.layers]
    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(adder(moment)) for layer, moment in zip(base.layers, moments)
    ]
    was_training = model.training
    model.eval()
    try:
        for row in calibration.to(base.embed_tokens.weight.device).split(1):
            base(row, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return moments


def adder(moment: Moment) -> Callable:
    """A forward pre-hook that counts a module's inputs."""
    return lambda module, inputs: moment.add(inputs[0])


def calibration_from_texts(
    texts: Sequence[str], tokenizer: Any, config: GroupFormerConfig, tokens: int = 16_384, row_length: int = 512
) -> torch.Tensor:
    """Token ids (batch, row_length) of the beginnings of texts, end to end, up to so many tokens in all.

    Every text gives an equal share, but at least a row. A last short row is left out; texts that fill no row make one
    shorter row.
    """
    if config.position_embedding_type in ("learned", "sinusoidal"):
        row_length = min(row_length, config.max_position_embeddings)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    share = max(row_length, -(-tokens // max(1, len(texts))))
    input_ids: list[int] = []
    for text in texts:
        # No book is read for its first page: few tokens are longer than 16 characters.
        part = tokenizer(text[: 16 * share], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        input_ids += (begin + part)[:share]
        if len(input_ids) >= tokens:
            break
    row_length = max(1, min(row_length, len(input_ids)))
    rows = min(tokens, len(input_ids)) // row_length
    return torch.tensor(input_ids[: rows * row_length], dtype=torch.long).view(rows, row_length)
