from __future__ import annotations

import pytest

pytest.importorskip("timm", reason="needs the extra 'models'")

from synthquant.models.imagenet import imagenet_names


def test_names_and_definitions_stand_in_the_order_of_the_labels() -> None:
    classes = imagenet_names()
    assert len(classes) == 1000
    assert classes[0][0] == ("tench", "Tinca tinca") and "fish" in classes[0][1]
    assert classes[134] == (
        ("crane",),
        "large long-necked wading bird of marshes and plains in many parts of the world",
    )
    assert classes[517][0] == ("crane",) and "lifts and moves" in classes[517][1]
    assert all(names and all(names) and definition for names, definition in classes)
