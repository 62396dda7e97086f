"""The `groupformer` command: it parses, calls and prints; the work is done by the packages that it calls.

Each module of `groupformer.commands` adds its commands to the app. Errors end the process with one line on stderr and
exit code 1, or 2 where the line itself is wrong; with `--debug`, anywhere in the line, the traceback is shown instead.
Ctrl-C ends with exit code 130.
"""

import re
import sys
from typing import Annotated

import typer

from .. import commands
from ..version import __version__


# How strict dataclasses begin an error of a config: with the name of a function of ours.
VALIDATOR = re.compile(r"Class validation error for validator '\w+': (ValueError: )?")
INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="groupformer",
    help="Fewer key-value heads for the checkpoint that you have: a smaller cache, in the class that it came in.",
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
        code = app(
            args=[word for place, word in enumerate(arguments) if place >= end or word != "--debug"],
            prog_name="groupformer",
            standalone_mode=False,
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group by itself: its help, as the library means it
            typer.echo(error.ctx.get_help(), err=True)  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        if debug:
            raise
        typer.echo(f"error: {in_one_line(error)}", err=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    if code == INTERRUPTED:
        typer.echo("interrupted", err=True)
    raise SystemExit(code)


def in_one_line(error: Exception) -> str:
    """The message of an error; for a wrong command line with the help to ask for."""
    if hasattr(error, "format_message"):  # Click's, which is a part of newer Typers and a package beside older ones
        message = error.format_message().rstrip(".")
        context = getattr(error, "ctx", None)
        return " ".join(f"{message}; see {context.command_path} --help".split()) if context else message
    message = " ".join(str(error).split()) or type(error).__name__
    return VALIDATOR.sub("", message)


if __name__ == "__main__":
    main()
