"""Where work is spread: the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from synthquant.core.errors import InputError
from synthquant.diffusion.embedding import read_embedding
from synthquant.distributed.ray_cluster import WorkerPool, ray_session
from synthquant.distributed.ray_selection import Looker, LookerTask, look_with, require_same_network
from synthquant.distributed.ray_synthesis import DrawerPool, DrawerTask
from synthquant.distributed.ray_trajectory import Recorder, RecorderTask, require_same_pipeline
from synthquant.synthesize.batches import Order, batch_sizes
from synthquant.synthesize.drawing import collect_drawn, count_redrawn
from synthquant.synthesize.self_sampling import Packed, Piece, SelfSampling, collect
from synthquant.synthesize.text_to_image import TextToImage

if TYPE_CHECKING:
    from synthquant.core.progress import Progress
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.diffusion.trajectory import Trajectory
    from synthquant.diffusion.trajectory_writer import TrajectoryWriter
    from synthquant.methods import Selector
    from synthquant.models.float_model import FloatModel
    from synthquant.select.scan import Block


@dataclass(frozen=True)
class RayWorkers:
    """The workers of a Ray cluster."""

    address: str
    """Of the cluster, `HOST:PORT` or `auto`; `local` starts one on this machine."""
    count: int | None = None
    """How many there are, each with a network of its own; none: one for each GPU, without GPUs one a machine."""

    def synthesize(
        self, method: object, model: FloatModel, count: int, rng: Rng, writer: ImageSetWriter, progress: Progress
    ) -> ImageSet:
        """Draw as `TextToImage.synthesize` does; all machines must find the generator under the same name.

        Raises `InputError` for another method, if no cluster answers, the workers open different generators, or one is
        lost again and again; `MissingExtraError` if ray is not installed; and what `TextToImage.synthesize` raises.
        """
        if not isinstance(method, TextToImage):
            raise InputError("only text_to_image and self_sampling are spread over a Ray cluster; leave --ray out")
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
            pool = DrawerPool(ray, DrawerTask(task, embedding), self.count, most=len(sizes) - writer.finished_parts)
            progress.say(f"{len(pool.workers)} workers on Ray")
            return collect_drawn(pool, method, Order(model, rng, writer, progress), sizes)

    def record(
        self,
        method: SelfSampling,
        model: FloatModel,
        count: int,
        rng: Rng,
        writer: TrajectoryWriter,
        progress: Progress,
    ) -> Trajectory:
        """Record as `SelfSampling.synthesize` does; all machines must find the pipeline under the same name.

        Raises `InputError` if no cluster answers, a worker opens another pipeline, or one is lost again and again;
        `MissingExtraError` if ray is not installed; and what `SelfSampling.synthesize` raises.
        """
        task = method.task(model, count, rng)
        with ExitStack() as stack:

            def record(pieces: Iterable[Piece]) -> Iterator[Packed]:
                given = list(pieces)
                if given:  # a trajectory that is finished needs no workers
                    ray = stack.enter_context(ray_session(self.address))
                    pool = WorkerPool(ray, Recorder, RecorderTask(model.source, task), self.count, most=len(given))
                    require_same_pipeline(pool.fingerprints, model)
                    progress.say(f"{len(pool.workers)} workers on Ray")
                    yield from pool.in_order("record", given)

            return collect(task, record, writer, progress)

    def look(
        self,
        images: ImageSet,
        model: FloatModel,
        filters: Sequence[Selector],
        batch_size: int,
        progress: Progress,
        *,
        norms: bool,
    ) -> Generator[Block]:
        """Yield what `select.scan.look` does; all machines must find the network under the same name.

        Raises `InputError` if no cluster answers, a worker opens another network, or one is lost again and again;
        `MissingExtraError` if ray is not installed; and what `select.scan.look` raises.
        """
        task = LookerTask(model.source, model.preprocess, tuple(filters), norms, batch_size)
        with ray_session(self.address) as ray:
            pool = WorkerPool(ray, Looker, task, self.count, most=-(-len(images) // batch_size))
            require_same_network(pool.fingerprints, model)
            progress.say(f"{len(pool.workers)} workers on Ray")
            yield from look_with(pool, images, batch_size)
