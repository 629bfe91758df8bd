"""What the report advises, pasted as it stands there, changes the layer that it names."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import Command

from synthquant.core.record import RunRecord
from synthquant.core.run_metrics import QuantizeMetrics

Bits = dict[str, tuple[int | None, int | None]]


def bits_of(run: Path) -> Bits:
    rows = RunRecord.load(run / "run.json").metrics("quantize", QuantizeMetrics).coverage
    return {row.name: (row.weight_bits, row.input_bits) for row in rows}


def pasted(page: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Names of layers with the setting beside each, and the words of the command for all of them."""
    rows = re.findall(r'<tr><td class="mono">([^<]*)</td>.*?<code class="setting">(.*?)</code>', page)
    (command,) = re.findall(r"<pre class=\"command\">(synthquant run RUN.*?)</pre>", page, flags=re.DOTALL)
    settings = [(html.unescape(name), html.unescape(setting)) for name, setting in rows]
    return settings, shlex.split(html.unescape(command))


@pytest.mark.parametrize("scheme", ["W2A4", {"preset": "W8A8", "overrides": {"*conv*": {"weights": {"num_bits": 3}}}}])
def test_settings_of_the_report_change_the_layers_they_stand_beside(
    synthquant: Command, recipe: Path, tmp_path: Path, scheme: object
) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["quantize"]["scheme"] = scheme
    recipe.write_text(yaml.safe_dump(values))
    first = tmp_path / "first"
    assert synthquant("run", recipe, "--out", first).status == 0
    settings, command = pasted((first / "report.html").read_text())
    before = bits_of(first)
    name, setting = settings[0]
    assert len(settings) == 3
    words = shlex.split(setting)
    assert synthquant("run", first / "recipe.yaml", "--out", tmp_path / "one", *words).status == 0
    after = bits_of(tmp_path / "one")
    assert wider(before[name], after[name])
    assert {other for other in before if before[other] != after[other]} == {name}
    assert command[:4] == ["synthquant", "run", "RUN/recipe.yaml", "--out"]
    all_of_them = [first / "recipe.yaml", "--out", tmp_path / "all", *[word for word in command[5:] if word.strip()]]
    assert synthquant("run", *all_of_them).status == 0
    after = bits_of(tmp_path / "all")
    changed = {other for other in before if before[other] != after[other]}
    assert changed == {name for name, _ in settings} and all(wider(before[name], after[name]) for name in changed)


def wider(before: tuple[int | None, int | None], after: tuple[int | None, int | None]) -> bool:
    """Whether something has more bits, none being floating point, and nothing has fewer."""
    return before != after and all((b or 32) >= (a or 32) for a, b in zip(before, after, strict=True))


def test_too_few_iterations_are_told_with_what_to_set(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    learned = ["--set", "quantize.method=genie_m", "--set", "quantize.batch_size=4"]
    few = synthquant("run", recipe, "--out", tmp_path / "run", *learned, "--set", "quantize.iterations=3")
    (line,) = [line for line in few.err.splitlines() if "roundings undecided" in line]
    assert few.status == 0 and line.startswith("warning: ")
    assert line.endswith("more iterations decide them, for example --set quantize.iterations=300")
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert line.removeprefix("warning: ").partition(", for example")[0] in page
    assert "<code>--set quantize.iterations=300</code>" in page
