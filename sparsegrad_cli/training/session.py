"""What every run does first: load and calibrate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.calibration.basis_file import (
    BasisFile,
    tensors_digest,
    write_basis,
)
from sparsegrad_cli.calibration.calibrate import (
    Calibration,
    OnStream,
    calibrate,
    passes_of,
)
from sparsegrad_cli.calibration.diagnostics import spectra
from sparsegrad_cli.calibration.warmup import warmed_head
from sparsegrad_cli.error_mapping import is_out_of_memory, may_be_out_of_memory
from sparsegrad_cli.memory.meter import make_meter
from sparsegrad_cli.methods.base import TargetShapes
from sparsegrad_cli.models.quantized import quantization_state
from sparsegrad_cli.models.targets import Target, head_parameters
from sparsegrad_cli.numerics.hosvd import Basis, leading
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe, digest
from sparsegrad_cli.run.folder import RunRecord
from sparsegrad_cli.tasks.facts import loaded_facts
from sparsegrad_cli.tasks.setup import (
    Setup,
    calibration_batches,
    hash_parameters,
    make_setup,
)
from sparsegrad_cli.training.oom import explain
from sparsegrad_cli.training.oom_trials import Situation

BASIS_NAME = "basis.safetensors"


class Session:
    """What calibration and training have in common.

    Attributes:
        gradient_phase: under which phase of the memory report gradients without an update count.
    """

    gradient_phase = "calibrate"

    def __init__(self, loaded: LoadedRecipe, record: RunRecord, observer: Observer) -> None:
        self.loaded, self.recipe = loaded, loaded.recipe
        self.record, self.observer = record, observer
        self.seconds: dict[str, float] = {}
        self.known = Situation()
        self._tokens = 0  # that calibration and its warm-up have read in this process

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Inside, memory that runs out does so with an explanation (OutOfMemoryError)."""
        try:
            yield
        except Exception as error:
            if not may_be_out_of_memory(error):
                raise
            explained = explain(error, self.recipe, self.known)
            if not is_out_of_memory(error) and explained.details["fits"] is None:
                raise
            raise explained from None

    def enter(self, phase: str, detail: str) -> None:
        """A phase begins; should memory run out in it, this is where."""
        self.known.at = phase
        interruption.set_phase(f"the {phase} phase ({detail})")
        self.observer.phase(phase, detail)

    def load(self) -> Setup:
        """Model, data and targets; fills model, task, hashes and memory's load phase."""
        self.enter("load", self.recipe.model.name)
        started = time.perf_counter()
        setup = make_setup(self.loaded, self.observer)
        self.seconds["load_s"] = time.perf_counter() - started
        self.method = self.recipe.method.settle(TargetShapes.of(self.loaded, setup.targets))
        self.meter = make_meter(setup.device)
        self.meter.watch(setup.model, weights=quantization_state(setup.model))
        with self.meter.phase("load"):
            pass
        self.known.setup = setup
        self.record.save(**loaded_facts(self.recipe, setup))
        return setup

    def calibrated(
        self, setup: Setup, *, whole: bool = False, on_stream: OnStream = lambda key, stream: None
    ) -> Calibration:
        """Stream gradients and make bases; fills the calibration block, writes the basis file.

        ``whole`` and ``on_stream`` are for diagnostics, as in :func:`calibrate`.
        """
        settings, seed = self.recipe.calibration, self.recipe.seed
        passes = passes_of(settings)
        again = f", {passes} passes" if passes > 1 else ""
        self.enter("calibrate", f"{settings.steps} steps, no update{again}")
        self.known.calibration_batch = self.calibration_batch
        self.known.calibrate = lambda size: self._calibrate(setup, size, range(1))
        own = self._own_steps
        self.observer.total_steps("calibrate", len(own) * passes)
        started = time.perf_counter()
        with self.warmed_head(setup):
            warmup_seconds, warmup_tokens = time.perf_counter() - started, self._tokens
            calibration = self._calibrate(
                setup,
                self.calibration_batch,
                own,
                whole=whole,
                meter=lambda: self.meter.phase(self.gradient_phase),
                on_step=lambda n, loss: self.observer.step("calibrate", {"step": n, "loss": loss}),
                on_stream=on_stream,
            )
        calibration.seconds += warmup_seconds
        self.seconds["calibrate_s"] = calibration.seconds
        names = ("steps", "basis_per", "source", "decomposition", "score")
        made_with: dict[str, Any] = {
            **{name: getattr(settings, name) for name in names},
            # A language model has no new head to warm.
            "warmup_steps": settings.warmup_steps if head_parameters(setup.model) else 0,
            "batch_size": self.calibration_batch,
            "passes": passes,
            "seed": seed,
            "data": setup.task.data_hash,
        }
        peak = self.meter.report()["phases"].get("calibrate", {}).get("peak_bytes")
        # Every process warms the head by itself, and calibrates on its share.
        read = torch.tensor(self._tokens - warmup_tokens, device=setup.device)
        distributed.all_reduce([read])
        tokens = warmup_tokens + int(read)
        made_with |= {"seconds": calibration.seconds, "peak_bytes": peak, "tokens": tokens}
        kept = calibration.bases
        if whole:
            kept = {key: leading(basis, self.method.basis_rank) for key, basis in kept.items()}
        file = BasisFile(
            kept,
            calibration.keys,
            self.recipe.model.name,
            setup.fingerprint,
            made_with,
            digest(self.recipe),
            tensors_digest(kept, calibration.scores),
            calibration.scores,
        )
        if distributed.is_rank_zero():
            write_basis(self.record.path / BASIS_NAME, file)
        self.record.save(
            calibration={
                **made_with,
                "stream_bytes": calibration.stream_bytes,
                "basis_file": BASIS_NAME,
                "basis_bytes": sum(b.nbytes() for b in kept.values()),
                "reused": False,
                "digest": file.digest,
                "spectra": spectra(one_per_kind(calibration.bases, setup)),
            }
        )
        return calibration

    def _calibrate(
        self,
        setup: Setup,
        batch_size: int,
        steps: range,
        *,
        targets: list[Target] | None = None,
        changes: Mapping[str, Any] | None = None,
        **told: Any,
    ) -> Calibration:
        """Calibration with some of the steps' batches, and nothing recorded of it.

        Args:
            targets: of the model's; all by default.
            changes: settings of the recipe's calibration that are others here.
        """
        settings, seed = self.recipe.calibration, self.recipe.seed

        def batches() -> Iterator[dict[str, Tensor]]:
            all_of_them = calibration_batches(setup, batch_size, seed)
            own = islice(all_of_them, steps.start, None, steps.step)
            # Of several processes some have a step more, at which the others are not asked.
            return self.batches(own, together=settings.steps // distributed.world_size())

        return calibrate(
            setup.model,
            targets or setup.targets,
            batches,
            settings.model_copy(update={**(changes or {}), "steps": len(steps)}),
            seed=seed,
            rank=self.method.basis_rank,
            train=self.recipe.train,
            **told,
        )

    @contextmanager
    def warmed_head(self, setup: Setup) -> Iterator[None]:
        """Inside, the head is warm; outside too if the recipe keeps it (the hash then says so)."""
        settings, seed = self.recipe.calibration, self.recipe.seed
        with warmed_head(
            setup.model,
            # Other batches than those that calibration sees.
            self.batches(
                calibration_batches(setup, self.calibration_batch, seed + 2),
                together=settings.warmup_steps,
            ),
            steps=settings.warmup_steps,
            learning_rate=settings.warmup_learning_rate,
            seed=seed,
            keep=settings.keep_head,
            train=self.recipe.train,
            meter=lambda: self.meter.phase(self.gradient_phase),
        ):
            yield
        if settings.keep_head and settings.warmup_steps:
            kept = hash_parameters(head_parameters(setup.model))
            self.record.save(hashes={**self.record.data["hashes"], "head_init": kept})

    def batches(
        self, batches: Iterator[dict[str, Tensor]], *, together: int
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the batches, count their tokens without padding, and stop before one when asked to.

        Args:
            together: how many of them every process of the run takes.
        """
        for number, batch in enumerate(batches):
            if number < together:
                interruption.raise_if_requested(f"batch {number + 1}")
            mask = batch.get("attention_mask")
            self._tokens += batch["input_ids"].numel() if mask is None else int((mask > 0).sum())
            yield batch

    @property
    def calibration_batch(self) -> int:
        """Examples of one calibration step."""
        train = self.recipe.train.per_device_train_batch_size
        return self.recipe.calibration.batch_size or train

    @property
    def _own_steps(self) -> range:
        """The calibration steps that this process takes."""
        return range(distributed.rank(), self.recipe.calibration.steps, distributed.world_size())


def one_per_kind(bases: dict[str, Basis], setup: Setup) -> dict[str, Basis]:
    """The bases to plot: all when shared by kind, else those of the middle block."""
    if len(bases) <= 4:
        return bases
    middle = setup.targets[len(setup.targets) // 2].block
    names = {t.name for t in setup.targets if t.block == middle}
    return {key: basis for key, basis in bases.items() if key in names}
