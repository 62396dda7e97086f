"""`groupformer plan`: what a checkpoint's KV cache costs, at each number of KV heads."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .shared import LOOK, AsJson, checkpoint, plural, print_json, quoted


def add_commands(app: typer.Typer) -> None:
    app.command("plan", rich_help_panel=LOOK)(plan_command)


def plan_command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="PATH|HUB_ID", callback=checkpoint, help="A checkpoint; only its config is read."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json by itself, instead of a checkpoint.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each sequence. Default: 4096, or all positions.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="Memory of the GPU, in GB (1e9 bytes).")] = 24.0,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="Bandwidth of that memory, in GB/s.")] = 1000.0,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: float32, bfloat16, float16, int8, int4.")
    ] = "bfloat16",
    cache_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the cache. Default: as the weights, at least 16 bits.")
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens whose cache the engine allots at once (vLLM: 16 on GPUs, 128 on CPUs).")
    ] = 1,
    prefill_chunk: Annotated[
        int,
        typer.Option(min=1, help="Tokens read at once, which windows hold beside (vLLM: max-num-batched-tokens)."),
    ] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file (PNG, PDF, SVG).")] = None,
    as_json: AsJson = False,
) -> None:
    """What the KV cache of any transformers decoder costs, with which number of KV heads it fits, and what holds it.

    Reads the config only. The speed is a bound: the bytes that a step must read, over the bandwidth.

    Example: groupformer plan meta-llama/Llama-2-7b-hf --context 8192 --batch 16 --gpu-memory 80 --bandwidth 3350
    """
    from ..conversion.formats import classes_for
    from ..conversion.sources import require
    from ..families.registry import is_groupformer
    from ..measuring import planning
    from .tables import print_table

    if source is None and config is None:
        raise ValueError("nothing to plan; give a folder or Hub id, or the file of --config")
    hardware = planning.hardware(gpu_memory, bandwidth, dtype, cache_dtype, block_size, prefill_chunk)
    model = planning.load_config(source, config)
    context = planning.check_context(model, context)
    plans = planning.plan(model, context, batch, hardware)
    held_by = {each.kv_heads: classes_for(model, None if each.is_present else int(each.kv_heads)) for each in plans}
    title = f"{batch} x {context:,} tokens, {gpu_memory:g} GB at {bandwidth:g} GB/s"
    if plot is not None:
        require("matplotlib", what="--plot")
        planning.draw(plans, f"{source or config}: {title}", plot)
    if as_json:
        print_json([{**dataclasses.asdict(each), "class": held_by[each.kv_heads].result} for each in plans])
        return
    columns = ["KV heads", "bytes a token", "weights GB", "cache GB", "of now", "sequences", "tokens/s <="]
    rows = [
        [
            f"{each.kv_heads}{' (now)' if each.is_present else ''}",
            f"{each.bytes_per_token:,.0f}",
            f"{each.weights / 1e9:,.2f}",
            f"{each.cache / 1e9:,.3f}",
            f"{each.share:.0%}",
            f"{each.sequences:,}",
            "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
        ]
        for each in plans
    ]
    print_table(title, columns, rows)
    if plans[0].tokens_per_second is None:
        typer.echo("No bound on the speed: a mixture of experts reads only some of its weights.")
    by_formats: dict[str, list[str]] = {}
    for count, formats in held_by.items():
        by_formats.setdefault(str(formats), []).append(str(count))
    typer.echo("Classes and files that can hold it:")
    for holder, counts in by_formats.items():
        typer.echo(f"{', '.join(counts)} KV head{'' if counts == ['1'] else 's'}: {holder}")
    is_ours = is_groupformer(model)  # its regrouped model is one too; the classes above are those to export to
    fitting = planning.recommend(plans, batch)
    if fitting is None:
        typer.echo(
            f"No count lets {batch} x {context:,} tokens fit in {gpu_memory:g} GB; choose a shorter --context, a "
            "smaller --batch, or --dtype int8"
        )
        return
    wanted = planning.next_smaller(plans, fitting) if fitting.is_present else fitting
    if fitting.is_present:
        also = "" if wanted is None else f"; with {plural(int(wanted.kv_heads), 'KV head')} {wanted.sequences:,} would"
        typer.echo(f"Recommended: as it is; {fitting.sequences:,} sequences of {context:,} tokens fit{also}")
    else:
        typer.echo(
            f"Recommended: {plural(int(fitting.kv_heads), 'KV head')}, the most with which {batch} x {context:,} "
            f"tokens fit; regroup gives {'GroupFormerForCausalLM' if is_ours else held_by[fitting.kv_heads].result}"
        )
    if wanted is not None:
        name = quoted(source or "SRC")
        typer.echo(f"next: groupformer regroup {name} DST --kv-heads {wanted.kv_heads} --calibration TEXT")
