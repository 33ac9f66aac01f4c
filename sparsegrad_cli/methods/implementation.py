"""The implementation of a method, the half of the contract that needs torch (:mod:`.base`).

A run calls ``prepare`` (freeze, change the model, mark what trains), ``optimizer``, and after
training ``adapter_tensors``. ``load_adapter`` loads them into a freshly prepared model;
``merged_OI`` and ``factors`` give the weights of a plain layer, or of a LoRA adapter, that computes
the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_cli.errors import SparsegradError, UsageError
from sparsegrad_cli.methods.base import MethodSettings
from sparsegrad_cli.methods.optimizer import make_optimizer
from sparsegrad_cli.models.precision import HALF, accept_half_inputs, unfreeze_parameter
from sparsegrad_cli.models.quantized import count_entries
from sparsegrad_cli.models.sharded_tensors import gather, reshard, shard_like
from sparsegrad_cli.models.targets import Target, freeze, head_parameters, pooler_parameters
from sparsegrad_cli.numerics.hosvd import Basis
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.records.run import CountsBlock, TargetCounts


@dataclass(frozen=True)
class TargetCount:
    """Parameters of one target that change in one optimizer step."""

    target: Target
    entries: int


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters that train.

    Attributes:
        requested: what density asked for over all targets.
        note: what the numbers leave out, for the report.
    """

    targets: tuple[TargetCount, ...]
    trainable_head: int
    trainable_rest: int
    model_parameters: int
    requested: int | None = None
    note: str = ""

    @property
    def trainable_targets(self) -> int:
        """Parameters of the targets that change in an optimizer step."""
        return sum(count.entries for count in self.targets)

    def record(self) -> CountsBlock:
        """Return the numbers as run.json keeps them."""
        target_parameters = sum(count.target.size for count in self.targets)
        entries = self.trainable_targets
        return CountsBlock(
            model_parameters=self.model_parameters,
            target_parameters=target_parameters,
            trainable=entries + self.trainable_head + self.trainable_rest,
            trainable_targets=entries,
            trainable_head=self.trainable_head,
            trainable_rest=self.trainable_rest,
            requested_target_entries=self.requested,
            remainder=None if self.requested is None else entries - self.requested,
            density=entries / target_parameters,
            note=self.note,
            targets=[
                TargetCounts(
                    name=c.target.name,
                    kind=c.target.kind,
                    block=c.target.block,
                    out_features=c.target.out_features,
                    in_features=c.target.in_features,
                    entries=c.entries,
                )
                for c in self.targets
            ],
        )


def check_what_trains(model: nn.Module, counts: Counts) -> None:
    """Check that the parameters that require a gradient are those that were counted.

    Every target must hold its count or more, and outside the targets there must be
    exactly those of head and rest. Biases belong to the rest.

    Raises:
        SparsegradError: names a parameter or target that differs.
    """
    targets = {count.target.name: count for count in counts.targets}
    inside: Counter[str] = Counter()
    elsewhere: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        target = next((path for path in above if path in targets), None)
        if target is None or name in (f"{target}.bias", f"{target}.base_layer.bias"):
            elsewhere[name] = parameter.numel()
        else:
            inside[target] += parameter.numel()
    wrong = [name for name, count in targets.items() if inside[name] < count.entries]
    total, expected = sum(elsewhere.values()), counts.trainable_head + counts.trainable_rest
    if not wrong and total == expected:
        return
    if wrong:
        entries = targets[wrong[0]].entries
        what = f"{entries:,} parameters of {wrong[0]} to train, but {inside[wrong[0]]:,} do"
    else:
        what = f"{expected:,} parameters to train outside the targets, but {total:,} do"
        what += f" (among them {max(elsewhere, key=elsewhere.__getitem__)})" if elsewhere else ""
    raise SparsegradError(
        f"expected {what}",
        where="method",
        fix="choose other layers with targets.modules, or another method",
    )


@dataclass(frozen=True)
class TrainingData:
    """What a method may use of the run that it prepares a model for.

    Attributes:
        steps: optimizer steps of the whole run.
        batches: returns a new iterator over the calibration batches, on the model's device.
        loss: returns the loss of a batch on the model that is being prepared, without autocast.
    """

    steps: int
    batches: Callable[[], Iterator[Mapping[str, Tensor]]]
    loss: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Adapted:
    """What a method put into the targets.

    Attributes:
        entries: target name -> number of its parameters that change in one optimizer step.
        requested: what density asked for over all targets; None if the method has no density.
        note: what the numbers leave out, for the report.
        bases: target name -> basis that the target holds.
        frozen: other frozen tensors that the targets hold beside their weights.
    """

    entries: Mapping[str, int]
    requested: int | None = None
    note: str = ""
    bases: Mapping[str, Basis] = field(default_factory=dict)
    frozen: list[Tensor] = field(default_factory=list)


