"""Where the heads are in the tensors of an attention module, and how to get them out and in again."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .heads import AttentionHeads, Geometry


# Names of an attention module's children, by role.
ROLES = {
    "query": r"q_proj|query|wq|q",
    "key": r"k_proj|key|wk|k",
    "value": r"v_proj|value|wv|v",
    "fused": r"qkv_proj|query_key_value|c_attn|Wqkv|qkv|in_proj|W_pack",
    "output": r"o_proj|out_proj|dense|c_proj|wo|o|out",
    "query_norm": r"(q|query)_(norm|layernorm)",
    "key_norm": r"(k|key)_(norm|layernorm)",
}


@dataclass(frozen=True)
class AttentionLayout:
    """Where the heads of one attention layer are in its tensors.

    Args:
        path, layer_path: Names of the attention module and its layer in the model, e.g. "model.layers.0.self_attn".
        norm_path: Name of the norm whose output it reads, if any.
        names: Role (see `ROLES`) to the child's name.
        geometry: Shapes and freedoms of the heads.
        order: "separate" projections, or a fused one: "stacked" as [q; k; v], or "grouped", each key-value head after
            its queries.
        is_transposed: Whether weights are (inputs, outputs), as in GPT-2's Conv1D.
        is_interleaved: Whether RoPE rotates neighbouring features, not halves.
        has_bias: Whether any of the projections to queries, keys and values has a bias.
        per_head: Names of further tensors with one entry for each query head, e.g. attention sinks.
        can_move: Whether heads may change places; with ALiBi, slopes belong to places.
    """

    path: str
    layer_path: str
    norm_path: str | None
    names: Mapping[str, str]
    geometry: Geometry
    order: str
    is_transposed: bool
    is_interleaved: bool
    has_bias: bool
    per_head: tuple[str, ...]
    can_move: bool

    @property
    def input_name(self) -> str:
        """The child that reads the attention's inputs first."""
        return self.names["query" if self.order == "separate" else "fused"]

    def read_heads(self, tensors: Mapping[str, torch.Tensor]) -> AttentionHeads:
        """The heads of an attention module's tensors ("q_proj.weight", …), in float64."""
        geometry = self.geometry
        if self.order == "separate":
            query, key, value = (self._read_rows(tensors, self.names[role]) for role in ("query", "key", "value"))
        else:
            query, key, value = self._split_fused(self._read_rows(tensors, self.names["fused"]))
        output = tensors[f"{self.names['output']}.weight"].double()
        output = output.T if self.is_transposed else output
        return AttentionHeads(
            query=self._to_halves(query),
            key=self._to_halves(key),
            value=value,
            output=output.unflatten(1, (-1, geometry.head_dim)).transpose(0, 1),
            query_norms=self._read_norms(tensors, "query_norm"),
            key_norms=self._read_norms(tensors, "key_norm"),
            geometry=geometry,
            has_bias=self.has_bias,
            per_head={name: tensors[name].double() for name in self.per_head},
        )

    def write_heads(self, heads: AttentionHeads, originals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All tensors of the module for these heads, in the originals' dtypes; what holds no heads is copied."""
        query, key, value = self._from_halves(heads.query), self._from_halves(heads.key), heads.value
        if self.order == "separate":
            rows = {self.names["query"]: query, self.names["key"]: key, self.names["value"]: value}
        else:
            rows = {self.names["fused"]: self._join_fused(query, key, value)}
        new: dict[str, torch.Tensor] = {}
        for name, weights in rows.items():
            weights = weights.flatten(0, 1)
            weight = weights[:, :-1] if self.has_bias else weights
            new[f"{name}.weight"] = weight.T if self.is_transposed else weight
            if f"{name}.bias" in originals:
                new[f"{name}.bias"] = weights[:, -1]
        output = heads.output.transpose(0, 1).flatten(1)
        new[f"{self.names['output']}.weight"] = output.T if self.is_transposed else output
        new |= self._write_norms(heads.query_norms, "query_norm", originals)
        new |= self._write_norms(heads.key_norms, "key_norm", originals)
        new |= heads.per_head
        kept = {name: tensor for name, tensor in originals.items() if not self.is_head_norm(name)}
        dtypes = {name: tensor.dtype for name, tensor in originals.items()}
        some = dtypes[f"{self.names['output']}.weight"]
        return {
            name: tensor.to(dtypes.get(name, some), copy=True).contiguous() for name, tensor in (kept | new).items()
        }

    # Projections -----------------------------------------------------------------------------------------------------

    def _read_rows(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """A projection's rows (N, D, E); a bias is the last column, 0 where only its neighbours have one."""
        weight = tensors[f"{name}.weight"].double()
        weight = weight.T if self.is_transposed else weight
        if self.has_bias:
            bias = tensors.get(f"{name}.bias", weight.new_zeros(len(weight))).double()
            weight = torch.cat((weight, bias[:, None]), dim=1)
        return weight.unflatten(0, (-1, self.geometry.head_dim))

    def _split_fused(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads, groups = self.geometry.num_heads, self.geometry.num_key_value_heads
        if self.order == "stacked":
            return rows.split((heads, groups, groups))
        by_group = rows.unflatten(0, (groups, heads // groups + 2))
        return by_group[:, :-2].flatten(0, 1), by_group[:, -2], by_group[:, -1]

    def _join_fused(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.order == "stacked":
            return torch.cat((query, key, value))
        by_group = query.unflatten(0, (len(key), -1))
        return torch.cat((by_group, key[:, None], value[:, None]), dim=1).flatten(0, 1)

    def _to_halves(self, rows: torch.Tensor) -> torch.Tensor:
        """Rotary pairs (2j, 2j + 1) to (j, j + rotary_dim / 2)."""
        size = self.geometry.rotary_dim
        if not self.is_interleaved:
            return rows
        return torch.cat((rows[:, 0:size:2], rows[:, 1:size:2], rows[:, size:]), dim=1)

    def _from_halves(self, rows: torch.Tensor) -> torch.Tensor:
        size = self.geometry.rotary_dim
        if not self.is_interleaved:
            return rows
        pairs = torch.stack((rows[:, : size // 2], rows[:, size // 2 : size]), dim=2).flatten(1, 2)
        return torch.cat((pairs, rows[:, size:]), dim=1)

    # Norms with weights for each head: (N * D,), (N, D), or a list of N norms ----------------------------------------

    def is_head_norm(self, name: str) -> bool:
        """Whether this tensor belongs to a norm with other weights for each head."""
        stems = [self.names.get(role) for role in ("query_norm", "key_norm")]
        return self.geometry.has_norm_by_head and any(stem and name.startswith(f"{stem}.") for stem in stems)

    def _read_norms(self, tensors: Mapping[str, torch.Tensor], role: str) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {}
        for name in sorted((name for name in tensors if self.is_head_norm(name)), key=numbers_in):
            if name.startswith(f"{self.names[role]}."):
                found.setdefault(name.rpartition(".")[2], []).append(tensors[name].double().flatten())
        size = self.geometry.head_dim
        return {part: self._to_halves(torch.cat(norms).unflatten(0, (-1, size))) for part, norms in found.items()}

    def _write_norms(
        self, norms: Mapping[str, torch.Tensor], role: str, originals: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for part, norm in norms.items():
            norm = self._from_halves(norm)
            name = f"{self.names[role]}.{part}"
            if name in originals:
                new[name] = norm.flatten() if originals[name].ndim == 1 else norm
                continue
            first = min((each for each in originals if each.startswith(f"{self.names[role]}.")), key=numbers_in)
            for head, weights in enumerate(norm):
                new[re.sub(r"\.\d+\.\w+$", f".{head}.{part}", first)] = weights
        return new


def numbers_in(name: str) -> list[int]:
    """The numbers in a tensor's name, to sort by."""
    return [int(number) for number in re.findall(r"\d+", name)]
