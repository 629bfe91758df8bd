"""What networks are measured on: images with labels, or samples, and targets for a metric of the user's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from synthquant.core.errors import DataError, InputError
from synthquant.core.progress import Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.targets import Targets
from synthquant.evaluate.metrics import Metric, Values, measure_metrics, metrics_for, metrics_of
from synthquant.evaluate.section import EvaluateSection
from synthquant.models.class_labels import Classes, in_classes_of
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import Samples, spread


@dataclass(frozen=True)
class Data:
    """What networks are measured on."""

    images: ImageSet | Samples
    """With labels, or without where there is a float network to agree with; samples for a network that takes no images
    and is no classifier."""
    name: str
    """Where they come from, for messages."""
    batch_size: int = EvaluateSection.model_fields["batch_size"].default
    """Images per forward pass, fewer where activations are large."""
    metric: Metric | None = None
    """A metric of the user's."""
    beside: Targets | None = None
    """Targets other than the labels of the images."""

    @classmethod
    def of(cls, section: EvaluateSection) -> Data:
        """Return the images of a section and its metric; raises as `open_images` and `open_metric`."""
        metric = None if section.metric is None else Metric.of(section.metric)
        images = section.open()
        beside = None if section.targets is None else Targets.of(images, section.targets)
        return cls(images, section.data, section.batch_size, metric, beside)

    def in_classes_of(self, classes: Classes, progress: Progress) -> Data:
        """Return the same with labels that are classes of the network."""
        return replace(self, images=in_classes_of(self.pictures, classes, self.name, progress))

    @property
    def pictures(self) -> ImageSet:
        """The images; raises `DataError` if there are samples of something else."""
        if not isinstance(self.images, ImageSet):
            raise DataError(f"{self.name} are no images; a classifier's accuracy is measured on images")
        return self.images

    @property
    def targets(self) -> Targets | None:
        """What a metric is given beside outputs."""
        return Targets.of(self.images) if self.beside is None and isinstance(self.images, ImageSet) else self.beside

    def metrics(self, model: FloatModel) -> list[Metric]:
        """Return what is measured of a network beside its accuracy and outputs."""
        return metrics_for(model, self.metric, self.targets)

    def measured(self, network: nn.Module, model: FloatModel, progress: Progress) -> dict[str, Values]:
        """Run a network and return what metrics give of it, as `metrics`; nothing if there are none."""
        if not (metrics := self.metrics(model)):
            return {}
        title = "evaluate float" if network is model.module else "evaluate quantized"
        ways: dict[str, Any] = {"batch_size": self.batch_size, "progress": progress, "title": title}
        values = measure_metrics(network, model, self.images, metrics, self.targets, **ways)
        if not values:
            progress.warn(f"{title}: no output is of the size of the masks, so that they cannot be compared")
        return {"metrics": values}

    def measured_of(
        self, outputs: Tensor | None, model: FloatModel, progress: Progress, title: str
    ) -> dict[str, Values]:
        """Return the same of logits that are there already."""
        metrics = self.metrics(model)
        if not metrics or outputs is None:
            return {}
        return {"metrics": metrics_of(outputs, self.pictures, metrics, self.targets, progress, title)}

    def rehearse(self, model: FloatModel) -> None:
        """Let the metric measure the float network on `batch_size` of the samples, evenly spaced.

        Raises what it would raise after all the work.
        """
        if self.metric is None:
            return
        places = spread(len(self.images), self.batch_size)
        try:
            measure_metrics(model.module, model, self.images, [self.metric], self.targets, indices=places)
        except InputError as error:
            more = f"; --set evaluate.batch_size={len(self.images)} tries it on all" * (len(places) < len(self.images))
            raise InputError(f"{error}; it was tried on {len(places)} samples before any work{more}") from error

    def require_labels(self, model: FloatModel, progress: Progress) -> None:
        """Raise `DataError` before any work is done if an image has no label, or one that is no class of the network.

        Without any labels agreement can be measured all the same; that is said.
        """
        labels, source = self.pictures.labels, self.name
        if labels is None or not len(labels):
            progress.warn(
                f"{source} has no labels: agreement with the float network is measured on it, accuracy is not"
            )
            return
        if unlabelled := int((labels < 0).sum()):
            raise DataError(
                f"{source}: {unlabelled} of {len(labels)} images have no label; label them all, or leave these out"
            )
        highest = int(labels.max())
        if model.num_classes is not None and highest >= model.num_classes:
            raise DataError(
                f"{source} has labels up to {highest} but {model.name} has {model.num_classes} classes "
                f"(0 to {model.num_classes - 1}); give data with the network's classes"
            )
