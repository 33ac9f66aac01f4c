"""Check on a CUDA machine what could only be run on CPUs, in ten minutes.

    make gpu-check
    python -m benchmarks.gpu_check --out docs/results/gpu_check.json
    python -m benchmarks.gpu_check --device cpu --small     the same functions on a CPU

Every check compares the device with something that does not depend on it: the same run on the CPU
in float32, the estimate, a product with the dequantized weight, the padded model, the singular
values of the gradient. A check that cannot run says why, and does not count as passed. Without CUDA
the program ends with exit code 2.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.common import save
from benchmarks.models import batch_of, methods_at, model_of, random_bases
from benchmarks.processes import losses, still_model
from benchmarks.step_time import floor_of, step_of
from sparsegrad_cli.calibration.calibrate import calibrate
from sparsegrad_cli.errors import SparsegradError
from sparsegrad_cli.estimate.estimate_steps import estimate_steps
from sparsegrad_cli.estimate.fake_run import Conditions
from sparsegrad_cli.methods.registry import ALL_NAMES
from sparsegrad_cli.models.load_model import load_classifier
from sparsegrad_cli.models.quantized import dequantized, quantized_layers
from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.models.unpadding import use_unpadding
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.schema import CalibrationSection, ModelSection, TargetsSection
from sparsegrad_cli.recipe.tasks import GLUE_TASKS
from sparsegrad_cli.training.train import train

MIB = 2**20
BF16_APART = 0.05  # largest relative difference of a loss from float32 on the CPU
PEAK_APART = 0.10  # of the allocator's peak from the estimate
PRODUCT_APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
PASSED, FAILED, MEASURED, NOT_RUN = "passed", "failed", "measured", "not run"


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        device: the device that is checked.
        folder: an empty folder for runs.
        model: an encoder without dropout, a folder or name.
        small: use sizes that a CPU computes in seconds.
        deadline: value of ``time.perf_counter`` after which no further case is started.
    """

    device: torch.device
    folder: Path
    model: str
    small: bool = False
    deadline: float = math.inf

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the CPU."""
        return self.device.type == "cpu"

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if not self.on_cpu:
            torch.cuda.synchronize(self.device)


@dataclass
class Finding:
    """The result of one case of a check.

    Attributes:
        check: name of the check.
        case: what was checked.
        status: ``passed``, ``failed``, ``measured`` (there is nothing to compare) or ``not run``.
        why: why it failed or was not run.
        figures: numbers with their units in the names.
    """

    check: str
    case: str
    status: str
    why: str = ""
    figures: dict[str, float] = field(default_factory=dict)


Case = Callable[[], Finding]
Cases = Iterator[tuple[str, Case]]


def judged(check: str, case: str, limits: dict[str, float], **figures: float) -> Finding:
    """Return the finding of a case: it passes if each named figure is within its limit."""
    over = [
        f"{name} is {figures[name]:.3g}, and at most {limit:.3g} was expected"
        for name, limit in limits.items()
        if not figures[name] <= limit  # NaN is over every limit.
    ]
    return Finding(check, case, FAILED if over else PASSED, "; ".join(over), figures)


# --- runs


def settings_of(place: Place, method: str, *more: str) -> tuple[str, ...]:
    """Return a short run of a method on the built-in task."""
    size, length = (4, 16) if place.small else (16, 64)
    return (
        f"model={place.model}",
        f"method={method}",
        "task=builtin:acceptability",
        f"task.max_length={length}",
        "task.eval_limit=8",
        f"train.per_device_train_batch_size={size}",
        "train.max_steps=2",
        "train.logging_steps=1",
        "train.eval_strategy=no",
        "train.save_strategy=no",
        "calibration.steps=1",
        "calibration.warmup_steps=0",
        *more,
    )


def run(place: Place, name: str, settings: tuple[str, ...], *, on_cpu: bool) -> dict[str, Any]:
    """Train in a new folder and return run.json."""
    where = (f"output_dir={place.folder / name}", f"train.use_cpu={str(on_cpu).lower()}")
    return train(load_recipe(None, (*settings, *where))).to_json()


def methods_in_bf16(place: Place) -> Cases:
    """Compare the losses of every method in bfloat16 with those of float32 on the CPU."""
    names = ("lora", "sparsegrad") if place.small else ALL_NAMES
    for name in names:

        def case(name: str = name) -> Finding:
            settings = settings_of(place, name)
            expected = losses(run(place, f"{name}-float32", settings, on_cpu=True))
            half = (*settings, "train.bf16=true")
            found = losses(run(place, f"{name}-bf16", half, on_cpu=place.on_cpu))
            apart = max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))
            return judged("bf16", name, {"loss_apart": BF16_APART}, loss_apart=apart)

        yield name, case


def peaks(place: Place) -> Cases:
    """Compare the memory that runs measure with the estimate, for forward and backward."""
    for name in ("lora", "sparsegrad") if place.small else ("full", "lora", "meprop", "sparsegrad"):

        def case(name: str = name) -> Finding:
            # Padding is computed, because an estimate does not know it.
            settings = settings_of(place, name, "train.unpadded=false")
            if not place.small:  # so that the allocator's rounding is small
                settings = (*settings, "train.per_device_train_batch_size=64")
            counted = run(place, f"{name}-peaks", settings, on_cpu=place.on_cpu)["memory"]
            size, length = counted["batch_shape"]
            shape = (f"train.per_device_train_batch_size={size}", f"task.max_length={length}")
            conditions = Conditions(kernels="cpu" if place.on_cpu else "cuda")
            loaded = load_recipe(None, (*settings, *shape))
            (row,) = estimate_steps([(name, loaded)], conditions).rows
            figures: dict[str, float] = {}
            for phase in ("forward", "backward"):
                measured = counted["phases"][phase]["peak_bytes"]
                figures[f"{phase}_mib"] = measured / MIB
                figures[f"{phase}_apart"] = abs(row.phases[phase] / measured - 1)
            limits = dict.fromkeys(("forward_apart", "backward_apart"), PEAK_APART)
            return judged("peak and estimate", name, limits, **figures)

        yield name, case


def step_times(place: Place) -> Cases:
    """Measure the seconds of a training step, with BERT-base's shapes."""
    size, length, rounds = (2, 8, 1) if place.small else (32, 128, 10)
    named = methods_at(0.01, 8 if place.small else 160)
    for name in ("floor", "lora", "core", "meprop entries", "full"):

        def case(name: str = name) -> Finding:
            torch.manual_seed(0)
            model = model_of(place.model if place.small else "shapes:bert-base").to(place.device)
            targets = find_targets(model, TargetsSection())
            batch = {key: t.to(place.device) for key, t in batch_of(size, length).items()}
            config: Any = model.config
            batch["input_ids"] %= config.vocab_size  # small models have fewer
            if name == "floor":
                step = floor_of(model, targets, batch)
            else:
                rank = int(named["core"].basis_rank or 0)
                drawn = random_bases(targets, rank).items()
                bases = {key: basis.to(torch.float32, place.device) for key, basis in drawn}
                step = step_of(named[name], model, targets, bases, batch)
            times = [seconds_of(step, place) for _ in range(rounds + 2)][2:]
            figures = {"median_ms": 1000 * statistics.median(times)}
            return Finding("step time", name, MEASURED, "", figures)

        yield name, case


