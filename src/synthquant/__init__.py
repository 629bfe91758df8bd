"""Quantize trained networks without their training data, and measure the result.

import synthquant as sq

model = sq.FloatModel.from_module(module, input_size=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
images = sq.synthesize(model, count=256, iterations=500)
quant_model = sq.quantize(model, images, "W4A4", iterations=2000)
print(sq.evaluate(quant_model, test_set))
quant_model.save("quantized")

- `__main__`: `python -m synthquant`.
- `api`: all that the package announces, under the names that `import synthquant` gives.
- `cli/`: the command line.
- `compare`: drawn images beside reference images: what the command `compare` finds.
- `core/`: what all else stands on: errors, registries, random numbers, files, records, settings.
- `data/`: images: sets, files, sources, preprocessing.
- `diffusion/`: diffusion models: the one door to diffusers, and Stable Diffusion in its parts.
- `distributed/`: work over several processes and machines.
- `evaluate/`: measure a network: accuracy, agreement with the float network, size and operations.
- `export/`: write a quantized network to files and read it back.
- `export_stages`: stages that a recipe adds: a file for a runtime, and how fast that runs.
- `finetune/`: training quantized networks end to end, with the float network as their teacher.
- `held_out_stage`: a stage that a recipe adds: the error on images that a network was not quantized with.
- `make`: images, choices and quantized networks: what the commands and the stages of a run share.
- `measure`: networks on images: what the command `evaluate` and the stage of a run share.
- `methods`: the protocol of every kind of method, and its registry.
- `models/`: float networks: opening, tracing, units.
- `nn/`: quantizers, quantized layers and the quantized copy of a network.
- `pipeline`: the whole flow of a run, stage after stage.
- `quantize/`: post-training quantization: ranges, and reconstruction unit by unit.
- `recipe`: the sections of a recipe, read and checked.
- `report/`: one self-contained HTML page out of the files of run folders.
- `resume`: what of a run is there and whole, and what is made again.
- `run_stages`: the stages of every run, and their order.
- `runtimes`: exporters whose files a runtime executes, and which one wrote a file.
- `select/`: keeping what resembles the training data.
- `stages`: what a stage of a run is, what stages hand on, and the registry of those that a recipe can add.
- `synthesize/`: making images from a trained network alone, or of its classes.
- `targets`: what a network is meant for, and the scheme with which that takes everything.
- `verbs`: networks in memory: `synthesize`, `quantize`, `evaluate` and `load`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from synthquant.api import *  # noqa: F403


_VERBS = ("evaluate", "quantize", "synthesize")
_RENAMED = {
    "load_checkpoint": ("synthquant.load", "synthquant.export.checkpoint"),
    "save_checkpoint": ("QuantModel.save", "synthquant.export.checkpoint"),
}


# Everything is in synthquant.api and loaded when the first name is asked for: PyTorch takes seconds, in which a program
# that only just started, such as the command line, could not answer a Ctrl-C.
def __getattr__(name: str) -> Any:
    unknown = AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("__") and name not in ("__all__", "__version__"):
        raise unknown
    if name in _VERBS:
        return import_module(f"{__name__}.{name}")  # a package that is called as the function of its name
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        raise unknown  # a module that nobody has imported yet
    if name in _RENAMED:
        instead, home = _RENAMED[name]
        warn(f"{__name__}.{name} is now {instead}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(home), name)
    api = import_module(f"{__name__}.api")
    if name not in ("__all__", *api.__all__):
        raise unknown
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module(f"{__name__}.api").__all__})
