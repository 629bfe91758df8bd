"""Which low-pass filter: chosen on synthetic images that calibrated nothing, then measured on real ones.

    nice -n 19 python benchmarks/low_pass.py --work runs/low_pass [--images genie_d zeroq] [--schemes W4A4 W3A3]

A method makes twice `--count` images once. Behind each filter (off, 0.9, 0.6, 0.36, 0.2) the first half quantizes the
network, and it is compared with the float one on the second half, which is the same for all: each of its images behind
each of the filters, so that none is judged on its own kind alone. The filter with the highest agreement is the choice,
and the weaker one of equals; only then are off and the choice measured on the bundled test images. A row is one JSON
file in `--out`, what was chosen is another. Images lie in `--work`; called again after a kill it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from synthquant.core.files import write_json
from synthquant.core.progress import ConsoleProgress
from synthquant.core.record import environment
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.data.sources import open_images
from synthquant.evaluate.accuracy import Evaluation, compare_logits, evaluate_model
from synthquant.evaluate.paired import PerImage
from synthquant.make import quantize
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.recipe import QuantizeSection, SynthesizeSection
from synthquant.synthesize.low_pass import low_passed
from zero_shot_matrix import settings_of, synthetic_images

ROOT = Path(__file__).parent.parent
FILTERS: tuple[float | None, ...] = (None, 0.9, 0.6, 0.36, 0.2)
"""Cut-offs from none to the strongest."""


class Case:
    """A network, the images of one method, and how it is quantized."""

    def __init__(self, kind: str, scheme: str, args: argparse.Namespace) -> None:
        self.kind, self.scheme, self.args = kind, scheme, args
        self.name = f"{args.network}--{kind}--{args.method}--{scheme}"
        self.model: FloatModel = open_model(f"zoo/{args.network}", device="cpu")
        settings = settings_of(args.method, args.quantize_iterations, args.batch_size, None)
        values = {"method": args.method, "scheme": {"preset": scheme, "ends": "same"}, **settings}
        self.section = QuantizeSection.parse(values, self.name)
        made = {"method": kind, "count": 2 * args.count, "iterations": args.iterations}
        self.images = SynthesizeSection.parse(made, kind)
        self.identity = {
            "network": args.network,
            "images": self.images.model_dump(mode="json"),
            "quantize": self.section.model_dump(mode="json"),
            "fingerprint": self.model.fingerprint,
        }
        self._pixels: torch.Tensor | None = None

    def filtered(self, low_pass: float | None) -> ImageSet:
        """All images behind a filter, as a method with that setting would store them, to rounding."""
        if self._pixels is None:
            folder = self.args.work / f"{self.args.network}--{self.kind}--{self.images.count}-{self.args.iterations}"
            section = self.images
            images = synthetic_images(section.method, self.model, section.count, section.settings, 0, folder)
            self._pixels = torch.stack([images[index].image for index in range(len(images))]).float()
        return ImageSet.from_tensors(low_passed(self._pixels, low_pass), dtype="float16")

    def quantized(self, low_pass: float | None) -> QuantModel:
        """The network, quantized with the first half of the images behind a filter; units are kept."""
        work = self.args.work / f"{self.name}--{low_pass or 'off'}"
        work.mkdir(parents=True, exist_ok=True)
        images = self.filtered(low_pass).subset(range(self.args.count))
        return quantize(self.model, self.section, images, 0, ConsoleProgress(), workdir=work)[0]

    def row(self, low_pass: float | None) -> dict[str, Any]:
        """Agreement on the second half, behind each filter."""
        path = self.args.out / f"{self.name}--{low_pass or 'off'}.json"
        if (known := self._known(path)) is not None:
            return known
        network, held_out = self.quantized(low_pass), {}
        for shown in FILTERS:
            images = self.filtered(shown).subset(range(self.args.count, 2 * self.args.count))
            inputs = model_inputs(images, self.model.preprocess)
            with torch.no_grad():
                found = compare_logits(network(inputs), None, self.model.logits(inputs))
            held_out[str(shown or "off")] = found.agreement
        return self._keep(path, {"low_pass": low_pass, "held_out": held_out})

    def choice(self) -> dict[str, Any]:
        """The filter of the highest agreement, and what it does on real images beside none."""
        rows = [self.row(low_pass) for low_pass in FILTERS]
        means = [sum(row["held_out"].values()) / len(FILTERS) for row in rows]
        chosen = FILTERS[means.index(max(means))]
        path = self.args.out / f"{self.name}--choice.json"
        if (found := self._known(path)) is not None and found["low_pass"] == chosen:
            return found
        test = open_images(self.args.test)
        if self.args.test_limit is not None:
            test = test.subset(range(self.args.test_limit))
        floating = evaluate_model(self.model.module, self.model.preprocess, test)
        real = {str(one or "off"): self._measured(one, test, floating) for one in dict.fromkeys((None, chosen))}
        return self._keep(path, {"low_pass": chosen, "float_top1": floating.top1, "real": real})

    def _measured(self, low_pass: float | None, test: ImageSet, floating: Evaluation) -> dict[str, Any]:
        found = evaluate_model(self.quantized(low_pass), self.model.preprocess, test, reference_logits=floating.logits)
        assert test.labels is not None
        images = PerImage.of(found.logits, test.labels, floating.logits)
        values = {"top1": found.top1, "agreement": found.agreement, "kl": found.kl, "count": found.count}
        return {**values, "per_image": images.packed()}

    def _known(self, path: Path) -> dict[str, Any] | None:
        """What the file holds, if it is of this case."""
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found if found["identity"] == self.identity and found["count"] == self.args.count else None

    def _keep(self, path: Path, values: dict[str, Any]) -> dict[str, Any]:
        made = {"identity": self.identity, "count": self.args.count, "environment": environment()}
        content = {"benchmark": "low_pass", "name": self.name, **values, **made}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        print(path.name, json.dumps(values.get("held_out", {"low_pass": values["low_pass"]})), flush=True)
        return content


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar10-resnet20")
    parser.add_argument("--images", nargs="+", default=["genie_d", "zeroq"], metavar="METHOD")
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W3A3"])
    parser.add_argument("--method", default="genie_m", help="of quantization")
    parser.add_argument("--count", type=int, default=256, help="images to quantize with, and as many held out")
    parser.add_argument("--iterations", type=int, default=500, help="of the images")
    parser.add_argument("--quantize-iterations", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--test", default="bundled/cifar10-test")
    parser.add_argument("--test-limit", type=int, help="the first so many of them, to try this script")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "low_pass")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "low_pass")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.images:
        for scheme in args.schemes:
            Case(kind, scheme, args).choice()


if __name__ == "__main__":
    main()
