"""What the commands share: options that mean the same everywhere, bars that show progress, and results as JSON."""

import contextlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..conversion.sources import check_source, check_tokenizer_source


LOOK, TRAIN, CONVERT, RUN = "Look", "Measure and train", "Regroup and convert", "Run and share"


class Dtype(str, Enum):
    """What a loaded model computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TrainingDtype(str, Enum):
    """What training computes in; weights and optimizer stay in float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"

    def as_bf16(self) -> bool | None:
        """The recipes' field `bf16`."""
        return None if self is TrainingDtype.auto else self is TrainingDtype.bfloat16


checkpoint = check_source

Source = Annotated[
    str, typer.Argument(metavar="SRC", callback=checkpoint, help="Folder, GGUF file, PEFT adapter or Hub id.")
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="What to write; it appears when it is whole.")]
ReplaceTarget = Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")]
ShardSize = Annotated[float, typer.Option(min=0.001, help="Largest file of weights to write, in GB (1e9 bytes).")]

Output = Annotated[Path, typer.Option(help="Folder of checkpoints and of the final model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")]
KeepCheckpoints = Annotated[
    bool, typer.Option("--keep-checkpoints", help="Keep the last ones, to --resume later and train longer.")
]
TextColumn = Annotated[str, typer.Option(help="The column with the text.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(callback=check_tokenizer_source, help="Folder, GGUF file or Hub id. Default: the model's."),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto keeps the checkpoint's.")]
TrainingDtypeOption = Annotated[
    TrainingDtype, typer.Option(help="bfloat16 is autocast. auto: bfloat16 on a GPU that has it, else float32.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: the best there is.")]
TrainingDevice = Annotated[
    str | None, typer.Option(help="cpu, or the kind of accelerator there is. Default: the best there is.")
]


class TrainingInterruptedError(Exception):
    """Ctrl-C with something to say about it; `main` prints it, and exits with this code."""

    exit_code = 130


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Ctrl-C in a training run: says how to go on, where a checkpoint was saved; else nothing is left behind."""
    existed = output.exists()
    try:
        yield
    except KeyboardInterrupt:
        from ..training.run import last_checkpoint

        checkpoint = last_checkpoint(output) if output.is_dir() else None
        if checkpoint is not None:
            raise TrainingInterruptedError(
                f"interrupted; {checkpoint} is saved: type the same line with --resume to go on"
            ) from None
        if not existed:
            shutil.rmtree(output, ignore_errors=True)
        raise


@contextmanager
def resumable_healing(target: Path) -> Iterator[None]:
    """Ctrl-C while a model heals: says how to go on where a merge or healed layers wait; else leaves nothing."""
    try:
        yield
    except KeyboardInterrupt:
        from ..regrouping.heal_folders import SETTINGS, merged_folder, work_folder

        work, merged = work_folder(target.expanduser()), merged_folder(target.expanduser())
        layers = len(list(work.glob("layer-*.safetensors")))
        if layers or (merged / SETTINGS).exists():
            saved = plural(layers, "healed layer") if layers else "the merge"
            raise TrainingInterruptedError(
                f"interrupted; {saved} saved: type the same line with --resume to go on"
            ) from None
        for folder in (work, merged):
            shutil.rmtree(folder, ignore_errors=True)
        raise


class Cost:
    """What a command costs, counted from where it is made: seconds, and the most memory that the process held."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started
        minutes, rest = divmod(round(seconds), 60)
        taken = f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
        peaks = [f"peak memory {in_units(size)}{where}" for where, size in self.peaks() if size]
        return ", ".join([taken, *peaks])

    @staticmethod
    def peaks() -> list[tuple[str, int]]:
        """Where memory was held, and the most bytes there."""
        found = []
        with contextlib.suppress(ImportError):  # Windows has no such module
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found.append(("", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            found.append((" on the GPU", torch.cuda.max_memory_allocated()))
        return found


def in_units(size: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def size_on_disk(path: Path) -> str:
    """Bytes of a file, or of the weights of a checkpoint folder."""
    weights = ("*.safetensors", "*.bin")
    files = [file for pattern in weights for file in path.glob(pattern)] if path.is_dir() else [path]
    return in_units(sum(file.stat().st_size for file in files))


def describe_heads(config: Any) -> str:
    """The query and KV heads of a decoder, e.g. "32 query heads on 8 KV heads, 32 layers"."""
    from ..measuring.cache import decoder_of, layer_caches

    config = decoder_of(config)
    counts = [layer.kv_heads for layer in layer_caches(config)]
    uniform = len(set(counts)) == 1
    kv_heads = plural(counts[0], "KV head") if uniform else f"{min(counts)} to {max(counts)} KV heads by layer"
    return f"{plural(config.num_attention_heads, 'query head')} on {kv_heads}, {plural(len(counts), 'layer')}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def describe_cache(config: Any, before: Any = None) -> str:
    """Bytes of cache a token, and what they were in another config."""
    from ..measuring.cache import cache_bytes_per_token

    size = cache_bytes_per_token(config)
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    if before is None:
        return f"{size:,} bytes a token in {dtype}"
    old = cache_bytes_per_token(before, config.dtype)
    return f"{old:,} -> {size:,} bytes a token in {dtype} ({size / old:.0%})"


def print_outcome(made: str, facts: Mapping[str, Any], next_lines: Sequence[str]) -> None:
    """How a command that makes something ends: what it made, figures of it, its cost, and what to type next.

    Example:
        small: LlamaForCausalLM, 9 query heads on 1 KV head, 30 layers
          cache  46,080 -> 15,360 bytes a token in bfloat16 (33%)
          size   260.1 MB
          took   12.3 s, peak memory 1.20 GB
        next:  groupformer eval small --file TEXT
    """
    typer.echo(made)
    width = max(map(len, [*facts, "next"]), default=0)
    for name, value in facts.items():
        typer.echo(f"  {name:<{width}}  {value}")
    for index, line in enumerate(next_lines):
        typer.echo(f"{'next:' if index == 0 else '':<{width + 2}}  {line}")


def quoted(path: Any) -> str:
    """A path in a line to type next, as a shell reads it."""
    return shlex.quote(str(path))


def tokenizer_option(tokenizer: str | None) -> str:
    """The end of a line to type next, where the user named a tokenizer: the result's folder may have none."""
    return "" if tokenizer is None else f" --tokenizer {quoted(tokenizer)}"


def print_json(results: Any) -> None:
    typer.echo(json.dumps(results, indent=2))


@contextmanager
def stdout_for_results(as_json: bool) -> Iterator[None]:
    """Trainer prints what it logs; with `--json`, stdout holds the results alone."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


@contextmanager
def bytes_bar(verb: str) -> Iterator[Any]:
    """A bar on stderr of shards and bytes, with rate and remaining time; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar, removed_by_errors(bar):
        task = bar.add_task(verb, total=None)

        def advance(shard: int, shards: int, written: int, total: int) -> None:
            bar.update(task, description=f"{verb} shard {shard}/{shards}", total=total, advance=written)

        yield advance


@contextmanager
def removed_by_errors(bar: Any) -> Iterator[None]:
    """A bar that stood still would only hide the error's line."""
    try:
        yield
    except BaseException:
        bar.live.transient = True
        raise


def bar_for_large(source: str) -> None:
    """Turns transformers' bar of loading off where a folder's weights, below 1 GB, load at once."""
    from transformers.utils import logging

    sizes = [file.stat().st_size for file in Path(source).glob("*.safetensors")]
    if sizes and sum(sizes) < 1e9:
        logging.disable_progress_bar()


@contextmanager
def counting_bar(verb: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr of things done, with rate and remaining time; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Any) -> str:
            return f"{task.speed:,.1f} {unit}/s" if task.speed else ""

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def phases_bar(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr of one phase after the other, with remaining time; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"{verb}: {what}", total=total)
            bar.update(tasks[what], completed=done)

        yield advance
