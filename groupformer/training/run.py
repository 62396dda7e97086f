"""What every training run needs: an output folder that loses nothing, checkpoints to resume from, and Ctrl-C."""

import shutil
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


def prepare_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes the output folder, or empties it where `overwrite` says so.

    Raises:
        ValueError: the folder is not empty and neither `resume` nor `overwrite` is given, or it is a file.
    """
    if output.is_file():
        raise ValueError(f"output ({output}) is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()):
        if overwrite and not resume:
            shutil.rmtree(output)
        elif not resume:
            raise ValueError(f"output ({output}) is not empty; choose another folder, or pass --resume or --overwrite")
    output.mkdir(parents=True, exist_ok=True)


def last_checkpoint(output: Path) -> str | None:
    """The newest whole checkpoint in a folder of training runs, or `None`.

    Trainer writes its state last, so a checkpoint without it was cut off; it is passed over.
    """
    whole = [path for path in output.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    newest = get_last_checkpoint(str(output))
    if newest is None or Path(newest) in whole:
        return newest
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


class SaveOnInterrupt(TrainerCallback):
    """Turns Ctrl-C into an orderly stop: the step ends, a checkpoint is saved, and KeyboardInterrupt is raised.

    A second Ctrl-C stops at once, without saving.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.previous: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, signal_number, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)
        if self.interrupted:
            raise KeyboardInterrupt
