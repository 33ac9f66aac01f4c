"""``sparsegrad train``: from recipe to a model made ready; the rest is training/loop.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sparsegrad_cli import distributed
from sparsegrad_cli.calibration.basis_file import (
    BasisFile,
    check_belongs,
    check_rank,
    check_tokens,
    read_basis,
    write_basis,
)
from sparsegrad_cli.calibration.calibrate import Calibration
from sparsegrad_cli.calibration.diagnostics import spectra
from sparsegrad_cli.errors import FileFormatError
from sparsegrad_cli.interruption import deferred_interrupt, raise_if_requested
from sparsegrad_cli.io.paths import expanded
from sparsegrad_cli.methods.base import Method, Prepared, check_what_trains
from sparsegrad_cli.methods.registry import make_method
from sparsegrad_cli.models.targets import not_adapted_note
from sparsegrad_cli.numerics.seeding import temporary_seed
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.load_recipe import LoadedRecipe
from sparsegrad_cli.recipe.method_section import SparsegradMethod
from sparsegrad_cli.recipe.trackers import files_in
from sparsegrad_cli.records.writer import RunWriter
from sparsegrad_cli.tasks.setup import Setup, check_autocast
from sparsegrad_cli.training.loop import TrainingLoop
from sparsegrad_cli.training.session import BASIS_NAME, Session, one_per_kind


class InitialValues(Protocol):
    """What training starts from, where the recipe names an adapter."""

    def basis(self) -> BasisFile | None:
        """Return the basis that it is written in, if any."""
        ...

    def load(self, setup: Setup, method: Method) -> dict[str, Any]:
        """Copy its values into a prepared model; return what the record says of it."""
        ...


class TrainingSession(Session):
    """``sparsegrad train``: from recipe to record, adapter and checkpoints."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        record: RunWriter,
        observer: Observer,
        *,
        resume: bool,
        initial: InitialValues | None = None,
    ) -> None:
        super().__init__(loaded, record, observer)
        self.initial = initial
        self.resume = resume

    def run(self) -> None:
        """Do it all."""
        with self.explained(), files_in(self.record.path, self.recipe.train.report_to):
            setup = self.load()
            with deferred_interrupt():
                method = make_method(self.method)
                prepared = self._prepared(setup, method)
                note = not_adapted_note(setup.not_adapted, self.recipe.scope)
                self._record_method(prepared, note)
                TrainingLoop(self, setup, method, prepared, resume=self.resume).run()

    def load(self) -> Setup:
        """As for any session, on a machine that can train so."""
        check_autocast(self.loaded)
        return super().load()

    def _prepared(self, setup: Setup, method: Method) -> Prepared:
        """The model made ready. Bases live on only in what the method keeps of them."""
        found = self._calibrated(setup) if method.needs_basis else None
        raise_if_requested("preparing the model")
        self.known.at = "prepare"
        with temporary_seed(self.recipe.seed):  # peft draws A; the others draw nothing
            prepared = method.prepare(
                setup.model,
                setup.targets,
                scope=self.recipe.scope,
                bases=found.by_target() if found else None,
                scores=found.scores if found else None,
            )
        check_what_trains(setup.model, prepared.counts)
        if self.initial is not None:
            start = self.initial.load(setup, method)
            self.record.save(init_from=start)
            head = f"; its head is {start['head']}" if start["head"] else ""
            self.observer.note(f"training starts from {start['path']}{head}")
        return prepared

    def _calibrated(self, setup: Setup) -> Calibration | BasisFile:
        """The recipe's basis, this run's own when resuming, or a fresh one."""
        given = self.recipe.calibration.basis
        own = self.record.path / BASIS_NAME
        path = expanded(given) if given else own
        brought = self.initial.basis() if self.initial is not None else None
        if brought is not None:
            basis, where = brought, self.loaded.where("init_from")
            if distributed.is_rank_zero():  # the run needs nothing of the other one later
                write_basis(own, brought)
        elif given:
            basis, where = read_basis(path), self.loaded.where("calibration.basis")
        else:
            kept, where = self._own_basis(own, setup.task.data_hash), str(own)
            if kept is None:
                return self.calibrated(setup)
            basis = kept
        check_belongs(basis, setup.targets, setup.fingerprint, where)
        method = self.method
        if not isinstance(method, SparsegradMethod) or method.form != "core":
            check_rank(basis, None, where)
        elif isinstance(method.rank, int | float):
            check_rank(basis, method.rank, where)
        # A run that is resumed chooses as it did, also from a file of an older version.
        if given and isinstance(method, SparsegradMethod) and method.allocation == "model":
            check_tokens(basis, where)
        # What the basis cost when it was made is charged to this run too.
        self.seconds["calibrate_s"] = float(basis.settings.get("seconds") or 0.0)
        self.record.save(
            calibration={
                **basis.settings,
                "basis_file": str(path),
                "basis_bytes": sum(b.nbytes() for b in basis.bases.values()),
                "reused": True,
                "digest": basis.digest,
                "spectra": spectra(one_per_kind(dict(basis.bases), setup)),
            }
        )
        if self.recipe.calibration.keep_head:
            with self.warmed_head(setup):
                pass
        return basis

    def _own_basis(self, path: Path, data: str) -> BasisFile | None:
        """What the run that is resumed has made of this data, if that is whole."""
        if not self.resume or not path.is_file():
            return None
        try:
            basis = read_basis(path)
        except FileFormatError as error:
            self.observer.note(f"{error.what}: {path.name} is made again")
            return None
        if basis.settings.get("data", data) == data:  # older files do not say
            return basis
        self.observer.note(f"the data is other than it was: {path.name} is made again")
        return None

    def _record_method(self, prepared: Prepared, note: str) -> None:
        settings = self.recipe.method.model_dump()
        counts = prepared.counts.to_json()
        counts["note"] = "; ".join(part for part in (counts["note"], note) if part)
        self.record.save(
            method={
                "name": settings.pop("name"),
                "form": settings.get("form"),
                "support": settings.get("support"),
                "density": settings.get("density"),
                "scope": self.recipe.scope,
                "settings": settings,
            },
            counts=counts,
        )
