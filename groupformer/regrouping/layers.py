"""Regrouping one attention layer: which features of its heads are merged together, at what loss, and the result."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .heads import AttentionHeads, join_rotary, split_rotary
from .merging import METHODS, Features, Merge, aligned, lost_energy, mean, times_moment


Groups = Sequence[Sequence[int]]


def key_blocks(heads: AttentionHeads, moment: torch.Tensor) -> tuple[list[torch.Tensor], list[Features]]:
    """The keys' blocks (b, G, d, E), and what a method knows about each."""
    blocks = split_rotary(heads.key, heads.geometry.rotary_dim)
    queries = split_rotary(heads.query, heads.geometry.rotary_dim)
    features = []
    for rows, readers in zip(blocks, queries):
        energies = times_moment(readers, moment) @ readers.mH  # (b, H, d, d)
        energies = energies.unflatten(1, (rows.shape[1], -1)).sum(dim=2)  # (b, G, d, d)
        # A rotary pair adds Re(q̄ k exp(iφ)) to a score: half of |q|²|k|² on average over the angles φ.
        features.append(Features.of_rows(rows, moment, energies / 2 if rows.is_complex() else energies))
    return blocks, features


def normed_key_blocks(
    heads: AttentionHeads, moment: torch.Tensor, equalize: bool
) -> tuple[list[torch.Tensor], list[Features]]:
    """Keys that are normed after the projection, as one block of one feature: the whole head, a row of D * E numbers.

    The norm's weights do not commute with rotations, so that only a head's sign is free; a norm over each head also
    forgets its scale, which is why `equalize` first gives all heads the same.
    """
    key = heads.key
    normed = key * heads.key_norms["weight"][..., None] if heads.key_norms else key  # as queries see them
    own = torch.einsum("gde,ef,hdf->gh", normed, moment, normed)
    if equalize and heads.geometry.qk_norm == "head":
        sizes = own.diagonal().clamp(min=torch.finfo(own.dtype).tiny).sqrt()
        factors = sizes.mean() / sizes
        key, own = key * factors[:, None, None], own * torch.outer(factors, factors)
    metric = torch.full((1, len(key), 1, 1), float(heads.queries_per_key), dtype=own.dtype)
    return [key.flatten(1)[None, :, None]], [Features.of_gram(own[None, :, None, :, None], metric)]


