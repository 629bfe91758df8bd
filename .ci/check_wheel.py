"""Install a wheel into an environment of its own, with its base dependencies alone, and use it outside of the checkout.

    python .ci/check_wheel.py build/wheel/synthquant-*.whl

The environment sees, of the packages beside this interpreter, those that the wheel asks for without extras and those
that these ask for: by links, since a copy of PyTorch takes gigabytes. Of synthquant it sees the wheel alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "synthquant"
# From weights to a report, too short to be good.
DEMO = ("images.count=8", "images.iterations=1", "quantize.iterations=1", "evaluate.limit=64")


def main() -> None:
    """Check the wheel that the command line names."""
    wheel = Path(sys.argv[1]).resolve()
    require_all_files(wheel)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        venv.create(place, with_pip=True)
        python, command = (place / "bin" / name for name in ("python", PACKAGE))
        call(place, python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
        (site,) = place.glob("lib/python*/site-packages")
        (installed,) = metadata.distributions(name=PACKAGE, path=[str(site)])
        packages = asked_for(installed)
        for name in packages:
            link(metadata.distribution(name), site)
        imported = call(place, python, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)").strip()
        require(Path(imported).is_relative_to(site), f"another copy of the package was imported: {imported}")
        version = call(place, command, "--version")
        require(version.split() == [PACKAGE, installed.version], f"another version: {version}")
        listed = call(place, command, "list")
        for name in ("genie_d", "genie_m", "zoo/cifar10-resnet20", "zoo/cifar10-ddpm", "bundled/cifar10-test"):
            require(name in listed, f"`list` does not name {name}")
        call(place, python, "-c", f"from {PACKAGE}.cli.run import demo")
        settings = [word for setting in DEMO for word in ("--set", setting)]
        print(call(place, command, "demo", "--device", "cpu", "--out", "demo", *settings), end="")
        require((place / "demo" / "report.html").is_file(), "`demo` left no report")
    print(f"{wheel.name}: every file is there; list and demo work beside {len(packages)} packages, no extras")


def require(holds: bool, message: str) -> None:
    """End with a message unless something holds."""
    if not holds:
        sys.exit(f"check_wheel: {message}")


def require_all_files(wheel: Path) -> None:
    """End if the wheel lacks a file of the package that is under version control, or holds another one."""
    tracked = subprocess.run(["git", "ls-files", "-z", f"src/{PACKAGE}"], cwd=ROOT, capture_output=True, check=True)
    wanted = {name.removeprefix("src/") for name in tracked.stdout.decode().split("\0") if name}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")}
    require(len(wanted) > 100, "git names no files of the package")
    require(not wanted - found, f"the wheel lacks {sorted(wanted - found)}")
    require(not found - wanted, f"the wheel has what is not under version control: {sorted(found - wanted)}")


def asked_for(package: metadata.Distribution) -> set[str]:
    """Names of the packages that one asks for without extras, of those that these ask for, and so on."""
    found: set[tuple[str, str]] = set()
    pending = [(text, "") for text in package.requires or ()]
    while pending:
        text, of_extra = pending.pop()
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": of_extra}):
            continue
        for extra in {"", *wanted.extras} - {known for name, known in found if name == wanted.name}:
            found.add((wanted.name, extra))
            pending += [(further, extra) for further in metadata.distribution(wanted.name).requires or ()]
    return {name for name, _ in found}


def link(package: metadata.Distribution, site: Path) -> None:
    """Let a folder of packages see one that is installed elsewhere."""
    for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())


def call(place: Path, *command: str | Path) -> str:
    """What a command prints in a folder that is not the checkout's; ends if the command fails."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["OMP_NUM_THREADS"] = "1"  # batches are tiny, and threads that wait for each other cost minutes
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    require(done.returncode == 0, f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
