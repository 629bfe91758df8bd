from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthquant.core.errors import InputError
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.synthesize.class_names import ClassName, class_names, class_positions, prompt_names

CRANES = (
    ClassName(names=("crane",), gloss="a wading bird; lives in marshes"),
    ClassName(names=("crane",), gloss="a machine"),
    ClassName(names=("suit", "maillot")),
    ClassName(names=("maillot", "tank suit")),
    ClassName(names=("maillot", "tights")),
)


@pytest.fixture(scope="module")
def network() -> FloatModel:
    return open_model("zoo/cifar10-resnet20")


def firsts(classes: tuple[ClassName, ...]) -> list[str]:
    return [entry.names[0] for entry in classes]


def test_built_in_names_and_those_of_the_network(network: FloatModel) -> None:
    assert class_names("cifar10") == class_names("model", network)
    assert firsts(class_names("cifar10"))[3] == "cat"


def test_names_of_imagenet() -> None:
    pytest.importorskip("timm", reason="needs the extra 'models'")
    classes = class_names("imagenet-1k")
    assert classes[0].names == ("tench", "Tinca tinca")
    used = [name for names in prompt_names(classes) for name in names]
    assert len(used) == len(set(used)) and len(prompt_names(classes)) == 1000
    assert prompt_names(classes)[134] == (
        "crane, large long-necked wading bird of marshes and plains in many parts of",
    )
    assert prompt_names(classes)[517] == ("crane, lifts and moves heavy objects",)


def test_names_of_a_file(tmp_path: Path) -> None:
    text = tmp_path / "classes.txt"
    text.write_text("cat, house cat: it purrs\n\nkite\n")
    expected = (ClassName(names=("cat", "house cat"), gloss="it purrs"), ClassName(names=("kite",)))
    assert class_names(str(text)) == expected
    values = tmp_path / "classes.json"
    values.write_text(json.dumps([{"names": ["cat", "house cat"], "gloss": "it purrs"}, "kite"]))
    assert class_names(str(values)) == expected
    assert firsts(class_names(["a", "b"])) == ["a", "b"]


def test_no_two_classes_share_a_name_in_prompts() -> None:
    assert prompt_names(CRANES) == (
        ("crane, a wading bird",),
        ("crane, a machine",),
        ("suit",),
        ("tank suit",),
        ("tights",),
    )


def test_classes_are_found_by_any_of_their_names() -> None:
    assert class_positions(["tights", "crane, a machine", "suit"], CRANES, "only") == (4, 1, 2)
    with pytest.raises(
        InputError, match="2 classes are called 'crane'; write 'crane, a wading bird' or 'crane, a mach"
    ):
        class_positions(["crane"], CRANES, "only")
    with pytest.raises(InputError, match=r"only: unknown class 'tigths'; did you mean 'tights'\? there are 5"):
        class_positions(["tigths"], CRANES, "only")


def test_another_number_than_the_network_has(network: FloatModel) -> None:
    with pytest.raises(InputError, match="classes names 2 classes but cifar10-resnet20 has 10"):
        class_names(["cat", "dog"], network)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "empty.txt names no class"),
        ("twice.txt", "cat\ndog\ncat\n", "names the class 'cat' twice"),
        ("nameless.txt", "cat\n: a gloss\n", "has a class without a name"),
        ("bytes.txt", b"\xff\xfe\xfa", "cannot read class names from"),
        ("empty.json", "[]", "empty.json names no class"),
        ("numbers.json", "[1, 2]", "must hold a list of names or of objects"),
        ("broken.json", "[", "is not a JSON file"),
        ("other.json", '[{"name": "cat"}]', r"other.json\[0\]: .*unknown setting 'name'; did you mean 'names'"),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        class_names(str(path))
    assert "\n" not in str(error.value)


def test_names_from_nowhere(network: FloatModel) -> None:
    with pytest.raises(InputError, match="classes=cifar11 is no file and not built in; did you mean 'cifar10'"):
        class_names("cifar11")
    with pytest.raises(InputError, match="there is no network that names classes; set classes to cifar10"):
        class_names("model")
    nameless = FloatModel(network.module, network.preprocess, "mine", network.source, num_classes=10)
    with pytest.raises(InputError, match="mine does not say what its classes are; set classes to cifar10"):
        class_names("model", nameless)
    with pytest.raises(InputError, match="classes names no class"):
        class_names([])
