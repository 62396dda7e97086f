"""The `groupformer` command: it parses, calls and prints; the work is done by the packages that it calls.

Each module of `groupformer.commands` adds its commands to the app. Errors end the process with one line on stderr and
exit code 1; with `--debug`, anywhere in the line, the traceback is shown instead. Ctrl-C ends with exit code 130.
"""

import sys
from typing import Annotated

import typer

from . import commands
from .version import __version__


app = typer.Typer(
    name="groupformer",
    help="Transformers whose attention sharing, from multi-head to multi-query, is yours to choose and to change.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"groupformer {__version__}")
        raise typer.Exit()


@app.callback()
def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of every command; `main` takes `--debug` out of the line itself, since errors pass by this function."""


for module in commands.modules():
    module.add_commands(app)


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    try:
        app(args=[word for place, word in enumerate(arguments) if place >= end or word != "--debug"])
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"error: {message}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
