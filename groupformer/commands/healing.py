"""`groupformer heal`: what a merge lost, won back layer by layer."""

from typing import Annotated

import typer

from .regrouping import calibration_reader
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
    counting_bar,
    print_json,
    print_outcome,
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
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of it to read.")] = 65536,
    epochs: Annotated[int, typer.Option(min=0, help="Passes over them; 0 is the closed form alone.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Highest, as a share of each weight's size.")] = 0.03,
    row_length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 512,
    text_column: TextColumn = "text",
    tokenizer: Tokenizer = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run's layers.")] = False,
    overwrite: ReplaceTarget = False,
    max_shard_size: ShardSize = 5.0,
    as_json: AsJson = False,
) -> None:
    """Win back what a merge lost: the attention of SRC learns, layer by layer, what ORIGINAL's gives.

    It streams: memory stays near one layer of each model, and nothing but the attention changes.

    Example: groupformer heal small big healed --text book.txt
    """
    from ..conversion.loading import best_device
    from ..regrouping.heal import HealRecipe, LayerReport
    from ..regrouping.heal_folders import heal_folder

    cost = Cost()
    recipe = HealRecipe(epochs=epochs, learning_rate=learning_rate)
    with counting_bar("healing", None, "layers") as advance:

        def show(report: LayerReport, layers: int) -> None:
            advance(1)

        reports = heal_folder(
            student,
            original,
            target,
            calibration_reader(text, text_column, tokens, tokenizer, row_length),
            recipe,
            device=best_device(device),
            resume=resume,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            progress=show,
        )
    rows = [[report.layer_idx, report.merged, report.solved, report.healed] for report in reports]
    if as_json:
        print_json([vars(report) for report in reports])
        return
    from .tables import print_table

    print_table("Relative error of what attention adds", ["layer", "merged", "closed form", "healed"], rows)
    failed = [str(report.layer_idx) for report in reports if not report.is_healed]
    if failed:
        typer.echo(f"kept as they were merged (loss not finite, or not lower): layers {', '.join(failed)}", err=True)
    print_outcome(f"{target}: healed", {"took": cost}, [f"groupformer eval {target} --file TEXT"])
