"""The methods: one key-value head in place of several, as a small linear problem.

Heads a = 1 … n of a group have rows W_a (d, E) that act on inputs x with second moment S = E[x xᵀ]. A method chooses

- `mix` M_a (d, d): the shared head is W = Σ_a M_a W_a;
- `coefficients` C_a (d, d): head a is read as C_a W.

Whoever reads head a absorbs C_a: for values the output projections, O_h C_a in place of O_h; for keys the queries,
C_aᴴ Q_h in place of Q_h, since (Q_h x)ᴴ C_a W y = (C_aᴴ Q_h x)ᴴ W y. What counts is how wrong the readers become:
Σ_a tr(B_a E_a S E_aᴴ) with the error E_a = W_a - C_a W and the readers' metric B_a = Σ_h O_hᵀ O_h for values and
Σ_h Q_h S Q_hᴴ for keys, h running over the query heads that read head a. So a method needs no weights, only the Gram
matrices W_a S W_bᴴ and the metrics.

Without positions a block is a whole head, real. Under RoPE a key has one complex block of d = 1 for each rotary pair,
because multiplying a pair by a complex number is the only linear map that commutes with every rotation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


ALIGNMENT_SWEEPS = 20
DEAD = 1e-12  # readers' directions below this share of the strongest one read nothing


@dataclass(frozen=True)
class Features:
    """What a method knows about n heads, for b independent blocks of d features at once.

    Args:
        gram: (b, n, d, n, d), W_a S W_bᴴ.
        metric: (b, n, d, d), B_a.
        roots, inverse_roots: (b, n, d, d), L_a = B_a^½ and its pseudo-inverse.
    """

    gram: torch.Tensor
    metric: torch.Tensor
    roots: torch.Tensor
    inverse_roots: torch.Tensor

    @classmethod
    def of_gram(cls, gram: torch.Tensor, metric: torch.Tensor) -> "Features":
        """Of all heads of a layer: roots are taken once, and groups take their parts."""
        return cls(gram, metric, *square_roots(metric.to(gram.dtype)))

    @classmethod
    def of_rows(cls, rows: torch.Tensor, moment: torch.Tensor, metric: torch.Tensor) -> "Features":
        """Of rows (b, n, d, E) with second moment (E, E)."""
        blocks, heads, size, _ = rows.shape
        flat = rows.flatten(1, 2)  # (b, n * d, E)
        gram = times_moment(flat, moment) @ flat.mH
        return cls.of_gram(gram.unflatten(2, (heads, size)).unflatten(1, (heads, size)), metric)

    def take(self, heads: list[int]) -> "Features":
        """Those of some of the heads."""
        gram = self.gram[:, heads][:, :, :, heads]
        return Features(gram, self.metric[:, heads], self.roots[:, heads], self.inverse_roots[:, heads])

    @property
    def weighted_gram(self) -> torch.Tensor:
        """L_a W_a S W_bᴴ L_b, as matrices (b, n * d, n * d)."""
        return flat(torch.einsum("baij,bajck,bckl->baicl", self.roots, self.gram, self.roots))

    @property
    def energy(self) -> torch.Tensor:
        """What the readers get from each block in all, tr(B_a W_a S W_aᴴ) summed over heads: (b,)."""
        own = torch.diagonal(self.gram, dim1=1, dim2=3).movedim(-1, 1)  # (b, n, d, d)
        return torch.einsum("bnij,bnji->b", self.metric.to(own.dtype), own).real


def flat(between: torch.Tensor) -> torch.Tensor:
    """A tensor with a block for each pair of heads, (b, n, d, n, d), as matrices (b, n * d, n * d)."""
    return between.flatten(3, 4).flatten(1, 2)


def times_moment(rows: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Rows (..., E) times a real moment (E, E): one large product, or two for complex rows, not many small ones.

    Without calibration the moment of an RMSNorm's outputs is diagonal, and there is nothing to multiply out.
    """
    diagonal = moment.diagonal()
    if torch.count_nonzero(moment) <= torch.count_nonzero(diagonal):
        return rows * diagonal
    flat = rows.reshape(-1, rows.shape[-1])
    product = torch.complex(flat.real @ moment, flat.imag @ moment) if rows.is_complex() else flat @ moment
    return product.view(rows.shape)


@dataclass(frozen=True)
class Merge:
    """What a method chose: `mix` and `coefficients`, both (b, n, d, d); and whether the head is drawn afresh."""

    mix: torch.Tensor
    coefficients: torch.Tensor
    is_fresh: bool = False

    def lost_energy(self, features: Features) -> torch.Tensor:
        """Σ_a tr(B_a E_a S E_aᴴ), what the readers of each block lose: (b,)."""
        heads, size = self.mix.shape[1:3]
        coefficients = self.coefficients.flatten(1, 2)  # (b, n * d, d)
        mix = self.mix.transpose(1, 2).flatten(2)  # (b, d, n * d)
        error = torch.eye(heads * size, dtype=mix.dtype) - coefficients @ mix
        errors = (error @ flat(features.gram) @ error.mH).unflatten(2, (heads, size)).unflatten(1, (heads, size))
        own = torch.diagonal(errors, dim1=1, dim2=3).movedim(-1, 1)  # (b, n, d, d)
        return torch.einsum("bnij,bnji->b", features.metric.to(own.dtype), own).real.clamp(min=0)


