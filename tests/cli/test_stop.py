"""Ctrl-C, SIGTERM and memory that runs out: one line about what is kept, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Command

from synthquant.cli import stop
from synthquant.data.image_set import ImageSet

LISTEN = "import os, signal, sys; from synthquant.cli.stop import STOP; STOP.listen(); "
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT); "


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)
    stop.STOP.received = None


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def send(number: signal.Signals, calls: int = 1, instead: Exception | None = None) -> Callable[..., None]:
    """Return a function that, called for the `calls`-th time, sends this process a signal."""
    left = [calls]

    def strike(*_: object, **__: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            try:
                os.kill(os.getpid(), number)
                signal.sigpending()  # a bytecode at which the handler runs
            except KeyboardInterrupt:
                if instead is None:
                    raise
                raise instead from None

    return strike


def test_signals_are_answered_before_anything_heavy_is_loaded() -> None:
    done = python(
        "import sys, synthquant.cli; print(sorted({'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_signal_while_packages_load_is_one_line() -> None:
    for number, code, word in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")):
        done = python(f"{LISTEN}os.kill(os.getpid(), {int(number)}); import torch; print('went on')")
        assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{word}: nothing was begun\n")


def test_a_second_signal_quits_at_once_but_one_that_was_passed_on_twice_does_not() -> None:
    swallow = f"{LISTEN}STOP.loaded()\ntry: {INTERRUPT}\nexcept KeyboardInterrupt: pass\n"
    late = python(f"{swallow}STOP._since -= 1; {INTERRUPT}print('went on')")
    assert (late.returncode, late.stdout) == (130, "")
    assert late.stderr == "interrupted: stopped at once; what was finished is kept\n"
    assert python(f"{swallow}{INTERRUPT}print('went on')").stdout == "went on\n"


def test_signals_that_the_caller_ignores_stay_ignored() -> None:
    done = python(f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {LISTEN}{INTERRUPT}print('went on')")
    assert done.stdout == "went on\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_what_is_kept_and_goes_on(
    synthquant: Command,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("synthquant.run_stages.measure_sqnr", send(number))
        stopped = synthquant("run", recipe, "--out", out)
    assert (stopped.status, stopped.out) == (status, "")
    word = "interrupted" if number == signal.SIGINT else "terminated"
    said = stopped.err.splitlines()[-1]
    assert said.startswith(f"{word}: {out} keeps model, images, quantize, checkpoint; 1 part of images;"), said
    assert said.endswith("the same command goes on from there")
    part = (out / "images" / "part-00000.parquet").stat().st_mtime_ns
    assert synthquant("run", recipe, "--out", out).status == 0
    assert (out / "images" / "part-00000.parquet").stat().st_mtime_ns == part


def test_stopped_synthesis_goes_on(
    synthquant: Command, model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "images"
    command = ["synthesize", *model_options, "--method", "noise", "--count", 6, "--out", out]
    command += ["--set", "batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr("synthquant.core.progress.Bar.advance", send(signal.SIGINT, calls=3))
        stopped = synthquant(*command)
    assert stopped.status == 130
    assert re.search(rf"interrupted: {out} keeps 1 part of images; the same command goes on", stopped.err)
    assert synthquant(*command).status == 0 and len(ImageSet.open(out)) == 6


def test_commands_that_keep_nothing_say_so(
    synthquant: Command, model_options: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("synthquant.core.progress.Bar.advance", send(signal.SIGINT))
    stopped = synthquant("evaluate", *model_options, "--data", data)
    assert stopped.err == "interrupted: nothing is kept; the same command starts again\n" and stopped.status == 130
    monkeypatch.setattr("synthquant.core.progress.Bar.advance", send(signal.SIGTERM))
    out = tmp_path / "chosen"
    stopped = synthquant("select", data, "--model", *model_options, "--by", "energy:0.5", "--out", out)
    assert stopped.err == f"terminated: nothing is kept, {out} is as it was; the same command starts again\n"
    assert [
        path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".pyc" and path.name != "__pycache__"
    ] == before


def test_a_command_that_was_stopped_after_its_last_file_says_so(
    synthquant: Command, model_options: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "chosen"
    monkeypatch.setattr("synthquant.select.write._warn_if_farther", send(signal.SIGTERM))
    stopped = synthquant("select", data, "--model", *model_options, "--by", "energy:0.5", "--out", out)
    assert stopped.status == 143 and stopped.err.splitlines()[-1] == f"terminated: {out} was finished already"
    assert len(ImageSet.open(out))


def test_a_library_that_makes_an_error_of_its_own_of_the_signal(
    synthquant: Command, model_options: list[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strike = send(signal.SIGTERM, instead=RuntimeError("numpy.core failed to import"))
    monkeypatch.setattr("synthquant.core.progress.Bar.advance", strike)
    stopped = synthquant("evaluate", *model_options, "--data", data)
    assert stopped.status == 143 and stopped.err.startswith("terminated: nothing is kept")


def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(
    synthquant: Command,
    recipe: Path,
    data: Path,
    model_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("synthquant.run_stages.measure_sqnr", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
        failed = synthquant("run", recipe, "--out", out)
    said = failed.err.splitlines()[-1]
    assert failed.status == 1 and said.startswith("error: main memory ran out; set memory.host_gib lower"), failed.err
    assert f"{out} keeps model, images, quantize, checkpoint" in said
    assert synthquant("run", recipe, "--out", out, "--set", "memory.host_gib=0.5").status == 0

    def on_gpu(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("synthquant.core.progress.Bar.advance", on_gpu)
    failed = synthquant("evaluate", *model_options, "--data", data)
    assert failed.error.startswith(
        "error: device memory ran out; lower --set batch_size or --input-size or use --device cpu"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_process_that_may_not_have_more_memory(model_options: list[str], tmp_path: Path) -> None:
    """The real thing: an address space with room for the packages and 200 MB more."""
    command = ["synthesize", *model_options, "--method", "noise", "--count", "20000", "--out", str(tmp_path / "images")]
    command += ["--set", "batch_size=20000", "--input-size", "128", "--device", "cpu"]
    code = (
        "import resource, synthquant.cli, synthquant.cli.group, torch; torch.set_num_threads(1); "
        "synthquant.cli.group.load_command('synthesize'); "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2); "
        f"synthquant.cli.main({json.loads(json.dumps(command))!r})"
    )
    done = python(code)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: main memory ran out; lower --set batch_size"), done.stderr
