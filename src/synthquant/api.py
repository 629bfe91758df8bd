"""All that the package announces, under the names that `import synthquant` gives."""

from __future__ import annotations

from synthquant.core.errors import (
    DataError,
    InputError,
    MissingExtraError,
    ModelError,
    OutputError,
    RecipeError,
    SchemeError,
    SynthquantError,
    UnknownNameError,
    UnsupportedModelError,
    VerificationError,
)
from synthquant.core.progress import ConsoleProgress, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.record import RunRecord
from synthquant.core.rng import Rng
from synthquant.core.version import package_version
from synthquant.data.image_set import ImageSet
from synthquant.data.loaders import read_loader
from synthquant.data.preprocess import Preprocess
from synthquant.data.sources import import_images, open_images
from synthquant.data.store import ImageSetWriter
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.pipelines import DiffusionPipeline, open_pipeline
from synthquant.diffusion.text_to_image import open_text_to_image
from synthquant.diffusion.trajectory import Trajectory, open_trajectory
from synthquant.evaluate.accuracy import Evaluation, evaluate_model
from synthquant.evaluate.image_features import open_features
from synthquant.evaluate.image_quality import ImageQuality, QualitySettings, compare_images
from synthquant.export import DiffusersFolder, Onnx, TorchProgram
from synthquant.export.diffusers_folder import load_pipeline
from synthquant.export.write import export_run
from synthquant.export_stages import BenchmarkStage, ExportStage
from synthquant.finetune import DSGQAT, GDFQ, AdaDFQ, Distill
from synthquant.held_out_stage import HeldOutStage
from synthquant.methods import (
    EXPORTERS,
    FINE_TUNERS,
    QUANTIZERS,
    SELECTORS,
    SYNTHESIZERS,
    MemoryBudget,
    QuantStep,
    Selector,
    Synthesizer,
)
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.models.samples import Samples
from synthquant.models.signature import Inputs
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantArgs, QuantScheme
from synthquant.pipeline import run
from synthquant.quantize import AdaRound, Brecq, Erq, GenieM, Ptq4Vit, QDiffusion, QDrop, RepqVit, Rotation, Rtn
from synthquant.quantize.difference_ranges import calibrate_differences
from synthquant.quantize.shortcut_ranges import shortcut_ranges
from synthquant.recipe import Recipe
from synthquant.report.html import write_report
from synthquant.select import BatchNormDistance, BatchNormSensitivity, Energy, PatchSimilarity, Selection, run_filters
from synthquant.synthesize import DSG, GenieD, Noise, PromptTuning, SelfSampling, TextToImage, ZeroQ, tune_prompt
from synthquant.verbs import card, evaluate, load, quantize, synthesize

__version__ = package_version()

__all__ = [
    "DSG",
    "DSGQAT",
    "EXPORTERS",
    "FINE_TUNERS",
    "GDFQ",
    "QUANTIZERS",
    "SELECTORS",
    "SYNTHESIZERS",
    "AdaDFQ",
    "AdaRound",
    "BatchNormDistance",
    "BatchNormSensitivity",
    "BenchmarkStage",
    "Brecq",
    "ConsoleProgress",
    "DataError",
    "Denoiser",
    "DiffusersFolder",
    "DiffusionPipeline",
    "Distill",
    "Energy",
    "Erq",
    "Evaluation",
    "ExportStage",
    "FloatModel",
    "GenieD",
    "GenieM",
    "HeldOutStage",
    "ImageQuality",
    "ImageSet",
    "ImageSetWriter",
    "InputError",
    "Inputs",
    "MemoryBudget",
    "MissingExtraError",
    "ModelError",
    "ModelSource",
    "Noise",
    "Onnx",
    "OutputError",
    "PatchSimilarity",
    "Preprocess",
    "Progress",
    "PromptTuning",
    "Ptq4Vit",
    "QDiffusion",
    "QDrop",
    "QualitySettings",
    "QuantArgs",
    "QuantModel",
    "QuantReport",
    "QuantScheme",
    "QuantStep",
    "Recipe",
    "RecipeError",
    "RepqVit",
    "Rng",
    "Rotation",
    "Rtn",
    "RunRecord",
    "Samples",
    "SchemeError",
    "Selection",
    "Selector",
    "SelfSampling",
    "Synthesizer",
    "SynthquantError",
    "TextToImage",
    "TorchProgram",
    "Trajectory",
    "UnknownNameError",
    "UnsupportedModelError",
    "VerificationError",
    "ZeroQ",
    "__version__",
    "calibrate_differences",
    "card",
    "compare_images",
    "evaluate",
    "evaluate_model",
    "export_run",
    "import_images",
    "load",
    "load_pipeline",
    "open_features",
    "open_images",
    "open_model",
    "open_pipeline",
    "open_text_to_image",
    "open_trajectory",
    "quantize",
    "read_loader",
    "run",
    "run_filters",
    "shortcut_ranges",
    "synthesize",
    "tune_prompt",
    "write_report",
]
