"""Memory that is freed is kept, unless the environment says otherwise, and nothing else changes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")

_FAULTS = """
import json, resource
from synthquant.core.allocator import ALLOCATOR

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block = b"x" * (64 << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

usual = faults()
ALLOCATOR.keep_freed()
faults()
kept, before = faults(), resident()
ALLOCATOR.give_back()
print(json.dumps([ALLOCATOR.state, usual, kept, before - resident()]))
"""

_IMAGES = """
import json
from synthquant.core.allocator import ALLOCATOR
from synthquant.core.rng import Rng
from synthquant.models.open import open_model
from synthquant.synthesize.genie_d import GenieD

model = open_model("zoo/cifar10-resnet20")

def images():
    return GenieD(batch_size=4, iterations=2).synthesize(model, 4, Rng(0)).fingerprint

usual = images()
ALLOCATOR.keep_freed()
print(json.dumps([ALLOCATOR.state, usual, images()]))
"""


def _run(code: str, **variables: str) -> Any:
    own = ("GLIBC_TUNABLES", "LD_PRELOAD")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k not in own}
    line = [sys.executable, "-c", code]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, env=inherited | variables).stdout)


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    state, usual, kept, given_back = _run(_FAULTS)
    assert state == "glibc, freed memory is kept"
    assert kept * 3 < usual
    assert given_back > 48 << 20


@pytest.mark.parametrize(
    "name, value", [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_the_environments_own_settings_stay(name: str, value: str) -> None:
    state, usual, kept, _ = _run(_FAULTS, **{name: value})
    assert state == f"as {name} says"
    assert kept * 2 > usual


def test_images_are_the_same_to_the_byte() -> None:
    state, usual, kept = _run(_IMAGES)
    assert state == "glibc, freed memory is kept"
    assert usual == kept