@dataclass
class Prepared:
    """A prepared model.

    Attributes:
        counts: numbers of parameters that train.
        bases: tensors that the memory report counts as bases.
    """

    counts: Counts
    bases: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Factors:
    """The change of a target as LoRA factors: W + s B A.

    Attributes:
        b: B, (out, r).
        a: A, (r, in).
        alpha: s is alpha / r.
        rslora: s is alpha / sqrt(r) instead (Kalajdzievski 2023).
    """

    b: Tensor
    a: Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def product_OI(self) -> Tensor:
        """Return s B A in float64, (out, in)."""
        return self.scale * (self.b.double() @ self.a.double())

    def folded(self) -> Factors:
        """Return the same in float32 with s multiplied into B: alpha is r."""
        return Factors((self.scale * self.b.double()).float(), self.a.float(), self.rank)

    def padded(self, rank: int) -> Factors:
        """Return folded factors padded with zeros to a higher rank."""
        more = rank - self.rank
        b_OR = nn.functional.pad(self.b, (0, more))
        return Factors(b_OR, nn.functional.pad(self.a, (0, 0, 0, more)), rank)


@dataclass(frozen=True)
class Plan:
    """What will train of a target's core.

    Attributes:
        count: number of parameters per step.
        positions: flat positions in the core, ascending; None where training chooses them.
    """

    count: int
    positions: Tensor | None


