"""Commands that a launcher of several processes may start, and those it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_runs import Cli

COMMANDS = ("compare", "estimate", "validate", "report", "export", "generate", "judge", "configs")


@pytest.fixture
def of_forty(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set the environment of the first of forty processes, as torchrun does."""
    for key, value in (("WORLD_SIZE", "40"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(key, value)
    return monkeypatch


@pytest.mark.parametrize("command", COMMANDS)
def test_single_process_commands_are_refused_under_a_launcher(
    cli: Cli, of_forty: pytest.MonkeyPatch, command: str
) -> None:
    outcome = cli(command, "somewhere")
    said = " ".join(outcome.err.split())
    assert outcome.code == 2
    assert f"sparsegrad {command} was started in 40 processes" in said
    assert f"sparsegrad {command} without the launcher" in said
    of_forty.setenv("RANK", "39")
    outcome = cli(command, "somewhere")
    assert (outcome.code, outcome.out, outcome.err) == (2, "", "")


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_fewer_calibration_steps_than_processes_are_refused(
    cli: Cli, of_forty: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    outcome = cli(command, "calibration.steps=39", "-o", str(tmp_path / "run"))
    said = " ".join(outcome.err.split())
    assert outcome.code == 2
    assert "40 processes cannot share 39 calibration steps" in said
    assert "calibration.steps=40 or more" in said
    assert not (tmp_path / "run").exists()


def test_calibration_steps_do_not_limit_a_method_without_calibration(
    cli: Cli, of_forty: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command gets as far as joining the process group."""

    class MetError(Exception):
        pass

    def meet(*, use_cpu: bool) -> None:
        raise MetError

    monkeypatch.setattr("sparsegrad_cli.distributed.init", meet)
    outcome = cli("train", "method=lora", "calibration.steps=1")
    assert "share" not in outcome.err and "MetError" in outcome.err
