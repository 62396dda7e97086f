"""`groupformer app`: a page to try a model on."""

from typing import Annotated

import typer

from .shared import RUN, Device, checkpoint


def add_commands(app: typer.Typer) -> None:
    app.command("app", rich_help_panel=RUN)(app_command)


def app_command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH|HUB_ID", callback=checkpoint, help="A decoder. Default: the checkpoint that ships."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in the browser.")] = False,
    device: Device = None,
) -> None:
    """Serve a page that regroups any decoder, generates, shows where its heads look, and plans its cache.

    Example: groupformer app runs/regrouped --port 7860
    """
    from ..conversion.sources import require

    require("gradio", "matplotlib", what="the app")
    from ..app import launch

    def on_start(address: str) -> None:
        typer.echo(f"The page is at {address} (Ctrl-C ends it)")

    launch(source, host=host, port=port, device=device, on_start=on_start, inbrowser=browser)
