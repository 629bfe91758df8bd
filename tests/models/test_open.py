from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from synthquant.core.errors import InputError, ModelError, SynthquantError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.models.float_model import ModelSource, RecordedSource
from synthquant.models.open import open_model
from synthquant.models.zoo import ZOO
from synthquant.synthesize import GenieD

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.fc = nn.Linear(4, 6, dtype=torch.float64)

    def forward(self, x):
        return self.fc(self.conv(x).mean(dim=(2, 3)))

def net():
    return Net()

def broken():
    raise KeyError("stage4")

def damaged():
    net = Net()
    net.fc.weight.data[0, 0] = float("nan")
    return net
"""
FLAGS: dict[str, Any] = {"input_size": (12, 10), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(NETWORK, encoding="utf-8")
    return path


def test_timm_brings_its_preprocessing_and_class_names() -> None:
    model = open_model("timm/resnet18", pretrained=False)
    assert (model.name, model.num_classes, model.task) == ("resnet18", 1000, "classify")
    preprocess = model.preprocess
    # timm's configuration of resnet18.a1_in1k: crop_pct 0.95 at 224, so floor(224 / 0.95) before the crop.
    assert (preprocess.input_size, preprocess.resize, preprocess.crop) == ((224, 224), 235, True)
    assert preprocess.interpolation == "bicubic"
    assert preprocess.mean == pytest.approx((0.485, 0.456, 0.406))
    assert model.class_names is not None
    assert model.class_names[0].startswith("tench")
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_timm_with_a_fixed_input_size_is_built_for_the_one_asked_for() -> None:
    model = open_model("timm/vit_tiny_patch16_224", pretrained=False, input_size=32, num_classes=5)
    assert model.preprocess.input_size == (32, 32)
    # 224 / 0.9 = 248, and 248 * 32 / 224 = 35: the same part of the image stays in view.
    assert model.preprocess.resize == 35
    assert model.logits(model.example_images()).shape == (2, 5)
    assert model.class_names is None


def test_torchvision_takes_the_preprocessing_of_its_best_weights() -> None:
    preprocess = open_model("torchvision/regnet_y_400mf", pretrained=False).preprocess
    assert (preprocess.input_size, preprocess.resize, preprocess.interpolation) == ((224, 224), 232, "bilinear")
    assert preprocess.std == pytest.approx((0.229, 0.224, 0.225))


def test_a_tag_of_weights_brings_their_preprocessing() -> None:
    first = open_model("torchvision/mobilenet_v2.IMAGENET1K_V1", pretrained=False)
    assert first.preprocess.resize == 256
    assert open_model("torchvision/mobilenet_v2", pretrained=False).preprocess.resize == 232
    assert open_model(first.source, pretrained=False).preprocess == first.preprocess


def test_the_usual_task_is_not_written_and_another_comes_back() -> None:
    usual, other = ModelSource(source="zoo/cifar10-resnet20"), ModelSource(source="net.py:build", task="other")
    assert "task" not in usual.model_dump() and "task" not in usual.model_dump_json()
    for source in (usual, other):
        assert ModelSource.model_validate(source.model_dump()) == source
        assert RecordedSource.of(source).confirmed("a file", trust_code=True) == source


def test_published_weights_are_those_of_the_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    asked, get_model = [], models.get_model

    def offline(name: str, weights: object, **options: Any) -> nn.Module:
        asked.append(weights)
        return get_model(name, weights=None, **options)

    monkeypatch.setattr(models, "get_model", offline)
    open_model("torchvision/mobilenet_v2.IMAGENET1K_V1")
    open_model("torchvision/mobilenet_v2")
    assert asked == [models.MobileNet_V2_Weights.IMAGENET1K_V1, models.MobileNet_V2_Weights.IMAGENET1K_V2]


def test_flags_replace_what_the_model_says() -> None:
    preprocess = open_model("torchvision/mnasnet0_5", pretrained=False, **FLAGS).preprocess
    assert (preprocess.input_size, preprocess.mean, preprocess.std) == ((12, 10), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert preprocess.resize == round(256 * 12 / 224)


def test_weights_file_replaces_published_weights(tmp_path: Path) -> None:
    random = open_model("torchvision/mnasnet0_5", pretrained=False, num_classes=3, input_size=32)
    state = {name: 2 * value for name, value in random.module.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    model = open_model(
        "torchvision/mnasnet0_5", weights=tmp_path / "w.safetensors", num_classes=3, input_size=32, device="cpu"
    )
    assert torch.equal(model.module.state_dict()["layers.0.weight"], state["layers.0.weight"])
    assert model.source.weights == str(tmp_path / "w.safetensors")
    rebuilt = open_model(model.source, pretrained=False)
    assert rebuilt.fingerprint == random.fingerprint
    assert rebuilt.preprocess == model.preprocess


def test_random_weights_are_the_same_each_time_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    prints = {open_model("zoo/cifar10-resnet20", pretrained=False).fingerprint for _ in range(2)}
    assert len(prints) == 1
    assert torch.equal(state, torch.get_rng_state())


def test_zoo_model_has_its_classes() -> None:
    model = open_model("zoo/cifar10-resnet20", pretrained=False)
    assert model.num_classes == 10
    assert model.class_names == ZOO.get("cifar10-resnet20").class_names
    assert model.preprocess.input_size == (32, 32)


def test_user_file_needs_flags_and_becomes_float32(file: Path) -> None:
    with pytest.raises(ModelError, match=r"how its images are prepared; give --input-size, --mean, --std$"):
        open_model(f"{file}:net")
    with pytest.raises(ModelError, match=r"how its images are prepared; give --mean, --std$"):
        open_model(f"{file}:net", input_size=12)
    model = open_model(f"{file}:net", **FLAGS)
    assert (model.name, model.num_classes, model.class_names) == ("Net", 6, None)
    assert model.logits(model.example_images()).dtype == torch.float32
    assert (model.preprocess.input_size, model.preprocess.resize) == ((12, 10), 12)
    assert open_model(ModelSource.model_validate_json(model.source.model_dump_json())).fingerprint == model.fingerprint


def test_transformers_vit_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    config.num_labels = 5
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model = open_model(f"transformers/{tmp_path}")
    images = model.example_images()
    torch.testing.assert_close(model.logits(images), network(images).logits)
    assert (model.num_classes, model.class_names, model.name) == (5, None, tmp_path.name)
    assert (model.preprocess.input_size, model.preprocess.resize) == ((16, 16), (16, 16))
    assert model.preprocess.interpolation == "bilinear"
    rebuilt = open_model(model.source, pretrained=False)
    assert rebuilt.fingerprint != model.fingerprint
    rebuilt.module.load_state_dict(model.module.state_dict())


def test_transformers_resnet_has_its_crop_and_class_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", id2label={0: "cat", 1: "dog"}
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 56}, crop_pct=0.875, image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(tmp_path)
    model = open_model(f"transformers/{tmp_path}")
    assert model.class_names == ("cat", "dog")
    assert (model.preprocess.input_size, model.preprocess.resize) == ((56, 56), 64)
    assert model.preprocess.std == pytest.approx((0.2, 0.3, 0.4))
    assert model.preprocess.interpolation == "bicubic"


def test_transformers_without_a_processor_asks_for_flags(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no image processor .*; give --input-size, --mean and --std"):
        open_model(f"transformers/{tmp_path}")
    assert open_model(f"transformers/{tmp_path}", **(FLAGS | {"input_size": 32})).preprocess.input_size == (32, 32)


def test_transformers_brings_neither_code_nor_pickles(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    network = transformers.ResNetForImageClassification(config)
    network.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    flags = FLAGS | {"input_size": 32}
    with pytest.raises(
        ModelError, match=r"no weights in safetensors; pickled ones \(pytorch_model\.bin\) may hold code"
    ):
        open_model(f"transformers/{tmp_path}", **flags)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(ModelError, match="brings code of its own, which is not run"):
        open_model(f"transformers/{tmp_path}", **flags)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        ("resnet18", {}, ModelError, "model 'resnet18' is not of a known form, and .* no folder .*; give timm/NAME"),
        ("runs/mien", {}, ModelError, "and there is no folder or file of that name"),
        (str(Path(__file__)), {}, ModelError, "is a file; name the function in it"),
        (str(Path(__file__).parents[2] / "Makefile"), {}, ModelError, "Makefile' is not of a known form; give"),
        ("timm/", {}, ModelError, "is not of a known form"),
        (str(Path(__file__).parent), {}, ModelError, "is a folder; here name the float network that it was made from"),
        ("net.onnx", {}, ModelError, "net.onnx is an exported file; here name the float network"),
        ("diffusers/sdxl", {}, ModelError, "there is no pipeline folder sdxl; give the folder"),
        ("timm/resnt18", {}, ModelError, "timm has no model 'resnt18'; the nearest are: resnet18"),
        ("timm/resnet18.nonsense", {"pretrained": False}, ModelError, r"cannot be opened: .*tag \(nonsense\)"),
        ("torchvision/resnt18", {}, ModelError, "torchvision has no model 'resnt18'; the nearest are: resnet18"),
        ("torchvision/mnasnet0_5.V3", {}, ModelError, "mnasnet0_5 has no weights 'V3'; it has IMAGENET1K_V1"),
        ("torchvision/mnasnet0_5.", {}, ModelError, "mnasnet0_5 has no weights ''"),
        ("torchvision/fcn_resnet50", {}, ModelError, "torchvision has no model"),
        ("zoo/nothing", {}, SynthquantError, "unknown zoo model 'nothing'; available: .*cifar10-resnet20"),
        ("zoo/cifar10-resnet20", {"num_classes": 3}, ModelError, "give --weights FILE"),
        ("zoo/cifar10-resnet20", {"num_classes": 0}, InputError, "num_classes = 0: .*allowed: >= 1"),
        ("zoo/cifar10-resnet20", {"weights": "no.pth"}, ModelError, "weights file no.pth does not exist"),
        (
            "zoo/cifar10-resnet20",
            {"mean": (0.5,)},
            InputError,
            "mean has 1 values and std 3",
        ),
        (
            "zoo/cifar10-resnet20",
            {"std": (1, 1, 0)},
            InputError,
            r"std.2 = 0: input should be greater than or equal to 0.0001",
        ),
        ("zoo/cifar10-resnet20", {"input_size": 0}, InputError, r"input_size.0 = 0: .*greater than or equal to 1"),
        ("zoo/cifar10-resnet20", {"device": "gpu"}, InputError, "device 'gpu' cannot be used"),
        ("zoo/cifar10-resnet20", {"device": "meta"}, InputError, "device 'meta' cannot be used"),
        (
            "torchvision/vit_b_16",
            {"input_size": 32, "pretrained": False},
            ModelError,
            "an image of 32x32.*--input-size",
        ),
        ("nothing.py:net", {}, ModelError, "nothing.py does not exist"),
    ],
)
def test_wrong_input(source: str, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        open_model(source, **options)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_users_own_network(file: Path) -> None:
    with pytest.raises(ModelError, match=r"mine\.py:broken cannot be opened: KeyError: 'stage4'"):
        open_model(f"{file}:broken", **FLAGS)
    with pytest.raises(ModelError, match="returns NaN or infinite logits"):
        open_model(f"{file}:damaged", **FLAGS)
    with pytest.raises(ModelError, match="the function fixes the number of classes"):
        open_model(f"{file}:net", num_classes=3, **FLAGS)
    file.write_text("def net(:\n", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be opened: SyntaxError"):
        open_model(f"{file}:net", **FLAGS)


def test_importing_loads_no_model_library() -> None:
    code = (
        "import sys, synthquant.models.open, synthquant.models.blocks, synthquant.models.batch_norm;"
        "print([name for name in ('timm', 'torchvision', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


UNUSUAL = """
from torch import nn

