"""`groupformer heal`: what a merge lost, won back layer by layer."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from .regrouping import HEAL_TOKENS, ROW_LENGTH, calibration_reader, healed_facts, uptrain_line
from .shared import (
    CONVERT,
    AsJson,
    Cost,
    Device,
    ReplaceTarget,
    ShardSize,
    Source,
    Target,
    TextColumn,
    Tokenizer,
    checkpoint,
    phases_bar,
    print_json,
    print_outcome,
    quoted,
    resumable_healing,
    tokenizer_option,
)


def add_commands(app: typer.Typer) -> None:
    app.command("heal", rich_help_panel=CONVERT)(heal_command)


def heal_command(
    student: Source,
    original: Annotated[
        str, typer.Argument(metavar="ORIGINAL", callback=checkpoint, help="What SRC was made from: folder or Hub id.")
    ],
    target: Target,
    text: Annotated[list[str], typer.Option(help="Text to learn from: files, patterns; repeatable.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to read.")] = HEAL_TOKENS,
    epochs: Annotated[
        int,
        typer.Option(min=0, help="Passes of each layer, 131,072 tokens in all at most; 0: closed form alone."),
    ] = 4,
    joint_epochs: Annotated[
        int, typer.Option(min=0, help="Passes of all layers together; 0: none, memory stays near one layer.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of single layers, as a share of each weight's size.")] = 0.03,
    row_length: Annotated[
        int, typer.Option(min=2, help="Tokens in a row; as long as your contexts, if time allows.")
    ] = ROW_LENGTH,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows in one step, of all processes together. [default: one for each]")
    ] = None,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run's layers.")] = False,
    overwrite: ReplaceTarget = False,
    max_shard_size: ShardSize = 5.0,
    as_json: AsJson = False,
) -> None:
    """Win back what a merge lost: the attention of SRC learns, layer by layer, what ORIGINAL's gives.

    Then all layers together learn ORIGINAL's next tokens, with both models in memory. Only the attention changes.
    Processes that torchrun or `accelerate launch` starts share out the rows of each batch.

    Example: groupformer heal small big healed --text book.txt
    """
    from ..conversion.folders import check_target, opened_folder
    from ..conversion.loading import best_device
    from ..regrouping.heal_folders import heal_folder, ignore_progress
    from ..regrouping.heal_recipe import HealRecipe
    from ..regrouping.processes import Processes

    processes = Processes.from_environment()
    cost, device = Cost(), best_device(device)
    reader = calibration_reader(text, text_column, tokens, tokenizer, row_length)
    recipe = HealRecipe(
        epochs=epochs,
        joint_epochs=joint_epochs,
        learning_rate=learning_rate,
        batch_size=batch_size or processes.count,
    )
    for source in (student, original):
        check_target(Path(source), target, overwrite)
    with (
        opened_folder(student) as folder,
        opened_folder(original) as original_folder,
        resumable_healing(target),
        phases_bar("healing") if processes.is_first else nullcontext(ignore_progress) as progress,
    ):
        report = heal_folder(
            folder,
            original_folder,
            target,
            reader,
            recipe,
            device=device,
            resume=resume,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            progress=progress,
            processes=processes,
        )
    if not processes.is_first:
        return
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    from .tables import print_table

    rows = [[layer.layer_idx, layer.merged, layer.solved, layer.healed] for layer in report.layers]
    print_table("Relative error of what attention adds", ["layer", "merged", "closed form", "healed"], rows)
    lines = [f"groupformer eval {quoted(target)} --file TEXT{tokenizer_option(tokenizer)}"]
    lines.append(uptrain_line(target, original, tokenizer, is_healed=True))
    print_outcome(f"{target}: healed", {**healed_facts(report), "took": cost}, lines)
