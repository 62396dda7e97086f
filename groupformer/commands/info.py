"""`groupformer info`: which query heads share which KV head, and what a checkpoint is made of."""

from typing import Annotated, Any

import typer

from .shared import LOOK, AsJson, checkpoint, print_json


SHARING = {True: "multi-head: nothing is shared", False: "grouped-query"}


def add_commands(app: typer.Typer) -> None:
    app.command("info", rich_help_panel=LOOK)(info_command)


def info_command(
    source: Annotated[
        str, typer.Argument(metavar="PATH|HUB_ID", callback=checkpoint, help="A checkpoint; only its config is read.")
    ],
    as_json: AsJson = False,
) -> None:
    """Draw which query heads share which KV head, layer by layer, and count parameters and cache.

    Example: groupformer info hub_card
    """
    from rich.console import Console

    from ..integrations.model_card import regrouping_lines
    from ..measuring import cache, planning

    native = planning.load_config(source)
    config = cache.decoder_of(native)
    caches = cache.layer_caches(config)
    facts = {"model_type": native.get_text_config(decoder=True).model_type}
    facts |= describe(config, caches, planning.parameter_counts(config)[0])
    facts |= describe_formats(native, caches)
    if facts["model_type"] != config.model_type:
        del facts["family"]  # a native model, described in the fields of a GroupFormer
    if as_json:
        print_json(facts)
        return
    console = Console(highlight=False)
    for name, value in facts.items():
        if name not in ("layers", "regrouping"):
            shown = f"{value:,}" if type(value) is int else value
            console.print(f"{name.replace('_', ' '):>28}  {shown}", soft_wrap=True)
    for line in regrouping_lines(config):
        console.print(f"{'regrouped':>28}  {line}", soft_wrap=True)
    heads = config.num_attention_heads
    for first, last, layer in runs(caches):
        name = f"layer {first}" if first == last else f"layers {first} to {last}"
        counts = f"{heads} query heads on {layer.kv_heads} KV head{'s' * (layer.kv_heads > 1)}"
        window = f", window of {layer.window:,} tokens" if layer.window else ""
        console.print(f"\n[bold]{name}[/bold]: {counts} ({sharing(heads, layer.kv_heads)}){window}")
        for line in picture(heads, layer.kv_heads, console.width):
            console.print(line)


def sharing(heads: int, kv_heads: int) -> str:
    if kv_heads == 1 and heads > 1:
        return "multi-query: all share one"
    return SHARING[heads == kv_heads]


def describe(config: Any, caches: list, parameters: int) -> dict[str, Any]:
    """What is printed, as plain data."""
    names = ["family", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    names += ["max_position_embeddings", "position_embedding_type", "norm_type", "norm_position", "mlp_type"]
    names += ["hidden_act", "is_causal"]
    facts = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    facts["head_dim"] = caches[0].head_dim
    facts["parameters"] = parameters
    facts["cache_bytes_per_token"] = 2 * sum(layer.numbers(1) for layer in caches)
    if getattr(config, "regrouping", None):
        facts["regrouping"] = config.regrouping
    facts["layers"] = [{"kv_heads": layer.kv_heads, "window": layer.window} for layer in caches]
    return facts


def describe_formats(native: Any, caches: list) -> dict[str, Any]:
    """What can hold the model as it is, and the counts of KV heads with which a class of transformers can."""
    from ..conversion.formats import classes_for
    from ..model.configuration_groupformer import divisors

    present = [layer.kv_heads for layer in caches]
    counts = [count for count in reversed(divisors(min(present))) if all(each % count == 0 for each in present)]
    able = [count for count in counts if classes_for(native, count).native]
    return {"held_by": str(classes_for(native)), "kv_heads_with_a_native_class": ", ".join(map(str, able)) or "none"}


def runs(caches: list) -> list[tuple[int, int, Any]]:
    """Neighbouring layers that are the same, folded: first, last, and what they keep."""
    folded: list[tuple[int, int, Any]] = []
    for index, layer in enumerate(caches):
        if folded and folded[-1][2] == layer:
            folded[-1] = (folded[-1][0], index, layer)
        else:
            folded.append((index, index, layer))
    return folded


def picture(heads: int, kv_heads: int, width: int) -> list[str]:
    """Two lines, or several pairs of lines where one is too narrow: query heads in boxes, their KV head below."""
    share = heads // kv_heads
    boxes = [" ".join(str(head) for head in range(group * share, (group + 1) * share)) for group in range(kv_heads)]
    lines, start = [], 0
    while start < kv_heads:
        stop, used = start, 14
        while stop < kv_heads and (stop == start or used + len(boxes[stop]) + 3 < width):
            used += len(boxes[stop]) + 3
            stop += 1
        lines.append("  query heads | " + " | ".join(boxes[start:stop]) + " |")
        lines.append("      KV head | " + " | ".join(str(g).center(len(boxes[g])) for g in range(start, stop)) + " |")
        start = stop
    return lines
