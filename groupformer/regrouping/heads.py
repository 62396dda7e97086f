"""One layer's attention weights, head by head: read from tensors, permuted, rewritten in shared keys and values.

Everything is computed in float64. A bias counts as one more input feature that is always 1, so weights and biases are
merged as one matrix. Shapes: H query heads, G key-value heads, D head_dim, E inputs (hidden_size, and 1 for a bias).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..model.configuration_groupformer import GroupFormerConfig


@dataclass(frozen=True)
class Geometry:
    """What the weights of a layer do not say by themselves.

    Args:
        num_heads, num_key_value_heads, head_dim: Of the layer.
        rotary_dim: Leading features of each head that RoPE turns, in pairs (j, j + rotary_dim / 2); 0 without RoPE.
        scaling: Factor of the attention scores.
        qk_norm: None, "head" or "projection".
        sign_is_free: Whether the norm of queries and keys commutes with a change of one head's sign.
        initializer_range: Standard deviation of fresh weights.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    scaling: float
    qk_norm: str | None
    sign_is_free: bool
    initializer_range: float

    @classmethod
    def of_layer(cls, config: GroupFormerConfig, layer_idx: int) -> "Geometry":
        """The geometry of one layer of a model."""
        layer = config.per_layer_config[layer_idx]
        uses_rope = config.no_rope_layers is None or config.no_rope_layers[layer_idx] == 1
        head_dim: int = config.head_dim  # type: ignore[assignment]
        rotary_dim = 0
        if config.rope_parameters and uses_rope:
            # Transformers' "proportional" type spreads its pairs over the whole head, the last ones at frequency 0.
            whole = config.rope_parameters.get("rope_type") == "proportional"
            partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
            rotary_dim = head_dim if whole else int(head_dim * partial)  # type: ignore[operator]
        multiplier = layer.attention_multiplier
        # RMSNorm: norm(-x) = -norm(x). LayerNorm also, unless it has a bias, or centres several heads together.
        centred = config.norm_type == "layer_norm"
        return cls(
            num_heads=config.num_attention_heads,
            num_key_value_heads=layer.num_key_value_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            scaling=head_dim**-0.5 if multiplier is None else multiplier,
            qk_norm=config.qk_norm,
            sign_is_free=not (centred and (config.norm_bias or config.qk_norm == "projection")),
            initializer_range=config.initializer_range,
        )


@dataclass(frozen=True)
class AttentionHeads:
    """The weights of one attention layer, head by head.

    Args:
        query (H, D, E), key (G, D, E), value (G, D, E): Rows of the projections; a bias is the last column.
        output (H, hidden_size, D): Each query head's part of the output projection. Its bias stays outside.
        query_norms (H, D), key_norms (G, D): Weight and bias of norms over whole projections, by name.
        geometry: The layer's geometry.
        has_bias: Whether the last column of query, key and value is a bias.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_norms: dict[str, torch.Tensor]
    key_norms: dict[str, torch.Tensor]
    geometry: Geometry
    has_bias: bool

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], geometry: Geometry) -> "AttentionHeads":
        """The heads of `self_attn`'s tensors ("q_proj.weight", ...)."""
        head_dim, has_bias = geometry.head_dim, "k_proj.bias" in tensors

        def rows(name: str) -> torch.Tensor:
            weight = tensors[f"{name}.weight"].double()
            if has_bias:
                weight = torch.cat((weight, tensors[f"{name}.bias"].double()[:, None]), dim=1)
            return weight.unflatten(0, (-1, head_dim))

        def norms(name: str) -> dict[str, torch.Tensor]:
            found = {part: tensors.get(f"{name}.{part}") for part in ("weight", "bias")}
            if geometry.qk_norm != "projection":
                return {}
            return {
                part: norm.double().unflatten(0, (-1, head_dim)) for part, norm in found.items() if norm is not None
            }

        return cls(
            query=rows("q_proj"),
            key=rows("k_proj"),
            value=rows("v_proj"),
            output=tensors["o_proj.weight"].double().unflatten(1, (-1, head_dim)).transpose(0, 1),
            query_norms=norms("q_norm"),
            key_norms=norms("k_norm"),
            geometry=geometry,
            has_bias=has_bias,
        )

    def to_tensors(self, originals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of `self_attn`, in the originals' dtypes; what was not touched is copied."""
        new: dict[str, torch.Tensor] = {}
        for name, heads in (("q_proj", self.query), ("k_proj", self.key), ("v_proj", self.value)):
            rows = heads.flatten(0, 1)
            new[f"{name}.weight"] = rows[:, :-1] if self.has_bias else rows
            if self.has_bias:
                new[f"{name}.bias"] = rows[:, -1]
        new["o_proj.weight"] = self.output.transpose(0, 1).flatten(1)
        for name, norms in (("q_norm", self.query_norms), ("k_norm", self.key_norms)):
            new |= {f"{name}.{part}": norm.flatten() for part, norm in norms.items()}
        return {
            name: new.get(name, original).to(original, copy=True).contiguous() for name, original in originals.items()
        }

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
