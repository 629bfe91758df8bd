"""Text-to-image synthesis over a Ray cluster: workers draw batches, this process checks and writes them.

A batch's prompts and seeds follow from its number, so it does not matter who draws it or how often it is begun: a batch
of a lost worker is drawn again by the process that Ray starts in its place, none is missing and none is there twice.
Parts are written here, in order, so that the set is the one that a single process makes, and is resumed like it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from synthquant.core.errors import InputError, MissingExtraError, SynthquantError
from synthquant.diffusion.embedding import Embedding, read_embedding
from synthquant.synthesize.batches import batch_sizes
from synthquant.synthesize.drawing import Batch, Drawing, collect_drawn, count_redrawn
from synthquant.synthesize.text_to_image import DrawingTask, TextToImage

if TYPE_CHECKING:
    from synthquant.core.progress import Progress
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel

RESTARTS = 3
"""How often a lost worker, and what it was at, is started again."""

_AHEAD = 2
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class RayWorkers:
    """Where images are drawn: the workers of a Ray cluster."""

    address: str
    """Of the cluster, `HOST:PORT` or `auto`; `local` starts one on this machine."""
    count: int | None = None
    """How many draw, each with a generator of its own; none: one for each GPU, without GPUs one for each machine."""

    def synthesize(
        self, method: object, model: FloatModel, count: int, rng: Rng, writer: ImageSetWriter, progress: Progress
    ) -> ImageSet:
        """Draw as `TextToImage.synthesize` does; all machines must find the generator under the same name.

        Raises `InputError` for another method, if no cluster answers, the workers open different generators, or one is
        lost again and again; `MissingExtraError` if ray is not installed; and what `TextToImage.synthesize` raises.
        """
        if not isinstance(method, TextToImage):
            raise InputError("only text_to_image is spread over a Ray cluster; leave --ray out")
        sizes = batch_sizes(count, method.batch_size)
        if writer.finished_count == count:
            return writer.finish(progress, redrawn=count_redrawn(writer.written()))
        task = method.task(model, rng)
        embedding = None if method.embedding is None else read_embedding(Path(method.embedding))
        with ray_session(self.address) as ray:
            if method.tuning is not None:
                embedding = method.tune(method.open_generator(model.device), task, writer.folder, progress)
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()  # a worker may sit on the same device
            pool = WorkerPool(ray, task, embedding, self.count, most=len(sizes) - writer.finished_parts)
            progress.say(f"{len(pool.workers)} workers on Ray")
            return collect_drawn(pool, method, method.form, model, sizes, rng, writer, progress)


class Worker:
    """Runs in a process of its own: opens the generator and draws.

    On a CPU it computes in as many threads as the process that asks: sums depend on it in their last bits.
    """

    def __init__(self, task: DrawingTask, embedding: Embedding | None, threads: int) -> None:
        import ray

        device = "cuda" if ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(threads)
        self._drawing: Drawing
        self._error: SynthquantError | None = None
        try:
            self._drawing = task.drawing(task.method.open_generator(device), embedding)
        except SynthquantError as error:  # raised here, Ray would take it for a crash and start again
            self._error = error

    def fingerprint(self) -> str:
        """The generator's, its token included; raises what went wrong when it was opened."""
        if self._error is not None:
            raise self._error
        return self._drawing.fingerprint

    def pid(self) -> int:
        """Number of the process."""
        return os.getpid()

    def draw(self, numbers: range) -> tuple[Batch, list[str]]:
        """Draw a batch; returns it and the prompts that were cut."""
        return self._drawing.draw(numbers), self._drawing.cut

    def redraw(self, batch: Batch, places: list[int]) -> Batch:
        """Draw these images of a batch with their next seed; returns the batch."""
        self._drawing.usable += len(batch.slots)  # the batch has been drawn, if perhaps by another worker
        self._drawing.redraw(batch, places)
        return batch


class WorkerPool:
    """The workers as one source of batches, which come in order."""

    def __init__(
        self, ray: Any, task: DrawingTask, embedding: Embedding | None, workers: int | None, most: int
    ) -> None:
        self._ray = ray
        self.cut: list[str] = []
        total = ray.cluster_resources()
        gpus, cpus = int(total.get("GPU", 0)), max(1, int(total.get("CPU", 1)))
        wanted = workers or gpus or len(ray.nodes())
        count = max(1, min(wanted, most))
        needs = {"num_gpus": 1} if gpus else {"num_cpus": max(1, cpus // wanted)}
        if wanted > (gpus or cpus):
            raise InputError(f"{wanted} workers on a Ray cluster of {gpus} GPUs and {cpus} CPUs; ask for fewer")
        remote = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **needs)(Worker)
        self.workers = [remote.remote(task, embedding, torch.get_num_threads()) for _ in range(count)]
        found = self._get([worker.fingerprint.remote() for worker in self.workers])
        if len(set(found)) > 1:
            raise InputError(
                f"the workers open different generators under the name {task.method.generator}; give all machines the"
                " same files, and dtype if some have no GPU"
            )
        self.fingerprint: str = found[0]

    def batches(self, places: Sequence[range]) -> Iterator[Batch]:
        """Draw a batch for each range, several at a time, and yield them in order."""
        waiting: deque[Any] = deque()
        todo = enumerate(places)
        while True:
            while len(waiting) < _AHEAD * len(self.workers) and (following := next(todo, None)) is not None:
                number, numbers = following
                waiting.append(self.workers[number % len(self.workers)].draw.remote(numbers))
            if not waiting:
                return
            batch, cut = self._get(waiting.popleft())
            self.cut += [text for text in cut if text not in self.cut]
            yield batch

    def redraw(self, batch: Batch, places: Sequence[int]) -> None:
        """Draw these images of a batch with their next seed."""
        found = self._get(self.workers[0].redraw.remote(batch, list(places)))
        batch.prompts, batch.images, batch.rejected = found.prompts, found.images, found.rejected

    def _get(self, promised: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(promised)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SynthquantError):
                raise error.cause from error
            raise
        except errors.RayActorError as error:
            raise InputError(
                f"a worker of Ray was lost {RESTARTS + 1} times; what is drawn is kept, the same command goes on"
                f" ({_last_line(error)})"
            ) from error
        except errors.RayError as error:
            raise InputError(f"Ray failed: {_last_line(error)}; what is drawn is kept") from error


@contextmanager
def ray_session(address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine for `local`; what runs already in this process is used.

    Ray prints to standard output when a worker dies; meanwhile that goes to standard error.
    Raises `InputError` if nothing answers, `MissingExtraError` if ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--ray") from error
    if ray.is_initialized():
        yield ray
        return
    local = address == "local"
    if not local and address != "auto":
        _require_answer(address)
    options: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {_last_line(error)}") from error
    try:
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Look whether anybody listens there: Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise InputError(f"Ray address {address!r} is not of the form HOST:PORT; write that, auto or local")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address!r} ({error.strerror or error}); check the address, or use local"
        ) from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
