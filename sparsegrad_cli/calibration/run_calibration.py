"""Calibrate a run with the batches, warm-up and settings of its recipe; write basis and record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsegrad_cli import distributed, interruption
from sparsegrad_cli.calibration.basis_file import (
    BasisFile,
    basis_digest,
    check_belongs,
    check_rank,
    check_tokens,
    read_basis,
    write_basis,
)
from sparsegrad_cli.calibration.calibrate import Calibration, OnStream, calibrate, passes_of
from sparsegrad_cli.calibration.diagnostics import spectra
from sparsegrad_cli.calibration.select_rows import CANDIDATES, body_features, representative
from sparsegrad_cli.calibration.warmup import WARMUP_BATCHES, warmed_head
from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.memory.out_of_memory import (
    CALIBRATION_KEY,
    Attempt,
    Phase,
    Trial,
    attempt,
    out_of_memory_explained,
)
from sparsegrad_cli.models.digests import parameters_digest
from sparsegrad_cli.models.targets import Target, head_parameters
from sparsegrad_cli.numerics.hosvd import Basis, leading
from sparsegrad_cli.recipe.load_recipe import digest
from sparsegrad_cli.records.basis import BasisMetadata
from sparsegrad_cli.records.run import CalibrationBlock, CalibrationSettings, HashesBlock
from sparsegrad_cli.run.open_run import Run
from sparsegrad_cli.tasks.setup import Setup, random_batches, random_rows, training_batches

BASIS_NAME = "basis.safetensors"


@dataclass
class RunCalibration:
    """Calibration as the recipe of a run describes it.

    Attributes:
        run: the open run.
        setup: model, data and targets, before the method has changed the model.
        tokens: tokens without padding that this process has read so far, warm-up included.
    """

    run: Run
    setup: Setup
    tokens: int = 0
    _chosen: list[int] | None = None

    @property
    def batch_size(self) -> int:
        """Number of examples in one calibration step."""
        recipe = self.run.recipe
        return recipe.calibration.batch_size or recipe.train.per_device_train_batch_size

    @property
    def own_steps(self) -> range:
        """The calibration steps that this process takes."""
        return range(
            distributed.rank(), self.run.recipe.calibration.steps, distributed.world_size()
        )

    def make_basis(
        self, *, whole: bool = False, on_stream: OnStream = lambda key, stream: None
    ) -> Calibration:
        """Calibrate; write basis.safetensors and the ``calibration`` block of the record.

        Args:
            whole: keep all directions for diagnostics; see :func:`calibrate`.
            on_stream: receives the sums for diagnostics; see :func:`calibrate`.

        Raises:
            SparsegradError: a loss or gradient is not finite, or memory ran out.
        """
        settings, observer = self.run.recipe.calibration, self.run.observer
        passes = passes_of(settings)
        again = f", {passes} passes" if passes > 1 else ""
        self.run.begin_phase("calibrate", f"{settings.steps} steps, no update{again}")
        started = time.perf_counter()
        with self.memory_explained("calibrate"):
            self.choose_rows()
        with self.memory_explained("calibrate"), self.warmed_head():
            warmup_seconds, warmup_tokens = time.perf_counter() - started, self.tokens
            observer.total_steps("calibrate", len(self.own_steps) * passes)
            calibration = self.calibrate(
                self.own_steps,
                whole=whole,
                meter=lambda: self.setup.meter.phase("calibrate"),
                on_step=lambda n, loss: observer.step("calibrate", {"step": n, "loss": loss}),
                on_stream=on_stream,
            )
        calibration.seconds += warmup_seconds
        self.run.seconds["calibrate_s"] = calibration.seconds
        # Every process warms up the head on all steps, and calibrates on its share of the steps.
        read = torch.tensor(self.tokens - warmup_tokens, device=self.setup.device)
        distributed.all_reduce([read])
        self._keep(calibration, tokens=warmup_tokens + int(read), whole=whole)
        return calibration

    def _keep(self, calibration: Calibration, *, tokens: int, whole: bool) -> None:
        """Write the basis file and the record."""
        setup, recipe = self.setup, self.run.recipe
        settings = recipe.calibration
        peak = setup.meter.peak("calibrate")
        made_with = CalibrationSettings(
            steps=settings.steps,
            select=settings.select,
            basis_per=settings.basis_per,
            source=settings.source,
            decomposition=settings.decomposition,
            score=settings.score,
            # A language model has no new head to warm up.
            warmup_steps=settings.warmup_steps if head_parameters(setup.model) else 0,
            batch_size=self.batch_size,
            passes=passes_of(settings),
            seed=recipe.seed,
            data=setup.task.data_hash,
            seconds=calibration.seconds,
            peak_bytes=peak.peak_bytes if peak else None,
            tokens=tokens,
        )
        kept = calibration.bases
        if whole:
            kept = {
                key: leading(basis, setup.method_settings.basis_rank) for key, basis in kept.items()
            }
        metadata = BasisMetadata(
            model=recipe.model.name,
            fingerprint=setup.fingerprint,
            targets=calibration.keys,
            settings=made_with,
            recipe_digest=digest(recipe),
            digest=basis_digest(kept, calibration.scores),
        )
        if distributed.is_rank_zero():
            write_basis(self.run.path / BASIS_NAME, BasisFile(kept, metadata, calibration.scores))
        self.run.writer.save(
            calibration=CalibrationBlock(
                **made_with.given(),
                stream_bytes=calibration.stream_bytes,
                basis_file=BASIS_NAME,
                basis_bytes=sum(b.nbytes() for b in kept.values()),
                reused=False,
                digest=metadata.digest,
                spectra=spectra(_one_per_kind(calibration.bases, setup.targets)),
            )
        )

    def calibrate(
        self,
        steps: range,
        batch_size: int | None = None,
        *,
        targets: list[Target] | None = None,
        changes: Mapping[str, Any] | None = None,
        **hooks: Any,
    ) -> Calibration:
        """Calibrate on some of the recipe's steps without recording anything.

        Args:
            steps: numbers of the steps' batches.
            batch_size: examples per step, see :meth:`batches`; by default the recipe's.
            targets: the target modules; all of the model's by default.
            changes: settings that differ from the recipe's ``calibration`` section.
            hooks: further arguments of :func:`sparsegrad_cli.calibration.calibrate.calibrate`.
        """
        recipe = self.run.recipe
        # Some processes have one more step than others. All processes check for an interruption
        # together, so there is no check before that step.
        together = recipe.calibration.steps // distributed.world_size()

        def batches() -> Iterator[dict[str, Tensor]]:
            every = self.batches(batch_size)
            return self.counted(islice(every, steps.start, None, steps.step), together=together)

        return calibrate(
            self.setup.model,
            targets or self.setup.targets,
            batches,
            recipe.calibration.model_copy(update={**(changes or {}), "steps": len(steps)}),
            seed=recipe.seed,
            rank=self.setup.method_settings.basis_rank,
            train=recipe.train,
            **hooks,
        )

    @contextmanager
    def warmed_head(self, phase: str = "calibrate") -> Iterator[None]:
        """Warm up the head inside the context; keep it warm afterwards if the recipe says so.

        Args:
            phase: phase of the memory report that the warm-up counts towards.
        """
        settings, seed = self.run.recipe.calibration, self.run.recipe.seed
        observer = self.run.observer

        def batches() -> list[dict[str, Tensor]]:
            count = min(WARMUP_BATCHES, settings.steps, settings.warmup_steps)
            first = islice(self.batches(), count)
            return list(self.counted(first, together=count))

        if settings.warmup_steps and head_parameters(self.setup.model):
            observer.total_steps("warm-up", settings.warmup_steps)
        with warmed_head(
            self.setup.model,
            batches,
            steps=settings.warmup_steps,
            learning_rate=settings.warmup_learning_rate,
            seed=seed,
            keep=settings.keep_head,
            train=self.run.recipe.train,
            meter=lambda: self.setup.meter.phase(phase),
            on_step=lambda n, loss: observer.step("warm-up", {"step": n, "loss": loss}),
        ):
            yield
        if settings.keep_head and settings.warmup_steps:
            kept = parameters_digest(head_parameters(self.setup.model))
            hashes = self.run.writer.record.hashes or HashesBlock()
            self.run.writer.save(hashes=hashes.changed(head_init=kept))

    def batches(self, batch_size: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Return the batches to calibrate on: those of chosen rows, or endless random ones.

        Args:
            batch_size: examples per batch, which are random then: chosen ones fill the recipe's.
        """
        chosen = self.choose_rows() if batch_size is None else None
        if chosen is None:
            return self.random_batches(self.run.recipe.seed, batch_size)
        return training_batches(self.setup, chosen, self.batch_size)

    def choose_rows(self) -> list[int] | None:
        """Return the numbers of the training rows that ``calibration.select`` chooses.

        They are chosen once, by the first call. None for random rows: those of the first batches.
        """
        recipe, observer = self.run.recipe, self.run.observer
        if recipe.calibration.select == "random" or self._chosen is not None:
            return self._chosen
        count = recipe.calibration.steps * self.batch_size
        rows = random_rows(self.setup, recipe.seed)[: CANDIDATES * count]
        if len(rows) <= count:
            self._chosen = (rows * math.ceil(count / len(rows)))[:count]
            observer.note(f"calibration.select: all {len(rows)} training rows are read")
            return self._chosen
        total = math.ceil(len(rows) / self.batch_size)
        observer.total_steps("select", total)

        def candidates() -> Iterator[dict[str, Tensor]]:
            every = training_batches(self.setup, rows, self.batch_size)
            for number, batch in enumerate(self.counted(every, together=total), start=1):
                yield batch
                observer.step("select", {"step": number})

        with self.setup.meter.phase("calibrate"):
            features_MI = body_features(self.setup.model, candidates(), recipe.train)
        self._chosen = [rows[number] for number in representative(features_MI, count)]
        return self._chosen

    def random_batches(
        self, seed: int, batch_size: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Return endless random batches of the training data."""
        return random_batches(self.setup, batch_size or self.batch_size, seed)

    def counted(
        self, batches: Iterator[dict[str, Tensor]], *, together: int
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the batches and count their tokens; stop before a batch if that was requested.

        Args:
            together: the number of batches that every process of the run takes.
        """
        for number, batch in enumerate(batches):
            if number < together:
                interruption.raise_if_requested(f"batch {number + 1}")
            mask = batch.get("attention_mask")
            self.tokens += batch["input_ids"].numel() if mask is None else int((mask > 0).sum())
            yield batch

    def memory_explained(self, phase: str) -> AbstractContextManager[None]:
        """Explain an out-of-memory error inside by trying smaller calibration batches."""
        trial = Trial(CALIBRATION_KEY, self.batch_size, self._attempt)
        return out_of_memory_explained(
            self.run.recipe, phase, self.setup.model, {"calibrate": trial}
        )

    def _attempt(self, batch_size: int) -> Attempt:
        """Try one calibration step and the basis computed from it."""

        def work(phase: Phase) -> None:
            with phase("calibrate"):
                self.calibrate(range(1), batch_size)

        return attempt(self.setup.model, self.setup.new_meter(), work)


def basis_for_run(
    run: Run, setup: Setup, initial: Callable[[], BasisFile | None]
) -> Calibration | BasisFile:
    """Return the basis that a run trains in, and record it.

    The first of these that exists is used: the basis of ``init_from``, the basis that the recipe
    names, the run's own basis if the run is resumed. Otherwise a new basis is computed.

    Args:
        initial: reads the basis of ``init_from``, if there is one.

    Raises:
        UsageError: the basis belongs to another model, or is too small for the method.
        SparsegradError: it is damaged, or calibration failed.
    """
    calibration = RunCalibration(run, setup)
    given = run.recipe.calibration.basis
    own = run.path / BASIS_NAME
    path = expanded(given) if given else own
    brought = initial()
    if brought is not None:
        basis, where = brought, run.loaded.where("init_from")
        if distributed.is_rank_zero():  # A copy, so that the run does not need the other run later.
            write_basis(own, brought)
    elif given:
        basis, where = read_basis(path), run.loaded.where("calibration.basis")
    else:
        kept, where = _own_basis(run, own, setup.task.data_hash), str(own)
        if kept is None:
            return calibration.make_basis()
        basis = kept
    check_belongs(basis, setup.targets, setup.fingerprint, where)
    check_rank(basis, setup.method_settings.basis_rank, where)
    # A resumed run has chosen its support before, and may use a file of an older version.
    if given and setup.method_settings.compares_targets:
        check_tokens(basis, where)
    # This run's time includes the cost of a basis that was computed earlier.
    run.seconds["calibrate_s"] = basis.metadata.settings.seconds or 0.0
    run.writer.save(
        calibration=CalibrationBlock(
            **basis.metadata.settings.given(),
            basis_file=str(path),
            basis_bytes=sum(b.nbytes() for b in basis.bases.values()),
            reused=True,
            digest=basis.metadata.digest,
            spectra=spectra(_one_per_kind(basis.bases, setup.targets)),
        )
    )
    if run.recipe.calibration.keep_head:
        with calibration.memory_explained("calibrate"), calibration.warmed_head():
            pass
    return basis


def _own_basis(run: Run, path: Path, data_hash: str) -> BasisFile | None:
    """Return the basis that a resumed run has computed from the same data; None without one."""
    if not run.resume or not path.is_file():
        return None
    try:
        basis = read_basis(path)
    except FileFormatError as error:
        run.observer.note(f"{error.what}: {path.name} is made again")
        return None
    if basis.metadata.settings.data in (None, data_hash):  # Older files do not name their data.
        return basis
    run.observer.note(f"the data has changed: {path.name} is made again")
    return None


def _one_per_kind(bases: Mapping[str, Basis], targets: list[Target]) -> dict[str, Basis]:
    """Return the bases to plot: all if they are shared by kind, otherwise the middle block's."""
    if len(bases) <= 4:
        return dict(bases)
    middle = targets[len(targets) // 2].block
    names = {t.name for t in targets if t.block == middle}
    return {key: basis for key, basis in bases.items() if key in names}
