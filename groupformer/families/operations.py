"""Reversible operations between the tensors of a native checkpoint and ours.

An operation turns one list of tensors into another and back, bit for bit: `to_ours` and `to_native` are inverses. All
of them only move numbers (views, transposes, concatenations), so the dtype stays and nothing is rounded. They work on
a weight (out, in) and on its bias (out,) alike, so one row of a family's table covers both.

Transformers has reversible operations too (`transformers.core_model_loading`). They are not used here because they
are steps of loading into a model that exists: sizes come from the live module tree, the fused layouts needed here
(`GroupedHeads`, and in transformers 5.16 splits of unequal size) are missing, and tensors pass through a thread pool
that holds a whole model. From folder to folder, shapes must be known before data, and data come group by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Context:
    """What an operation may ask: the sizes of our side of the group."""

    head_dim: int
    rotary_dim: int  # leading features of a head that RoPE rotates; 0 without RoPE
    rows: tuple[int, ...]  # leading size of each of our tensors


Tensors = Sequence[torch.Tensor]


class Operation:
    """The same tensors under other names."""

    def to_ours(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return list(tensors)

    def to_native(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return list(tensors)


class Stacked(Operation):
    """One native tensor holds several of ours, one after the other: `[q; k; v]` (GPT-2, MPT, Phi 3), `[gate; up]`."""

    def to_ours(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return list(tensors[0].split(context.rows))

    def to_native(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return [torch.cat(list(tensors))]


class GroupedHeads(Operation):
    """One native tensor holds queries, keys and values group by group: H/G query heads, then their key, their value.

    This one layout (G, H/G + 2, D) is that of GPT-NeoX, BLOOM, StarCoder's MHA (G = H: query, key, value of each
    head), of StarCoder's and Falcon's MQA (G = 1: all queries, one key, one value) and of Falcon 40B (G between).
    """

    def to_ours(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        fused, groups = tensors[0], context.rows[1] // context.head_dim
        features = fused.shape[1:]
        fused = fused.view(groups, -1, context.head_dim, *features)  # (G, H/G + 2, D, ...)
        parts = fused[:, :-2], fused[:, -2:-1], fused[:, -1:]
        return [part.reshape(-1, *features) for part in parts]

    def to_native(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        groups, features = context.rows[1] // context.head_dim, tensors[0].shape[1:]
        parts = [tensor.view(groups, -1, context.head_dim, *features) for tensor in tensors]
        return [torch.cat(parts, dim=1).reshape(-1, *features)]


class InterleavedRope(Operation):
    """RoPE that rotates neighbours `(x[2j], x[2j + 1])` (Su et al. 2021; Cohere); ours rotates `(x[j], x[j + d/2])`.

    The rows of each head are sorted, even ones first; scores do not change, because queries and keys move alike.
    """

    def to_ours(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return [self._rearrange(tensor, context, (-1, 2)) for tensor in tensors]

    def to_native(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return [self._rearrange(tensor, context, (2, -1)) for tensor in tensors]

    @staticmethod
    def _rearrange(tensor: torch.Tensor, context: Context, pairs: tuple[int, int]) -> torch.Tensor:
        features = tensor.shape[1:]
        heads = tensor.view(-1, context.head_dim, *features)
        rotated, kept = heads.split((context.rotary_dim, context.head_dim - context.rotary_dim), dim=1)
        rotated = rotated.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
        return torch.cat((rotated, kept), dim=1).reshape(tensor.shape)


@dataclass(frozen=True)
class Conv1D(Operation):
    """GPT-2's `Conv1D` stores a weight as (in, out), the transpose of ours; then `inner` applies. Biases pass."""

    inner: Operation = Operation()

    def to_ours(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return [tensor.contiguous() for tensor in self.inner.to_ours([tensor.t() for tensor in tensors], context)]

    def to_native(self, tensors: Tensors, context: Context) -> list[torch.Tensor]:
        return [tensor.t().contiguous() for tensor in self.inner.to_native(tensors, context)]


RENAME = Operation()