class LayerProblem:
    """One layer, ready to be merged into any groups by one method.

    Args:
        heads: Its weights.
        moment: Second moment of its inputs, (E, E) with E as in `heads`.
        method: A key of `METHODS`.
    """

    def __init__(self, heads: AttentionHeads, moment: torch.Tensor, method: str):
        self.heads = heads
        self.value_method = self.key_method = METHODS[method]
        readers = heads.output.transpose(1, 2) @ heads.output  # (H, D, D)
        readers = readers.unflatten(0, (len(heads.value), -1)).sum(dim=1)  # (G, D, D)
        self.value_features = Features.of_rows(heads.value[None], moment, readers[None])
        if heads.geometry.qk_norm is None:
            self.key_rows, self.key_features = key_blocks(heads, moment)
        else:
            rotates = method in ("aligned", "svd")
            if rotates:
                self.key_method = aligned if heads.geometry.sign_is_free else mean
            self.key_rows, self.key_features = normed_key_blocks(heads, moment, equalize=rotates)
        self.key_energy = sum(float(features.energy.sum()) for features in self.key_features)
        self.value_energy = float(self.value_features.energy.sum())
        self.losses: dict[tuple[int, ...], float] = {}

    def loss(self, group: Sequence[int]) -> float:
        """What merging a group of key-value heads loses: its shares of the energies of the layer's scores and outputs,
        added; 0 for a single head, at most about 2 for a layer's one group."""
        members = tuple(sorted(group))
        if len(members) == 1:
            return 0.0
        if members not in self.losses:
            self.losses[members] = self._loss(list(members))
        return self.losses[members]

    def _loss(self, group: list[int]) -> float:
        lost_by_values = float(lost_energy(self.value_method, self.value_features.take(group)).sum())
        lost_by_keys = sum(
            float(lost_energy(self.key_method, features.take(group)).sum()) for features in self.key_features
        )
        return lost_by_values / max(self.value_energy, 1e-300) + lost_by_keys / max(self.key_energy, 1e-300)

    def merged(self, groups: Groups, generator: torch.Generator) -> AttentionHeads:
        """The layer with one key-value head for each group, in the groups' order; query heads follow their group."""
        heads = self.heads
        order = [head for group in groups for head in group]
        query, key, value, output = heads.query.clone(), [], [], heads.output.clone()
        key_norms: list[dict[str, torch.Tensor]] = []
        for group in map(list, groups):
            merge = self.value_method(self.value_features.take(group))
            value.append(self._shared(heads.value[None], group, merge, generator)[0])
            for place, head in enumerate(group):
                readers = heads.query_heads_of([head])
                output[readers] = heads.output[readers] @ merge.coefficients[0, place]
            merges = [self.key_method(features.take(group)) for features in self.key_features]
            key.append(self._shared_key(group, merges, generator))
            for place, head in enumerate(group):
                readers = heads.query_heads_of([head])
                query[readers] = self._read(heads.query[readers], [merge.coefficients[:, place] for merge in merges])
            key_norms.append(merged_norms(heads.key_norms, group, merges[0]))
        permuted = replace(heads, query=query, output=output).permuted(order)
        return replace(
            permuted,
            key=torch.stack(key),
            value=torch.stack(value),
            key_norms={part: torch.stack([norms[part] for norms in key_norms]) for part in heads.key_norms},
        )

    def _shared(self, rows: torch.Tensor, group: list[int], merge: Merge, generator: torch.Generator) -> torch.Tensor:
        """The shared rows (b, d, E) of a group."""
        if not merge.is_fresh:
            return torch.einsum("bnij,bnje->bie", merge.mix, rows[:, group])
        return self._fresh(rows[:, 0], generator)

    def _fresh(self, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Freshly initialised rows, as the model's own: normal weights, and a bias of 0."""
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        drawn *= self.heads.geometry.initializer_range
        if self.heads.has_bias:
            drawn[..., -1] = 0
        return drawn

    def _shared_key(self, group: list[int], merges: list[Merge], generator: torch.Generator) -> torch.Tensor:
        """The shared key (D, E) of a group."""
        if merges[0].is_fresh:
            return self._fresh(self.heads.key[0], generator)
        shared = [self._shared(rows, group, merge, generator) for rows, merge in zip(self.key_rows, merges)]
        if self.heads.geometry.qk_norm is not None:
            return shared[0].view_as(self.heads.key[0])
        return join_rotary([rows.unsqueeze(1) for rows in shared])[0]

    def _read(self, query: torch.Tensor, coefficients: list[torch.Tensor]) -> torch.Tensor:
        """Queries (N, D, E) of one head that read a shared key, C_aᴴ Q, for C_a (b, d, d) of each block."""
        if self.heads.geometry.qk_norm is not None:
            return query * coefficients[0].item()  # a sign
        blocks = split_rotary(query, self.heads.geometry.rotary_dim)
        return join_rotary([factor.mH.unsqueeze(1) @ rows for rows, factor in zip(blocks, coefficients)])


def merged_norms(norms: dict[str, torch.Tensor], group: list[int], merge: Merge) -> dict[str, torch.Tensor]:
    """Weights and biases of a norm over whole projections, for the shared head: weighted as the heads themselves."""
    shares = merge.mix[0, :, 0, 0].abs()
    if merge.is_fresh:
        shares = torch.full_like(shares, 1 / len(group))
    return {part: torch.einsum("n,nd->d", shares, norm[group]) for part, norm in norms.items()}