class Method:
    """The implementation of a method; one object serves one model.

    The defaults are those of a method whose trained parameters are plain parameters of the model:
    ``train.optim`` trains them, and the adapter holds them by name. Only :meth:`adapt` must be
    implemented.
    """

    peft_config: Any = None
    """PEFT's configuration of the prepared adapter; None if PEFT does not know the method."""

    training: TrainingData | None = None
    """The run that follows, set by :meth:`prepare`; None to load or estimate an adapter."""

    autocast: torch.dtype | None = None
    """The dtype of autocast in the steps that follow, set by :meth:`prepare`."""

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    def prepare(
        self,
        model: nn.Module,
        targets: list[Target],
        *,
        scope: str,
        bases: Mapping[str, Basis] | None = None,
        scores: Mapping[str, Tensor] | None = None,
        training: TrainingData | None = None,
        autocast: torch.dtype | None = None,
    ) -> Prepared:
        """Freeze the model, change its targets, and mark what trains.

        Random numbers may be drawn: the caller forks the random state.

        Args:
            scope: ``pooler`` also trains the body's pooler, and ``rest`` all parameters outside the
                targets' weights.
            bases: target name -> basis, for methods that calibrate.
            scores: target name -> (r_out, r_in) scores of core entries, if calibration made them.
            training: the run that follows. Without it, a method that initializes from data makes
                tensors of the same shapes, and :meth:`load_adapter` fills them.
            autocast: the dtype of autocast in the steps that follow. A method may hold in it what
                only enters products: casting it once changes no bit of them.

        Raises:
            ValueError: the method calibrates, and there are no bases.
        """
        self.training, self.autocast = training, autocast
        if self.settings.calibrates and bases is None:
            raise ValueError(f"method {self.settings.name} needs bases")
        total = count_entries(model)
        opened = open_scope(model, targets, scope)
        adapted = self.adapt(model, targets, bases or {}, scores or {})
        for parameter in (p for part in opened for p in part.values()):
            parameter.requires_grad_(True)  # peft freezes all but its own parameters.
        head, rest = (sum(p.numel() for p in part.values()) for part in opened)
        counted = tuple(TargetCount(target, adapted.entries[target.name]) for target in targets)
        note = "; ".join(part for part in (adapted.note, self.settings.starts_changed) if part)
        counts = Counts(counted, head, rest, total, adapted.requested, note)
        sides = {id(q): q for basis in adapted.bases.values() for q in (basis.q_out, basis.q_in)}
        return Prepared(counts, [*sides.values(), *adapted.frozen])

    def adapt(
        self,
        model: nn.Module,
        targets: list[Target],
        bases: Mapping[str, Basis],
        scores: Mapping[str, Tensor],
    ) -> Adapted:
        """Change the targets of a frozen model, and mark what trains in them.

        The function that the model computes must not change, unless the settings say so
        (``starts_changed``). Arguments are those of :meth:`prepare`.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, train: TrainSection) -> torch.optim.Optimizer:
        """Return the optimizer of a prepared model; by default the one of ``train.optim``."""
        return make_optimizer(model, train)

    def adapter_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what training changed, in as few bytes as the method allows, by name.

        Every process must call it: see :func:`trainable_state`.
        """
        return trainable_state(model)

    def load_adapter(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load :meth:`adapter_tensors` into a prepared model of the same base weights.

        Raises:
            KeyError: names do not belong to this model and method.
            ValueError: positions do not fit their target.
        """
        load_by_name(model, tensors)

    def current_name(self, name: str) -> str:
        """Return this version's name of a parameter in a checkpoint of any version."""
        return name

    def merged_OI(self, model: nn.Module, target: Target) -> Tensor:
        """Return the weight of a plain layer that computes the same: (out, in), float64."""
        return target.weight_OI(model).detach().double()

    def merged_bias(self, model: nn.Module, target: Target) -> Tensor | None:
        """Return the bias of that plain layer where a method changes it beside training it."""
        return None

    def factors(self, model: nn.Module, target: Target) -> Factors | None:
        """Return the exact low-rank change of a target; None where W itself has changed."""
        return None

    def support(self, target: Target) -> tuple[Tensor, tuple[int, int]] | None:
        """Return flat positions that train and the shape that they index, for a fixed support.

        None where all of a matrix trains, or the optimizer chooses.
        """
        return None

    def planned(
        self, targets: list[Target], bases: Mapping[str, Basis], scores: Mapping[str, Tensor]
    ) -> dict[str, Plan]:
        """Return target name -> what would train of its core, before a model is prepared.

        Args:
            bases: target name -> basis, cut to the directions that the method keeps.
            scores: target name -> scores, where calibration made them.
        """
        return {}


def open_scope(
    model: nn.Module, targets: Iterable[Target], scope: str
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Freeze the model, then open the head and what else the scope names.

    Scope ``pooler`` opens the body's pooler too, and ``rest`` all but the targets' weights.

    Returns:
        (head, rest) parameters by name. Biases of targets and the pooler belong to the rest.

    Raises:
        UsageError: the scope is ``pooler``, and the body has none.
    """
    freeze(model)
    head = head_parameters(model)
    rest: dict[str, nn.Parameter] = {}
    if scope == "pooler":
        rest = pooler_parameters(model)
        if not rest:
            raise UsageError(
                f"scope pooler trains the encoder's pooler, and {type(model).__name__} has none",
                where="scope",
                fix="use scope: head",
            )
    elif scope == "rest":
        adapted = {id(model.get_submodule(target.name).weight) for target in targets}
        rest = {
            name: parameter
            for name, parameter in model.named_parameters()
            if id(parameter) not in adapted and name not in head
        }
    half = any(parameter.dtype in HALF for parameter in model.parameters())
    for parameter in (*head.values(), *rest.values()):
        unfreeze_parameter(parameter)
    if half:
        accept_half_inputs(model, head.values())
    return head, rest


def weight_of(model: nn.Module, target: Target) -> nn.Parameter:
    """Return the weight of a target that is not quantized, as its module holds it."""
    weight = model.get_submodule(target.name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that its modules name in ``kept_buffers``, by name.

    They do not train, and follow neither from the base model nor from the recipe's seed alone.
    """
    return {
        f"{name}.{own}": module.get_buffer(own)
        for name, module in model.named_modules()
        for own in getattr(module, "kept_buffers", ())
    }


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the model, by name.

    These are all parameters that train, and the buffers of :func:`kept_buffers`.

    Where weights are split over processes, every process must call this; rank zero gets the values.
    """
    reshard(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return gather(trained | kept_buffers(model))


def trainable_names(model: nn.Module) -> set[str]:
    """Return the names of :func:`trainable_state`."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | kept_buffers(model).keys()


def load_by_name(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the parameters and kept buffers of those names, or their shards.

    Raises:
        KeyError: a name the model does not have, or another shape.
    """
    reshard(model)
    parameters = dict(model.named_parameters()) | kept_buffers(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise KeyError(name)
            parameters[name].copy_(shard_like(tensor, parameters[name]))
