"""Put trained networks into the package, with what they reached in their cards.

    python training/install_zoo.py --from FOLDER --results results/zoo

FOLDER holds what the training scripts wrote: `NAME.safetensors` and `NAME.json` of classifiers, folders of diffusion
models. What a diffusion model reached is read from `results/zoo/NAME.json` (`check_generators.py`). Everything in the
folder is checked before anything is copied. A classifier that was trained from bundled weights is only taken if it is
better than they are on the training images that were held out.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from synthquant.models.zoo import NETWORKS, pipelines

BUDGET = 40_000_000


def reached(result: dict[str, Any]) -> dict[str, Any]:
    """What a card repeats of the figures of a diffusion model."""
    kept = {key: result[key] for key in ("sampling", "empty", "fid")}
    if "recognised" in result:
        kept["recognised"] = {
            name: {key: found[key] for key in ("samples", "share", "real_test_images")}
            for name, found in result["recognised"].items()
        }
    return kept


def pipeline_card(folder: Path, results: Path) -> dict[str, Any]:
    """The card of a diffusion model with what it reached."""
    measured = results / f"{folder.name}.json"
    if not measured.is_file():
        raise SystemExit(f"{measured} is missing: run training/check_generators.py first")
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card | {"reached": reached(json.loads(measured.read_text(encoding="utf-8")))}


def size_after(weights: Path, pipelines_folder: Path, sources: list[Path]) -> int:
    """Bytes of all bundled weights once `sources` are in place."""
    there = {path.name: path for path in [*weights.glob("*.safetensors"), *pipelines_folder.glob("*/")]}
    there |= {path.name: path for path in sources}
    files = [file for path in there.values() for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def require_better(card: dict[str, Any]) -> None:
    """Stop if a network is no better on images held out than the weights it was trained from."""
    found = card.get("held_out", {})
    if "top1_of_start" in found and found["top1"] <= found["top1_of_start"]:
        raise SystemExit(
            f"{card['name']} is not better than what is bundled on {found['images']} images held out:"
            f" {found['top1']:.2%}, bundled {found['top1_of_start']:.2%}"
        )


def install(source: Path, results: Path, zoo: Path) -> list[str]:
    """Copy everything found in `source` below the folder `zoo`; returns the names."""
    weights, folders = zoo / "weights", zoo / "pipelines"
    classifiers = [file for name in NETWORKS if (file := source / f"{name}.safetensors").is_file()]
    models = [source / name for name in pipelines.PIPELINES if (source / name / "model_index.json").is_file()]
    missing = [file.stem for file in classifiers if not file.with_suffix(".json").is_file()]
    if missing or not classifiers + models:
        raise SystemExit(f"no card for {', '.join(missing)}" if missing else f"nothing to install in {source}")
    for file in classifiers:
        require_better(json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))
    cards = {folder: pipeline_card(folder, results) for folder in models}
    size = size_after(weights, folders, classifiers + models)
    if size > BUDGET:
        raise SystemExit(f"all checkpoints together would have {size / 1e6:.1f} MB, more than {BUDGET / 1e6:.0f} MB")
    for file in classifiers:
        for part in (file, file.with_suffix(".json")):
            shutil.copyfile(part, weights / part.name)
    for folder, card in cards.items():
        shutil.rmtree(folders / folder.name, ignore_errors=True)
        shutil.copytree(folder, folders / folder.name, copy_function=shutil.copyfile)
        text = json.dumps(card, indent=2) + "\n"
        (folders / folder.name / "card.json").write_text(text, encoding="utf-8")
    return [path.stem for path in classifiers + models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder of trained networks")
    parser.add_argument("--results", type=Path, default=Path("results/zoo"))
    parser.add_argument("--zoo", type=Path, default=Path(pipelines.__file__).parent, help="folder of the zoo")
    args = parser.parse_args()
    print("\n".join(install(args.source, args.results, args.zoo)))


if __name__ == "__main__":
    main()