def seconds_of(step: Callable[[], None], place: Place) -> float:
    """Return the seconds of one step, after which the device is idle."""
    place.synchronize()
    started = time.perf_counter()
    step()
    place.synchronize()
    return time.perf_counter() - started


# --- parts


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of the expected tensor, in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def four_bit(place: Place) -> Cases:
    """Compare a 4-bit layer's output and input gradient with products by its dequantized weight."""

    def case() -> Finding:
        section = ModelSection(name=place.model, quantization="4bit")
        model = load_classifier(section, GLUE_TASKS["cola"], 0, place.device).model
        plain = load_classifier(ModelSection(name=place.model), GLUE_TASKS["cola"], 0).model
        name, layer = next(iter(quantized_layers(model).items()))
        dense: Any = plain.get_submodule(name)
        weight_OI = dequantized(layer).float()
        x_NI = torch.randn(8, weight_OI.shape[1], device=place.device, requires_grad=True)
        y_NO = layer(x_NI)
        y_NO.sum().backward()
        bias = 0 if dense.bias is None else dense.bias.to(place.device)
        assert x_NI.grad is not None
        with torch.no_grad():
            figures = {
                "output_apart": apart(y_NO, x_NI @ weight_OI.T + bias),
                "gradient_apart": apart(x_NI.grad, weight_OI.sum(0).expand_as(x_NI)),
                # NF4 rounds normal numbers to 16 values: about a tenth of their size.
                "rounding": apart(weight_OI, dense.weight.to(place.device)),
            }
        limits = {"output_apart": 2e-2, "gradient_apart": 2e-2, "rounding": 0.2}
        return judged("4-bit layer", name, limits, **figures)

    yield "nf4", case


def unpadded(place: Place) -> Cases:
    """Compare logits and gradients without padding with those of the padded model."""
    for dtype in (torch.float32, torch.bfloat16):

        def case(dtype: torch.dtype = dtype) -> Finding:
            loaded = load_classifier(ModelSection(name=place.model), GLUE_TASKS["cola"], 0)
            model = loaded.model.to(place.device)
            unpadding = use_unpadding(model)
            batch = ragged(8, 16 if place.small else 128)
            inputs = {key: t.to(place.device) for key, t in batch.items()}
            short, gradient = outputs_of(model, inputs, dtype)
            with unpadding.turned_off():
                whole, whole_gradient = outputs_of(model, inputs, dtype)
            figures = {
                "logits_apart": apart(short, whole),
                "gradient_apart": apart(gradient, whole_gradient),
                "computed": unpadding.training.computed
                / (unpadding.training.padded * len(unpadding.blocks)),
            }
            limit = PRODUCT_APART[dtype]
            limits = {"logits_apart": limit, "gradient_apart": 10 * limit, "computed": 0.9}
            name = str(dtype).removeprefix("torch.")
            return judged("without padding", name, limits, **figures)

        yield str(dtype).removeprefix("torch."), case