def net(channels=3, norm=True):
    parts = [nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)]
    return nn.Sequential(*parts)

def grey():
    return net(1)

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(4 * 12 * 10, 6))

def script():
    raise SystemExit(3)

def normed():
    return nn.Sequential(nn.BatchNorm2d(1), net(1))

def dead():
    network = net()
    network[1].running_mean[0] = 0.5
    network[1].running_var[1:3] = 0
    return network
"""


def test_networks_of_other_channels_weights_alone_and_odd_batch_norms_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "unusual.py"
    path.write_text(UNUSUAL, encoding="utf-8")
    for name, taken in (("grey", "1 channel"), ("normed", "1 channel"), ("flat", "4 channels")):
        with pytest.raises(ModelError, match=f"the network takes {taken}, and mean and std are of 3; give"):
            open_model(f"{path}:{name}", **FLAGS)
    with pytest.raises(ModelError, match=r"script ends the program when it is imported or called \(exit 3\)"):
        open_model(f"{path}:script", **FLAGS)
    with pytest.raises(ModelError, match=r"mynet\.pt holds weights.*FILE\.py:FUNCTION --weights mynet\.pt"):
        open_model("mynet.pt", **FLAGS)
    assert not caplog.messages
    untrained = open_model(f"{path}:net", **FLAGS)
    assert "looks untrained: none of its 1 batch norms has seen a batch" in caplog.messages[-1]
    with pytest.raises(UnsupportedModelError, match=r"looks untrained.*--set untrained=true"):
        GenieD(iterations=1).synthesize(untrained, 2, Rng(0))
    assert len(GenieD(iterations=1, untrained=True).synthesize(untrained, 2, Rng(0))) == 2
    open_model(f"{path}:dead", **FLAGS)
    assert "1 of its 1 batch norms keep variances of 0, 1 first, in 2 of 4 channels" in caplog.messages[-1]


def test_messages_hold_no_escape_codes_of_other_libraries() -> None:
    assert str(ModelError("a \x1b[1;31mred\x1b[0m\n word")) == "a red word"


def test_own_code_is_called_by_its_class_and_a_plain_container_by_its_file(tmp_path: Path) -> None:
    source = "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n"
    (tmp_path / "my_classifier.py").write_text(source)
    options: dict[str, Any] = {"input_size": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert open_model(f"{tmp_path / 'my_classifier.py'}:build", **options).name == "my_classifier"
    source = source.replace("def build", "class Tiny(nn.Sequential):\n    pass\n\n\ndef build").replace(
        "return nn.Seq", "return Tiny"
    )
    (tmp_path / "own.py").write_text(source.replace("Tinyuential(", "Tiny("))
    assert open_model(f"{tmp_path / 'own.py'}:build", **options).name == "Tiny"
