"""One layer's attention weights, head by head: read from tensors, permuted, rewritten in shared keys and values.

Everything is computed in float64. A bias counts as one more input feature that is always 1, so weights and biases are
merged as one matrix. Shapes: H query heads, G key-value heads, D head_dim, E inputs (hidden_size, and 1 for a bias).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Geometry:
    """What the weights of a layer do not say by themselves.

    Args:
        num_heads, num_key_value_heads, head_dim: Of the layer.
        rotary_dim: Leading features of each head that RoPE rotates, in pairs (j, j + rotary_dim / 2); 0 without RoPE.
        qk_norm: None, "head" or "projection": what a norm on queries and keys divides by.
        has_norm_by_head: Whether that norm has other weights for each head.
        sign_is_free: Whether the norm of queries and keys commutes with a change of one head's sign.
        initializer_range: Standard deviation of fresh weights.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: str | None
    has_norm_by_head: bool
    sign_is_free: bool
    initializer_range: float


@dataclass(frozen=True)
class AttentionHeads:
    """The weights of one attention layer, head by head.

    Args:
        query (H, D, E), key (G, D, E), value (G, D, E): Rows of the projections; a bias is the last column.
        output (H, hidden_size, D): Each query head's part of the output projection. Its bias stays outside.
        query_norms (H, D), key_norms (G, D): Weight and bias of norms with other weights for each head, by name.
        geometry: The layer's geometry.
        has_bias: Whether the last column of query, key and value is a bias.
        per_head (H, ...): Whatever else belongs to one query head each, e.g. attention sinks, by name.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_norms: dict[str, torch.Tensor]
    key_norms: dict[str, torch.Tensor]
    geometry: Geometry
    has_bias: bool
    per_head: dict[str, torch.Tensor] = field(default_factory=dict)

    def values_of(self, inputs: torch.Tensor) -> torch.Tensor:
        """The values (batch, G, seq, D) of inputs (batch, seq, hidden_size), in float32."""
        inputs = inputs.double()
        if self.has_bias:
            inputs = torch.cat((inputs, torch.ones_like(inputs[..., :1])), dim=-1)
        return torch.einsum("gde,bte->bgtd", self.value, inputs).float()

    @property
    def queries_per_key(self) -> int:
        """H / G."""
        return self.query.shape[0] // self.key.shape[0]

    def query_heads_of(self, key_heads: Sequence[int]) -> list[int]:
        """The query heads that read these key-value heads, in their order."""
        size = self.queries_per_key
        return [head * size + offset for head in key_heads for offset in range(size)]

    def permuted(self, order: Sequence[int]) -> "AttentionHeads":
        """The same function with key-value heads in another order: their query heads, and these heads' columns of the
        output projection, move along. (With ALiBi it would not be the same: slopes belong to places.)"""
        order, query_order = list(order), self.query_heads_of(order)
        return replace(
            self,
            query=self.query[query_order],
            key=self.key[order],
            value=self.value[order],
            output=self.output[query_order],
            query_norms={part: norm[query_order] for part, norm in self.query_norms.items()},
            key_norms={part: norm[order] for part, norm in self.key_norms.items()},
            per_head={name: tensor[query_order] for name, tensor in self.per_head.items()},
        )


# Blocks of features --------------------------------------------------------------------------------------------------
# A block is a set of features of a head that may be mixed with each other without changing what a position does to
# them: all of a value; each rotary pair of a key, read as one complex number; the features of a key without RoPE.


def split_rotary(heads: torch.Tensor, rotary_dim: int) -> list[torch.Tensor]:
    """Query or key rows (N, D, E) as blocks (blocks, N, features, E): rotary pairs as complex rows, then the rest.

    Pair j is row j + i * row (j + rotary_dim / 2): RoPE multiplies it by `exp(i * position * frequency_j)`.
    """
    half = rotary_dim // 2
    blocks = []
    if rotary_dim:
        pairs = torch.complex(heads[:, :half], heads[:, half:rotary_dim])  # (N, half, E)
        blocks.append(pairs.transpose(0, 1).unsqueeze(2))  # (half, N, 1, E)
    if rotary_dim < heads.shape[1]:
        blocks.append(heads[None, :, rotary_dim:])  # (1, N, D - rotary_dim, E)
    return blocks


def join_rotary(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inverse of `split_rotary`."""
    parts = []
    for block in blocks:
        if block.is_complex():
            pairs = block.squeeze(2).transpose(0, 1)  # (N, half, E)
            parts += [pairs.real, pairs.imag]
        else:
            parts.append(block.squeeze(0))
    return torch.cat(parts, dim=1)
