"""Draw the pictures of README.md from records: ``python -m docs.generate.pictures``."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path

from docs.generate.readme import mean_scores, peak_memory

_ROOT = Path(__file__).resolve().parents[2]
_PICTURES = _ROOT / "docs" / "pictures"
# Label, colour, and where the label stands: offset in points and alignment.
_POINTS = {
    "lora": ("LoRA", "#3b7fc4", (8, -3), "left"),
    "core": ("SparseGrad", "#2a9d7c", (8, -3), "left"),
    "core-dense": ("SparseGrad, dense", "#2a9d7c", (-8, -3), "right"),
    "meprop": ("MeProp", "#d9801a", (-8, -3), "right"),
    "full": ("full fine-tuning", "#777777", (8, -3), "left"),
}
# Rich's own frame loads a font from the network.
_FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" \
xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Screen of sparsegrad train">
<style>
.{unique_id}-matrix {{ font-family: Consolas, Menlo, "DejaVu Sans Mono", monospace; \
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#292929"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def main() -> None:
    """Write all pictures."""
    _PICTURES.mkdir(exist_ok=True)
    _terminal()
    _chart()
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tests = json.loads((_ROOT / "docs/results/tests.json").read_text(encoding="utf-8"))
    failed = f", {tests['failed']} failed" if tests["failed"] else ""
    badges = {
        "python": ("python", project["requires-python"].removeprefix(">=") + "+"),
        "license": ("license", project["license"]),
        "paper": ("paper", "EMNLP 2024"),
        "tests": ("tests", f"{tests['passed']:,} passed{failed}"),
    }
    for name, (left, right) in badges.items():
        (_PICTURES / f"{name}.svg").write_text(_badge(left, right), encoding="utf-8")


def _terminal() -> None:
    """Draw what ``sparsegrad train`` prints at its end, from the record of a real run."""
    from rich.console import Console

    from sparsegrad_cli.records.run import RunRecord
    from sparsegrad_cli.report.run import run_screen
    from sparsegrad_cli.report.terminal import screen

    text = (_ROOT / "docs/results/first_run.json").read_text(encoding="utf-8")
    console = Console(record=True, width=98, file=io.StringIO(), force_terminal=True)
    console.print("$ sparsegrad train", style="bold", highlight=False)
    console.print(screen(run_screen(RunRecord.model_validate_json(text))))
    picture = console.export_svg(title="", code_format=_FRAME, unique_id="train")
    (_PICTURES / "train.svg").write_text(picture, encoding="utf-8")


def _chart() -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "sparsegrad"
    scores, memory = mean_scores(), peak_memory()
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, color, offset, side) in _POINTS.items():
        mean = sum(score for score, _ in scores[name].values()) / len(scores[name])
        axes.plot(memory[name], mean, "o", color=color, ms=9)
        axes.annotate(
            label, (memory[name], mean), offset, textcoords="offset points", ha=side, fontsize=11
        )
    axes.set(
        title="MiniLM-L6 on three GLUE tasks, five seeds: better is up and left",
        xlabel="peak memory of a training step beyond the weights, MiB",
        ylabel="mean score × 100",
        xlim=(270, 450),
        ylim=(50, 55.5),
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(_PICTURES / "score_and_memory.svg", metadata={"Date": None}, facecolor="white")


def _badge(left: str, right: str) -> str:
    """Return a badge as SVG; the width of a text is estimated from its characters."""
    a, b = (round(7 * len(text) + 12) for text in (left, right))
    middle = 'y="14" fill="#fff" text-anchor="middle"'
    font = 'font-family="Verdana, \'DejaVu Sans\', sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="20" role="img" '
        f'aria-label="{left}: {right}">'
        f'<rect width="{a + b}" height="20" rx="3" fill="#57606a"/>'
        f'<path d="M{a} 0h{b - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1 -3 3h-{b - 3}z" fill="#1a7f37"/>'
        f'<g {font}><text x="{a / 2}" {middle}>{left}</text>'
        f'<text x="{a + b / 2}" {middle}>{right}</text></g></svg>\n'
    )


if __name__ == "__main__":
    main()
