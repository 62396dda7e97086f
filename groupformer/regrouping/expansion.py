"""More key-value heads, exactly the same function: for tensor parallel ranks, and engines that want certain counts.

Each key-value head is repeated, and each copy serves a part of its queries. Where the parts are not equal, query heads
that give nothing fill them up.
"""

from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from .attention import find_attention
from .heads import AttentionHeads
from .layouts import AttentionLayout
from .memory import build_regrouped
from .request import check_is_number
from .result import Result, find_result, with_provenance
from .sources import ModelSource, Source


Model = TypeVar("Model", bound=PreTrainedModel)


def expand(model: Model, num_key_value_heads: int) -> Model | Any:
    """The same function with more key-value heads.

    Args:
        model: Any decoder of transformers or any GroupFormer; it stays as it is.
        num_key_value_heads: The new count, of all layers. Where it is no multiple of the present count that divides
            the query heads, query heads whose output is zero are added, as few as will do.

    Returns:
        A new model of the same class, dtype, device and mode. `config.regrouping` records what was done.

    Raises:
        ValueError: fewer heads than now, or a count that this class cannot hold or that is not exact; the message
            names the counts and the remedy.
    """
    source = ModelSource(model)
    layouts, result = plan_expansion(source, num_key_value_heads)
    attention = {
        layout.path: expanded_tensors(source, layout, new_layout)
        for layout, new_layout in zip(layouts, result.layouts)
    }
    return build_regrouped(model, result, attention)


def plan_expansion(source: Source, count: int) -> tuple[list[AttentionLayout], Result]:
    """The present attention, and the config and attention of the result.

    Raises:
        ValueError: as `expand`.
    """
    check_is_number(count)
    layouts = find_attention(source.model_class, source.config)
    present = sorted({layout.geometry.num_key_value_heads for layout in layouts})
    heads = layouts[0].geometry.num_heads
    if count < present[-1]:
        raise ValueError(f"num_key_value_heads ({count}) is less than the {present[-1]} there are; use regroup")
    sizes = {queries_per_key(heads, groups, count) for groups in present}
    if len(sizes) > 1:
        raise ValueError(
            f"num_key_value_heads ({count}) would need another number of query heads in layers with {present[0]} and "
            f"with {present[-1]} key-value heads; choose a multiple of both that divides {heads}"
        )
    size = sizes.pop()
    for padded in (size * count, (size + 1) * count, (size + 2) * count):  # some classes want a divisor of their width
        if padded != heads:
            check_can_pad(layouts, padded, count)
        result = find_result(source.model_class, source.config, layouts, [count] * len(layouts), padded)
        if result is not None:
            return layouts, with_provenance(result, layouts, method="expand", query_heads=padded)
    raise ValueError(
        f"num_key_value_heads ({count}): {source.model_class.__name__} has no config for {size * count} query and "
        f"{count} key-value heads; choose another count, or import the model into GroupFormer first"
    )


def queries_per_key(heads: int, groups: int, count: int) -> int:
    """Query heads that each of `count` key-value heads must serve, when `groups` heads are repeated evenly enough."""
    served = heads // groups
    return -(-served // (count // groups))


def check_can_pad(layouts: list[AttentionLayout], padded: int, count: int) -> None:
    """Refuses further query heads where they would change the function."""
    heads = layouts[0].geometry.num_heads
    for layout in layouts:
        reason = None
        if not layout.can_move:
            reason = "with ALiBi, slopes belong to places"
        elif layout.geometry.qk_norm == "projection":
            reason = "a norm over all queries would count them"
        if reason:
            raise ValueError(
                f"num_key_value_heads ({count}) needs {padded} query heads instead of {heads}, which is not exact "
                f"here: {reason}; choose a multiple of {layout.geometry.num_key_value_heads} that divides {heads}"
            )


def expanded_tensors(source: Source, layout: AttentionLayout, new: AttentionLayout) -> dict[str, torch.Tensor]:
    """All tensors of an attention module with repeated key-value heads."""
    tensors = source.read_module(layout.path)
    heads = layout.read_heads(tensors)
    return new.write_heads(expanded(heads, new.geometry.num_heads, new.geometry.num_key_value_heads), tensors)


def expanded(heads: AttentionHeads, num_heads: int, count: int) -> AttentionHeads:
    """Heads with `count` key-value heads and `num_heads` query heads, the function unchanged."""
    groups, size = len(heads.key), num_heads // count
    copies = [count // groups + (group < count % groups) for group in range(groups)]
    keys = [group for group in range(groups) for _ in range(copies[group])]
    queries: list[int | None] = []
    for group in range(groups):
        served = heads.query_heads_of([group])
        queries += served + [None] * (copies[group] * size - len(served))
    padding = torch.tensor([query is None for query in queries])
    order = [0 if query is None else query for query in queries]

    def of_queries(tensor: torch.Tensor, is_zero_where_padded: bool = False) -> torch.Tensor:
        new = tensor[order]
        if is_zero_where_padded:
            new[padding] = 0
        return new

    return replace(
        heads,
        query=of_queries(heads.query),
        key=heads.key[keys],
        value=heads.value[keys],
        output=of_queries(heads.output, is_zero_where_padded=True),
        query_norms={part: of_queries(norm) for part, norm in heads.query_norms.items()},
        key_norms={part: norm[keys] for part, norm in heads.key_norms.items()},
        per_head={name: of_queries(tensor) for name, tensor in heads.per_head.items()},
    )