def ragged(size: int, length: int) -> dict[str, Tensor]:
    """Return rows of 3 to ``length`` tokens, padded on the right, with labels."""
    batch = batch_of(size, length)
    lengths = torch.linspace(3, length, size).long()
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    # Small models have fewer token ids than batch_of draws.
    return batch | {"input_ids": batch["input_ids"] % 90 * mask, "attention_mask": mask}


def outputs_of(
    model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of the embeddings."""
    model.zero_grad(set_to_none=True)
    model.train()
    half = dtype != torch.float32
    with torch.autocast(next(iter(inputs.values())).device.type, torch.bfloat16, enabled=half):
        out = model(**inputs)
    out.loss.backward()
    weight: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    return out.logits.detach().float(), weight.grad.detach().clone()


def calibration(place: Place) -> Cases:
    """Compare bases at the layer shapes of LLaMA-2 7B with the gradient's own singular values."""
    ways: tuple[Literal["exact", "randomized"], ...] = ("exact", "randomized")
    for how in ways:

        def case(how: Literal["exact", "randomized"] = how) -> Finding:
            model, batch = llama_block(place)
            targets = find_targets(model, TargetsSection())
            rank = 8 if place.small else 256
            section = CalibrationSection(
                steps=1, source="batch", decomposition=how, power_steps=2, score="spectral"
            )
            place.synchronize()
            started = time.perf_counter()
            found = calibrate(model, targets, lambda: iter([batch]), section, seed=0, rank=rank)
            place.synchronize()
            seconds = time.perf_counter() - started
            bases = found.by_target()
            model(**batch).loss.backward()
            ratios, skewed = [], 0.0
            for target in targets:
                g_OI: Any = model.get_submodule(target.name).weight.grad
                q_OR, q_IR = (
                    q.double() for q in (bases[target.name].q_out, bases[target.name].q_in)
                )
                best = float(torch.linalg.svdvals(g_OI.double())[:rank].square().sum())
                ratios.append(float((q_OR.T @ g_OI.double() @ q_IR).square().sum()) / best)
                eye = torch.eye(rank, dtype=torch.float64, device=place.device)
                skewed = max(skewed, *(float((q.T @ q - eye).abs().max()) for q in (q_OR, q_IR)))
            figures = {"seconds": seconds, "lost_energy": 1 - min(ratios), "skewed": skewed}
            limits = {"lost_energy": 0.02, "skewed": 1e-3}
            return judged("calibration at 7B shapes", how, limits, **figures)

        yield how, case


def llama_block(place: Place) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return one block of LLaMA-2 7B's shapes with random weights, and a batch."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, heads = (32, 64, 2) if place.small else (4096, 11008, 32)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_hidden_layers=1,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).to(place.device)
    ids = batch_of(2, 32 if place.small else 512)["input_ids"].to(place.device) % 1000
    return model, {"input_ids": ids, "labels": ids}


# --- the program

CHECKS = (step_times, peaks, unpadded, four_bit, calibration, methods_in_bf16)


def run_checks(
    place: Place, note: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """Run all checks until the deadline, and return their findings in order."""
    found = []
    for check in CHECKS:
        for name, case in check(place):
            label = check.__name__.replace("_", " ")
            if time.perf_counter() > place.deadline:
                finding = Finding(label, name, NOT_RUN, "the time was over")
            else:
                try:
                    finding = case()
                except SparsegradError as error:
                    finding = Finding(label, name, NOT_RUN, error.what)
                except Exception as error:  # The others must be tried, too.
                    finding = Finding(label, name, FAILED, f"{type(error).__name__}: {error}")
            found.append(finding)
            note(finding)
    return found


def line_of(finding: Finding) -> str:
    """Return a row of the table."""
    said = ", ".join(f"{name} {value:.4g}" for name, value in finding.figures.items())
    status = f"{NOT_RUN}: {finding.why}" if finding.status == NOT_RUN else finding.status
    why = f" ({finding.why})" if finding.status == FAILED else ""
    return f"{finding.check:26} {finding.case:18} {status:9} {said}{why}"


def main() -> int:
    """Parse the arguments, run the checks, show and save what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu: try the checks without a GPU")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none. Run it on a "
            "machine with one, with a CUDA build of torch (make install TORCH_INDEX=...); "
            "python -m benchmarks.gpu_check --device cpu --small tries the checks on the CPU.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        model = str(still_model(Path(folder) / "model"))
        deadline = time.perf_counter() + 60 * options.minutes
        place = Place(device, Path(folder), model, options.small, deadline)
        found = run_checks(place, lambda finding: print(line_of(finding), flush=True))
    counts = {s: sum(f.status == s for f in found) for s in (PASSED, FAILED, MEASURED, NOT_RUN)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    content = {"device": name, "small": options.small, "counts": counts}
    save(options.out, "gpu_check", {**content, "findings": [asdict(f) for f in found]})
    return 1 if counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
