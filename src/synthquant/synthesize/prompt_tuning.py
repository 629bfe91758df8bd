"""Prompt tuning of GenQ: one token, shared by all classes, learned from a few real images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.errors import DataError, InputError
from synthquant.core.files import make_folder
from synthquant.core.locks import claimed
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.core.tensor_file import read_sealed_tensors, write_sealed_tensors
from synthquant.data.preprocess import Preprocess, input_batches
from synthquant.diffusion.embedding import Embedding, read_embedding, write_embedding
from synthquant.diffusion.latent import LatentDiffusion
from synthquant.synthesize.prompts import STYLE_TEMPLATE, require_template

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.diffusion.text_to_image import TextToImagePipeline

_ENCODED_TOGETHER = 8
# The mean over a batch of latents divides by a million: in float16 its gradients would vanish.
_FLOAT16_SCALE = 1024.0


class PromptTuning(Settings):
    """GenQ: Quantization in Low Data Regimes with Generative Synthetic Data (arXiv:2312.05272), equations 10 and 11.

    Textual inversion (arXiv:2208.01618) with one vector S for all classes: minimises over S, with Adam, the U-Net's
    error in predicting the noise of real images under the prompt "a photo of a {class} in the style of {S}". Only S is
    optimised; what else is constant (latents of the images, tokens) is computed once. The paper's 5e-4 is taken
    literally: it does not say whether it scales it with the batch, as the textual-inversion code it builds on does.
    """

    shots: int = Field(default=1, ge=1)
    """Real images of each class, drawn at random."""

    iterations: int = Field(default=50_000, ge=1)
    """Optimisation steps."""

    batch_size: int = Field(default=32, ge=1)
    """Images in one step, each with a prompt, a time and a noise of its own."""

    lr: float = Field(default=5e-4, gt=0)
    """Learning rate, constant."""

    initial_word: str = Field(default="imagenet", min_length=1)
    """Word whose embedding S starts from; the mean of its tokens' embeddings where it has several."""

    token: str = Field(default="<real>", min_length=1)
    """How S is called in prompts and in the file."""

    template: str = STYLE_TEMPLATE
    """Prompt with two places {}: for the class, then for S."""

    flip: bool = True
    """Show each image mirrored half of the time."""

    save_memory: bool = False
    """Compute activations of the U-Net twice instead of keeping them, for accelerators with little memory."""

    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two states that a killed tuning resumes from."""


@dataclass(frozen=True)
class Shots:
    """The real images, as the U-Net sees them."""

    moments: Tensor
    """float16 `[N, F, 2C, h, w]`: mean and deviation of the latents of each image and, for `F` 2, its mirror image."""
    classes: Tensor
    """int64 `[N]`."""
    fingerprint: str
    """Hash of pixels and classes."""


def tune_prompt(
    generator: TextToImagePipeline,
    images: ImageSet,
    names: Sequence[str],
    settings: PromptTuning,
    rng: Rng,
    *,
    path: Path | str | None = None,
    progress: Progress = QUIET,
) -> Embedding:
    """Learn a token from real images with labels; `names` are the classes in the order of the labels.

    With a `path` the embedding is written there as a textual-inversion file (safetensors, `{token: [1, width]}`), and a
    state beside it while the tuning lasts: the same call goes on after a kill, with the same result, and reads what is
    finished. Step `i` draws from `rng.child(f"step-{i}")` only.

    Raises `DataError` if a class has fewer images than `shots`, a label has no name or an image is broken;
    `UnsupportedModelError` if the pipeline is not of the build of Stable Diffusion; `InputError` if the token or the
    initial word does not do, the loss stops being finite, or `path` holds another embedding; `OutputError` if `path`
    cannot be written, or another process is making it.
    """
    if path is None:
        return _tune(generator, images, names, settings, rng, None, progress)
    draw_shots(images, names, settings.shots, rng)  # what cannot be drawn is said before a folder is made
    make_folder(Path(path).parent)
    with claimed(Path(path)):
        return _tune(generator, images, names, settings, rng, Path(path), progress)


def _tune(
    generator: TextToImagePipeline,
    images: ImageSet,
    names: Sequence[str],
    settings: PromptTuning,
    rng: Rng,
    path: Path | None,
    progress: Progress,
) -> Embedding:
    require_template(settings.template, places=2)
    networks = LatentDiffusion(generator)
    tokens = networks.tokenize([settings.template.format(name, settings.token) for name in names], settings.token)
    shots = _encode_shots(networks, images, names, settings, rng, progress)
    origin = _origin(settings, rng.seed, generator.fingerprint, shots.fingerprint, names)
    checkpoint = None if path is None else path.with_name(f"{path.stem}.state.safetensors")
    if path is not None and path.exists():
        embedding = read_embedding(path)
        _require_same(embedding.origin, origin, path)
        progress.say(f"{path}: this token is finished")
        # Of a tuning that was killed after its last file.
        with suppress(InputError):
            texts = {} if checkpoint is None else read_sealed_tensors(checkpoint).texts
            if checkpoint is not None and texts == {**origin, "step": texts.get("step")}:
                checkpoint.unlink()
        return embedding
    if settings.save_memory:
        networks.save_memory()
    state = TuningState.start(networks.word_vector(settings.initial_word), settings.lr)
    if checkpoint is not None and checkpoint.is_file():
        state.load(checkpoint, origin, progress)
    with progress.bar("tune prompt", settings.iterations) as bar:
        bar.advance(state.step)
        while state.step < settings.iterations:
            until = min(settings.iterations, (state.step // settings.checkpoint_every + 1) * settings.checkpoint_every)
            steps = until - state.step
            loss = _steps(networks, tokens, shots, settings, state, until, rng)
            bar.advance(steps, loss=loss)
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} before step {until}; lower lr (now {settings.lr:g}) or use dtype float32"
                )
            if checkpoint is not None:
                state.save(checkpoint, origin)
    embedding = Embedding(settings.token, state.vector.detach().cpu().view(1, -1), origin)
    if path is not None and checkpoint is not None:
        write_embedding(path, embedding)
        checkpoint.unlink(missing_ok=True)
    return embedding


@dataclass
class TuningState:
    """The vector, its optimiser and how many steps are done."""

    vector: Tensor
    """float32 `[width]`, the only parameter."""
    optimizer: torch.optim.Adam
    """Over the vector."""
    step: int = 0
    """Steps done."""

    @classmethod
    def start(cls, vector: Tensor, lr: float) -> TuningState:
        """Return the state before the first step."""
        parameter = vector.clone().requires_grad_()
        return cls(parameter, torch.optim.Adam([parameter], lr=lr))

    def save(self, path: Path, origin: dict[str, str]) -> None:
        """Write the state so that it is there whole or not at all."""
        held = self.optimizer.state[self.vector]
        tensors = {"vector": self.vector.detach(), "exp_avg": held["exp_avg"], "exp_avg_sq": held["exp_avg_sq"]}
        write_sealed_tensors(path, tensors, {**origin, "step": str(self.step)})

    def load(self, path: Path, origin: dict[str, str], progress: Progress = QUIET) -> None:
        """Take up a state; one that is not as it was written is left alone, which is said.

        Raises `InputError` if it is of another tuning.
        """
        try:
            found = read_sealed_tensors(path)
        except InputError:
            progress.warn(f"{path} is not as it was written (its hash does not fit); the tuning starts again")
            return
        _require_same(found.texts, origin, path)
        held = {name: value.to(self.vector.device) for name, value in found.tensors.items()}
        with torch.no_grad():
            self.vector.copy_(held.pop("vector"))
        self.optimizer.state[self.vector] = {"step": torch.tensor(float(found.texts["step"])), **held}
        self.step = int(found.texts["step"])


def _steps(
    networks: LatentDiffusion,
    tokens: Any,
    shots: Shots,
    settings: PromptTuning,
    state: TuningState,
    until: int,
    rng: Rng,
) -> float:
    """Take optimisation steps up to step `until`; returns their mean loss."""
    scale = _FLOAT16_SCALE if networks.dtype == torch.float16 else 1.0
    total = torch.zeros((), device=networks.device)
    steps = until - state.step
    while state.step < until:
        source = rng.child(f"step-{state.step}")
        latents, classes, noise, times = _draw(shots, settings.batch_size, networks, source)
        present, rows = torch.unique(classes, return_inverse=True)
        text = networks.text(tokens.rows(present), state.vector)[rows]
        loss = networks.loss(latents, noise, times, text)
        (gradient,) = torch.autograd.grad(loss * scale, [state.vector])
        state.vector.grad = gradient / scale
        state.optimizer.step()
        total += loss.detach()
        state.step += 1
    return float(total) / steps


def _draw(shots: Shots, count: int, networks: LatentDiffusion, rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One batch: latents drawn from their posteriors, classes, noise, times. All numbers are drawn on the CPU."""
    generator = rng.generator("batch")
    index = torch.randint(0, len(shots.classes), (count,), generator=generator)
    mirrored = torch.randint(0, shots.moments.shape[1], (count,), generator=generator)
    mean, deviation = shots.moments[index, mirrored].float().chunk(2, 1)
    latents = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    times = torch.randint(0, networks.timesteps, (count,), generator=generator)
    device = networks.device
    return latents.to(device), shots.classes[index].to(device), noise.to(device), times.to(device)


