"""Several processes at one merge or healing, by torchrun or `accelerate launch`: they share out text, and layers.

Moments are sums over tokens, so each process measures some rows, and the sums are added. Merges of layers do not
depend on one another, so each process merges some layers. In healing each one reads some rows of every batch, and
gradients are averaged. The first process writes, into a folder that all must see.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from ..conversion.folders import written_aside
from .moments import Moment


Tensors = dict[str, torch.Tensor]


class Processes:
    """The processes of a run, and which of them this one is; by default it is the only one."""

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @classmethod
    def from_environment(cls) -> "Processes":
        """Those that torchrun or `accelerate launch` has started, connected by gloo; one without them."""
        processes = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if processes.count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return processes

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """This process's rows of token ids (batch, seq).

        Raises:
            ValueError: there are fewer rows than processes.
        """
        if len(token_ids) < self.count:
            raise ValueError(
                f"calibration has {len(token_ids)} rows for {self.count} processes; give more text, or start fewer"
            )
        return token_ids[self.rank :: self.count]

    def rows_of_batches(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """This process's rows of each batch (rows, seq), all of which are of one size.

        Raises:
            ValueError: the rows of a batch cannot be shared out evenly.
        """
        if len(batches[0]) % self.count:
            raise ValueError(
                f"batch_size ({len(batches[0])}) cannot be shared out evenly among {self.count} processes; choose a "
                "multiple, and text for at least two batches"
            )
        return [batch[self.rank :: self.count] for batch in batches]

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its mean over all processes, in place."""
        tensors = list(tensors)
        self.sum(tensors)
        for tensor in tensors if self.count > 1 else ():
            tensor /= self.count

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        number = torch.tensor(value, dtype=torch.float64)
        self.average([number])
        return number.item()

    def added(self, moments: Iterator[Moment]) -> Iterator[Moment]:
        """Each layer's moment over the rows of all processes."""
        for moment in moments:
            count = torch.tensor(float(moment.count), dtype=torch.float64)
            self.sum((moment.products, moment.total, count))
            moment.count = count.item()
            yield moment

    @contextmanager
    def workspace(self, target: Path) -> Iterator[tuple[Path, Path]]:
        """The folder that becomes the target when all went well, and one inside it for what waits."""
        paths: list[Any] = [None, None]
        if not self.is_first:
            dist.broadcast_object_list(paths)
            yield paths[0], paths[1]
            self.wait()
            return
        with written_aside(target) as aside, TemporaryDirectory(dir=aside) as scratch:
            if self.count > 1:
                dist.broadcast_object_list([aside, Path(scratch)])
            yield aside, Path(scratch)
            self.wait()

    def share_out(
        self, layers: Sequence[int], work: Callable[[int], Tensors], scratch: Path
    ) -> Callable[[int], Tensors]:
        """The work of each layer, done by one process each; with a single one, when it is asked for."""
        if self.count == 1:
            return work
        for layer_idx in layers[self.rank :: self.count]:
            torch.save(work(layer_idx), scratch / f"layer-{layer_idx}.pt")
        self.wait()
        return lambda layer_idx: torch.load(scratch / f"layer-{layer_idx}.pt", weights_only=True)


ALONE = Processes()
