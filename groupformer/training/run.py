"""What every training run needs: an output folder that loses nothing, checkpoints to resume from, and Ctrl-C."""

import json
import shutil
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


def prepare_output(output: Path, *, resume: bool, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Makes the output folder, or empties it where `overwrite` says so.

    Args:
        output: The folder.
        resume: Keep what is in it.
        overwrite: Delete what is in it.
        inputs: Files and folders that the run reads, which are never deleted.

    Raises:
        ValueError: the folder is not empty and neither `resume` nor `overwrite` is given, or it is a file or one of
            the inputs, or emptying it would delete an input or the folder that one works in.
    """
    inputs = list(inputs)
    if output.is_file():
        raise ValueError(f"output ({output}) is a file; choose a folder")
    check_output_is_no_source(output, [path for path in inputs if Path(path).resolve() == output.resolve()])
    if output.is_dir() and any(output.iterdir()):
        if overwrite and not resume:
            keep = [Path.cwd(), Path.home(), *(Path(path).resolve() for path in inputs)]
            lost = [path for path in keep if path.is_relative_to(output.resolve())]
            if lost:
                raise ValueError(f"output ({output}) holds {lost[0]}, which overwrite would delete; choose another")
            shutil.rmtree(output.resolve())
        elif not resume:
            raise ValueError(f"output ({output}) is not empty; choose another folder, or pass --resume or --overwrite")
    output.mkdir(parents=True, exist_ok=True)


def check_output_is_no_source(output: Path, sources: Iterable[str | Path]) -> None:
    """Refuses an output that is a folder which the run reads, or lies inside one: its files would be written over.

    Raises:
        ValueError: such an output, whether it is to be resumed or not.
    """
    for source in map(Path, sources):
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"output ({output}) is, or lies inside, {source}, which is read; choose another folder")


def last_checkpoint(output: Path) -> str | None:
    """The newest whole checkpoint in a folder of training runs, or `None`.

    Trainer writes its state last, so a checkpoint without a readable one was cut off; it is passed over.
    """
    whole = [path for path in output.glob("checkpoint-*") if is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def remove_checkpoints(output: Path) -> None:
    """Remove what only resuming needs: float32 weights and the optimizer's state, six times the result's size."""
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def write_results(trainer: Trainer, output: Path, results: dict[str, Any], *, keep_checkpoints: bool) -> None:
    """Ends a run whose model is saved: results and log beside it; its checkpoints go, unless they are to be kept."""
    if not trainer.is_world_process_zero():
        return
    content = json.dumps({**results, "log": trainer.state.log_history}, indent=2)
    (output / "results.json").write_text(content, encoding="utf-8")
    if not keep_checkpoints:
        remove_checkpoints(output)


def check_resumable(output: Path) -> None:
    """Refuses to resume a run that is finished, and whose checkpoints are gone.

    Raises:
        ValueError: such an output.
    """
    if (output / "results.json").exists() and last_checkpoint(output) is None:
        raise ValueError(
            f"output ({output}) holds a finished run without checkpoints, so there is nothing to resume; train its "
            "model further in another --output, or pass --keep-checkpoints before"
        )


def is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return checkpoint.name.split("-")[-1].isdigit()


class SaveOnInterrupt(TrainerCallback):
    """Turns Ctrl-C into an orderly stop: the step ends, a checkpoint is saved, and KeyboardInterrupt is raised.

    A callback of Trainer and a context around `trainer.train()`. A second Ctrl-C stops at once, without saving; so
    does the first one before the first step has ended, while a long evaluation may run: there is nothing to save.
    Outside the main thread Python allows no handlers; there it does nothing.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.has_progress = False
        self.previous: Any = None

    def __enter__(self) -> "SaveOnInterrupt":
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.previous)
        if self.interrupted and error is None:
            raise KeyboardInterrupt

    def handle(self, signal_number, frame) -> None:
        if self.interrupted or not self.has_progress:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        self.has_progress = True
        # After the last step of an epoch its evaluation comes first, which a resumed run would not make up for.
        if self.interrupted and state.epoch != int(state.epoch):
            control.should_save = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
        return control

    def on_save(self, args, state, control, **kwargs):
        # Stopping through `control` would evaluate first, move the random numbers, and perhaps delete this checkpoint.
        if self.interrupted:
            raise KeyboardInterrupt


class EpochLengthSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that depends on seed and epoch only.

    Transformers' own sampler draws from the global generator, so a resumed epoch would see other batches.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class LengthGroupedTrainer(Trainer):
    """Trainer whose batches hold rows of like length, also after a resume in the middle of an epoch."""

    def _get_train_sampler(self, train_dataset=None):
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler([len(input_ids) for input_ids in rows["input_ids"]], batch_size, self.args.seed)
