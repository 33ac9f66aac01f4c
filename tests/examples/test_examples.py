"""The examples, run as their users run them, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.chat_models import chat_model_folder
from support.paths import REPO
from support.small_runs import base_folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("bert") / "base")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model_folder(tmp_path_factory.mktemp("llama") / "base")


def run(folder: Path, *command: str) -> str:
    """Run a command in a folder and return what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def example(name: str) -> str:
    return str(REPO / "examples" / name)


def test_plain_loop(classifier: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, sys.executable, example("plain_loop.py"), str(classifier))
    assert "the loaded adapter gives the same logits: True" in printed


@pytest.mark.usefixtures("warm_python")
def test_trainer_resumes_exactly(classifier: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, sys.executable, example("trainer_resume.py"), str(classifier))
    assert "static: the resumed run ends with the same weights: True" in printed
    assert "refresh: the resumed run ends with the same weights: True" in printed


@pytest.mark.usefixtures("warm_python")
def test_plain_torch_model_merges_and_converts(tmp_path: Path) -> None:
    printed = run(tmp_path, sys.executable, example("plain_torch.py"))
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "differs" in line]
    assert len(differences) == 2 and max(differences) < 1e-4


@pytest.mark.usefixtures("warm_python")
def test_merged_and_as_lora_it_loads_without_this_package(classifier: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, sys.executable, example("merge_and_lora.py"), str(classifier))
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "differs" in line]
    assert len(differences) == 2 and max(differences) < 1e-4
    for folder in ("lora", "merged"):
        files = [path for path in (tmp_path / folder).iterdir() if path.suffix != ".safetensors"]
        assert files and not any("sparsegrad" in path.read_text().lower() for path in files)


@pytest.mark.slow
def test_two_processes(classifier: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    printed = run(tmp_path, *launch, example("two_processes.py"), str(classifier))
    assert "2 processes end with the same weights: True" in printed
    assert (tmp_path / "two-processes" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_sft_trainer(chat_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    printed = run(tmp_path, sys.executable, example("sft_trainer.py"), str(chat_model))
    assert "the adapter that TRL saved gives the same logits: True" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("warm_python")
def test_dpo_trainer(chat_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    printed = run(tmp_path, sys.executable, example("dpo_trainer.py"), str(chat_model))
    first, last = (float(word) for word in printed.splitlines()[-1].split()[3::2])
    assert last < first
