"""What the cards of the bundled networks promise, on few images."""

from __future__ import annotations

import math

import pytest
import torch

from synthquant.data.sources import open_images
from synthquant.diffusion.pipelines import Sampling
from synthquant.diffusion.text_to_image import open_text_to_image
from synthquant.evaluate.accuracy import evaluate_model
from synthquant.models.open import open_model
from synthquant.models.zoo import CIFAR10_CLASSES, NETWORKS, ZOO
from synthquant.models.zoo.pipelines import PIPELINES, installed_pipelines, pipeline_folder

COUNT = 500


def test_every_network_that_can_be_trained_is_bundled() -> None:
    assert set(ZOO.names()) == set(NETWORKS)
    assert set(installed_pipelines()) == set(PIPELINES)


@pytest.mark.parametrize("name", ZOO.names())
def test_a_bundled_classifier_is_as_accurate_as_its_card_says(name: str) -> None:
    model = open_model(f"zoo/{name}")
    images = open_images("bundled/cifar10-test").subset(range(COUNT))
    top1 = ZOO.get(name).card["top1"]
    found = evaluate_model(model.module, model.preprocess, images).top1
    assert found == pytest.approx(top1, abs=4 * math.sqrt(top1 * (1 - top1) / COUNT))


def test_the_bundled_generator_draws_what_the_prompt_says() -> None:
    pytest.importorskip("diffusers")
    generator = open_text_to_image("zoo/cifar10-text2image")
    labels = torch.arange(40) % 10
    prompts = [f"a photo of a {CIFAR10_CLASSES[label]}." for label in labels]
    images = generator.draw(prompts, list(range(40)), Sampling(steps=8, guidance=3.5)).images
    assert images.shape == (40, 3, 32, 32) and images.float().std((1, 2, 3)).min() > 1
    model = open_model("zoo/cifar10-resnet20-half")
    found = model.logits(model.preprocess(images, "cropped")).argmax(1)
    # By chance 4 of 40, and 12 or more in one of 2,600 cases.
    assert int((found == labels).sum()) >= 12


def test_the_bundled_diffusion_model_makes_images() -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDIMPipeline.from_pretrained(pipeline_folder("cifar10-ddpm"))
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        batch_size=4, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    images = torch.from_numpy(found)
    assert images.shape == (4, 32, 32, 3) and images.isfinite().all()
    # Neither a flat colour nor noise: neighbouring pixels are alike, distant ones are not.
    assert images.std((1, 2, 3)).min() > 0.05
    assert (images[:, 1:] - images[:, :-1]).std() < 0.5 * images.std()
