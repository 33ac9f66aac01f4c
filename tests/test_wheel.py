"""The wheel of ``make dist`` works without the repository: its commands run in an empty folder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from support.paths import REPO

pytestmark = pytest.mark.slow
WORDS = {1: ("fine", "warm", "funny", "moving"), 0: ("dull", "cold", "endless", "clumsy")}


def succeed(*command: str, folder: Path) -> str:
    """Run a program outside of the repository and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a new environment with the wheel, which needs hatchling alone.

    Other packages come from the environment of the tests. A line of a .pth file is a folder of
    modules, and .pth files in that folder are not read: not the one that adds the repository.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    succeed(*pip, "wheel", "--no-deps", "--wheel-dir", "dist", str(REPO), folder=folder)
    (wheel,) = (folder / "dist").iterdir()
    venv.create(folder / "venv", symlinks=True)
    programs = folder / "venv" / "bin"
    inside = ("--python", str(programs / "python"), "install", "--no-deps", "--no-index")
    succeed(*pip, *inside, str(wheel), folder=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    others = [place for place in sys.path if Path(place).name == "site-packages"]
    (packages / "tests.pth").write_text("\n".join(others))
    return programs


def test_the_package_and_its_recipes_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, sparsegrad_cli\n"
        "from sparsegrad_cli.recipe.shipped import LAUNCHERS, shipped_files\n"
        "kinds = {kind: shipped_files(kind) for kind in ('configs', 'recipes', LAUNCHERS)}\n"
        "files = {kind: [str(file) for file in files] for kind, files in kinds.items()}\n"
        "print(json.dumps({'package': sparsegrad_cli.__file__, 'files': files}))\n"
    )
    found = json.loads(succeed(str(installed / "python"), "-c", code, folder=tmp_path))
    assert Path(found["package"]).is_relative_to(installed.parent)
    for kind, paths in found["files"].items():
        assert all(Path(path).is_relative_to(installed.parent) for path in paths)
        ours = sorted((REPO / kind).glob("*.yaml"))
        assert [Path(path).read_text() for path in paths] == [path.read_text() for path in ours]
    listed = succeed(str(installed / "sparsegrad"), "configs", folder=tmp_path)
    for kind in ("configs", "recipes"):
        assert all(f"{kind}/{path.name}" in listed for path in (REPO / kind).glob("*.yaml"))


def test_from_a_csv_file_to_predictions(installed: Path, tmp_path: Path) -> None:
    program = str(installed / "sparsegrad")
    reviews = [
        (f"film {number} is {word} from its start to its end", label)
        for number in range(10)
        for label, words in WORDS.items()
        for word in words
    ]
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews])
    few = ("calibration.steps=2", "calibration.warmup_steps=0")
    succeed(program, "calibrate", *few, "-o", "runs/basis", folder=tmp_path)
    succeed(program, "init", "reviews.csv", "--yes", folder=tmp_path)
    succeed(program, "train", "reviews.yaml", *few, "train.max_steps=3", folder=tmp_path)
    printed = succeed(program, "predict", "runs/reviews", "a fine film", folder=tmp_path)
    prediction, probability, text = printed.strip().split("\t")
    assert prediction in ("0", "1") and 0.5 <= float(probability) <= 1 and text == "a fine film"
    for made in ("basis/basis.safetensors", "basis/report.html", "reviews/report.html"):
        assert (tmp_path / "runs" / made).is_file()