def identities(features: Features) -> torch.Tensor:
    """(b, n, d, d) of unit matrices."""
    blocks, heads, size = features.gram.shape[:3]
    return torch.eye(size, dtype=features.gram.dtype).expand(blocks, heads, size, size)


def first(features: Features) -> Merge:
    """The group's first head, for all: W = W_1 (Ainslie et al. 2023, section 2.1 and figure 4, "First")."""
    units = identities(features)
    mix = torch.zeros_like(units)
    mix[:, 0] = units[:, 0]
    return Merge(mix, units)


def random(features: Features) -> Merge:
    """A freshly initialised head (Ainslie et al. 2023, figure 4, "Random")."""
    units = identities(features)
    return Merge(torch.zeros_like(units), units, is_fresh=True)


def mean(features: Features) -> Merge:
    """The mean of the heads, W = Σ_a W_a / n (Ainslie et al. 2023, section 2.1)."""
    units = identities(features)
    return Merge(units / units.shape[1], units)


def aligned(features: Features) -> Merge:
    """The mean of the heads after each was rotated into a common frame by a unitary R_a, which its readers undo.

    The R_a that maximise Σ_{a≠b} Re tr(R_a W_a S W_bᴴ R_bᴴ): generalized Procrustes analysis (Gower 1975), as Jin et
    al. (2024, arXiv 2412.20677, section 3) align heads before pruning them to groups. Each sweep sets one R_a after
    the other to the polar factor that is best for the rest. Then W = Σ_a R_a W_a / n and C_a = R_aᴴ. For values and
    keys without positions R_a is orthogonal; for a rotary pair it is a phase.
    """
    heads = features.gram.shape[1]
    rotations = [best_rotation(features.gram[:, a, :, 0]) for a in range(heads)]
    for _ in range(ALIGNMENT_SWEEPS if heads > 2 else 0):
        for a in range(heads):
            others = [features.gram[:, a, :, b] @ rotations[b].mH for b in range(heads) if b != a]
            rotations[a] = best_rotation(torch.stack(others).sum(dim=0))
    rotated = torch.stack([rotations[0].mH @ rotation for rotation in rotations], dim=1)  # in the first head's frame
    return Merge(rotated / heads, rotated.mH)


def best_rotation(overlap: torch.Tensor) -> torch.Tensor:
    """The unitary R that maximises Re tr(R X) for each X (b, d, d): with X = U Σ Vᴴ it is V Uᴴ (Schönemann 1966)."""
    left, _, right = torch.linalg.svd(overlap)
    return right.mH @ left.mH


def svd(features: Features) -> Merge:
    """The shared head that costs the readers least, in closed form (cf. Yu et al. 2024, arXiv 2406.07056).

    With L_a = B_a^½, stack the rows L_a W_a S^½. Their best approximation of rank d (Eckart and Young 1936) keeps the
    d leading eigenvectors P of the stack's Gram matrix L_a W_a S W_bᴴ L_b, so W = Σ_a P_aᴴ L_a W_a and
    C_a = L_a⁻¹ P_a: no other head of d features serves its readers better. For values this is the singular
    value decomposition of the stacked maps O_h W_a S^½; for a rotary pair, the leading principal component of the
    complex rows, weighted by their queries' energies. W is scaled to the mean energy of the heads that it replaces.
    """
    heads, size = features.gram.shape[1:3]
    _, vectors = torch.linalg.eigh(features.weighted_gram)
    leading = vectors[..., -size:].flip(-1).unflatten(1, (heads, size))  # (b, n, d, d), P_a
    mix, coefficients = leading.mH @ features.roots, features.inverse_roots @ leading
    own = torch.einsum("baii->b", torch.diagonal(features.gram, dim1=1, dim2=3).movedim(-1, 1)).real / heads
    shared = torch.einsum("baij,bajck,bcik->b", mix, features.gram, mix.conj()).real
    scale = torch.where(shared > 0, own / shared.clamp(min=torch.finfo(shared.dtype).tiny), 1.0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)[:, None, None, None]
    return Merge(mix * scale, coefficients / scale)


def svd_loss(features: Features) -> torch.Tensor:
    """What the readers of each block lose by `svd`, all eigenvalues but the d leading ones: (b,)."""
    size = features.gram.shape[2]
    return torch.linalg.eigvalsh(features.weighted_gram)[..., :-size].clamp(min=0).sum(dim=-1)


def square_roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B^½ and its pseudo-inverse, for each Hermitian positive B of (…, d, d)."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=0)
    alive = values > DEAD * values.amax(dim=(-1, -2), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    roots = torch.where(alive, values, 0.0).sqrt()
    inverse = torch.where(alive, 1 / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt(), 0.0)
    return vectors * roots[..., None, :] @ vectors.mH, vectors * inverse[..., None, :] @ vectors.mH


METHODS: dict[str, Callable[[Features], Merge]] = {
    "first": first,
    "random": random,
    "mean": mean,
    "aligned": aligned,
    "svd": svd,
}


def lost_energy(method: Callable[[Features], Merge], features: Features) -> torch.Tensor:
    """What the readers of each block lose by a method: (b,). For `svd` it is known without the merge."""
    return svd_loss(features) if method is svd else method(features).lost_energy(features)
