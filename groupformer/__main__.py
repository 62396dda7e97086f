"""`python -m groupformer` and the console script `groupformer`: Ctrl-C is one line from the first moment on."""

import os
import signal
import sys


INTERRUPTED = 128 + signal.SIGINT  # as shells count


NO_WORK = (
    "groupformer.__main__",
    "groupformer.commands",
    "groupformer.integrations.imports",
    "groupformer.integrations.peft",
    "groupformer.integrations.registration",
)


def main() -> None:
    """Run the command line; until a command works, Ctrl-C ends the process at once."""
    signal.signal(signal.SIGINT, end_or_interrupt)
    from .commands.main import main

    main()


def end_or_interrupt(signal_number, frame) -> None:
    """Ctrl-C: while modules are imported and no work has begun, end here; later raise KeyboardInterrupt as usual.

    An interrupted import can lose the exception, or say something else. A command that works puts its things in order.
    """
    importing = False
    while frame is not None:
        importing = importing or frame.f_code.co_filename.startswith("<frozen importlib")
        if is_work(frame):
            raise KeyboardInterrupt
        frame = frame.f_back
    if not importing:
        raise KeyboardInterrupt
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def is_work(frame) -> bool:
    """Whether a function of the package runs there that is no command, and not only registers the architecture."""
    module = str(frame.f_globals.get("__name__"))
    return (
        module.startswith("groupformer.")
        and not module.startswith(NO_WORK)
        and frame.f_code.co_name not in ("<module>", "__getattr__")
    )


if __name__ == "__main__":
    main()