def draw_shots(images: ImageSet, names: Sequence[str], shots: int, rng: Rng) -> Tensor:
    """Positions of `shots` images of each class, int64 `[K * shots]`, class after class.

    Raises `DataError` if there are no labels, one without a name, or too few images of a class.
    """
    labels = images.labels
    if labels is None:
        raise DataError("the real images have no labels; put them into class folders")
    if int(labels.max()) >= len(names):
        raise DataError(f"the real images have labels up to {int(labels.max())} but there are {len(names)} class names")
    drawn = []
    for label, name in enumerate(names):
        places = (labels == label).nonzero().flatten()
        if len(places) < shots:
            raise DataError(
                f"class {name!r} has {len(places)} real images, shots asks for {shots}; lower it or add some"
            )
        order = torch.randperm(len(places), generator=rng.generator(f"shots of class {label}"))
        drawn.append(places[order[:shots]])
    return torch.cat(drawn)


def _encode_shots(
    networks: LatentDiffusion,
    images: ImageSet,
    names: Sequence[str],
    settings: PromptTuning,
    rng: Rng,
    progress: Progress,
) -> Shots:
    chosen = draw_shots(images, names, settings.shots, rng)
    size, half = networks.image_size, (0.5, 0.5, 0.5)
    fit = Preprocess(input_size=size, resize=max(size), mean=half, std=half, interpolation="bicubic")
    digest, moments, classes = hashlib.sha256(), [], []
    with progress.bar("encode real images", len(chosen)) as bar:
        for batch in input_batches(images, fit, _ENCODED_TOGETHER, chosen.tolist()):
            assert batch.labels is not None
            digest.update(batch.inputs.numpy().tobytes() + batch.labels.numpy().tobytes())
            views = [batch.inputs, batch.inputs.flip(3)] if settings.flip else [batch.inputs]
            # Half the memory: a thousand images of 512x512 take 130 MB.
            moments.append(torch.stack([networks.moments(view).cpu().half() for view in views], 1))
            classes.append(batch.labels)
            bar.advance(len(batch.inputs))
    found = torch.cat(classes) if classes else torch.empty(0, dtype=torch.int64)
    if len(found) < len(chosen):
        broken = images.set_aside[-1]
        raise DataError(f"{len(chosen) - len(found)} of the real images cannot be read: {broken.name}: {broken.reason}")
    return Shots(torch.cat(moments), found, digest.hexdigest())


def _origin(settings: PromptTuning, seed: int, generator: str, images: str, names: Sequence[str]) -> dict[str, str]:
    """What an embedding's result depends on, as a file's metadata."""
    return {
        "method": "prompt tuning (arXiv:2312.05272)",
        "settings": json.dumps(settings.model_dump(mode="json", exclude={"checkpoint_every", "save_memory"})),
        "seed": str(seed),
        "generator": generator,
        "images": images,
        "classes": json.dumps(list(names)),
    }


def _require_same(found: Any, origin: dict[str, str], path: Path) -> None:
    others = [key for key, value in origin.items() if found.get(key) != value]
    if others:
        raise InputError(
            f"{path} holds a token that was tuned with other {', '.join(others)}; choose another file or remove it"
        )
