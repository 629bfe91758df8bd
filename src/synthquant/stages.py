"""What a stage of a run is, what stages hand on, and the registry of those that a recipe can add.

A run does its stages one after the other: `model`, `images`, `select`, `quantize`, `checkpoint`, `evaluate`, `report`.
A further one is a `Stage` that is `Settings` as well: its fields are a section of the recipe, under its name.

    @STAGES.register("my_stage")
    class MyStage(Settings, Stage):
        \"\"\"Title of the paper (arXiv:0000.00000).\"\"\"

        name: ClassVar[str] = "my_stage"
        after: ClassVar[str] = "quantize"
        kept_by: ClassVar[str] = "checkpoint"

        def do(self, run): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from synthquant.core.processes import ALONE, Followers
from synthquant.core.progress import Progress
from synthquant.core.registry import Registry
from synthquant.core.run_folder import RunFolder

if TYPE_CHECKING:
    from synthquant.data.image_set import ImageSet
    from synthquant.diffusion.trajectory import Trajectory
    from synthquant.models.float_model import FloatModel
    from synthquant.nn.quant_model import QuantModel
    from synthquant.recipe import Recipe


@dataclass
class Run:
    """What the stages of a run share, and what each hands on to the next."""

    folder: RunFolder
    """Where everything is kept."""
    recipe: Recipe
    """What was asked for."""
    model: FloatModel
    """The trained network."""
    progress: Progress
    """Told how far it is."""
    real: ImageSet | None = None
    """Images to measure on; none: those to quantize with."""
    images: ImageSet | Trajectory | None = None
    """Images to quantize with, or what a denoiser was given; none: there are none yet, or the step makes its own."""
    quant_model: QuantModel | None = None
    """The quantized network, once there is one."""
    followers: Followers = field(default_factory=lambda: Followers(ALONE))
    """Other processes, which do their part of what they are called to."""


class Stage(ABC):
    """One step of a run, which its record lists with time, memory and what was measured."""

    name: ClassVar[str]
    """Its name in the record."""
    after: ClassVar[str] = ""
    """The stage that it follows; of stages that a recipe adds."""
    kept_by: ClassVar[str] = ""
    """The stage whose files hold what this one makes, which is done again until that one is done; empty: itself."""

    def is_done(self, folder: RunFolder) -> bool:
        """Return whether a run has no need to do it again."""
        return folder.is_done(self.kept_by or self.name)

    def files(self, folder: RunFolder) -> Path | None:
        """Return the file or folder that it writes into the run; none: it writes none of its own."""
        return None

    def require_files(self, folder: RunFolder) -> None:  # noqa: B027 (most write no files)
        """Raise `InputError` if its files are not as they were written."""

    def check(self, run: Run) -> None:  # noqa: B027 (nor is there always something to check)
        """Raise what can be known to be wrong before any stage is done."""

    def space(self, run: Run) -> dict[str, int]:
        """Return the bytes that it will take on the disk beside what is there, by what for; at least."""
        return {}

    @abstractmethod
    def do(self, run: Run) -> dict[str, Any]:
        """Do the work, hand on what comes of it in `run`, and return what was measured, JSON values only."""

    def take_up(self, run: Run) -> None:  # noqa: B027 (or to hand on)
        """Hand on what was made in an earlier call."""


STAGES: Registry[type[Stage]] = Registry("stage of a run", home="synthquant.api")
