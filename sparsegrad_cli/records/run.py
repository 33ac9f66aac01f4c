"""run.json: the record of a training or calibration run.

A run writes its record at every milestone, so a running or failed run has only some of the blocks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sparsegrad_cli.records.base import (
    Block,
    Bytes,
    Count,
    Fraction,
    Matrix,
    Number,
    Record,
    Seconds,
    StepKey,
    Unit,
)

Status = Literal["running", "done", "failed", "out_of_memory", "interrupted", "pruned"]
Side = Literal["out", "in"]
Start = Literal["kept", "aligned", "fresh"]
TaskKind = Literal["classification", "regression", "chat"]


class LiveTensor(Block):
    """A tensor that was in memory when an allocation failed."""

    bytes: Bytes
    category: str = Field(description="What it is: weights, gradients, saved_activations, ...")
    shape: list[Count]
    dtype: str
    of: str = Field("", description="The module or parameter that it belongs to.")


class ErrorBlock(Block):
    """Why a run ended early. The keys after `fix` are there for some kinds of error only."""

    title: str
    what: str = Field(description="What was expected and what came.")
    where: str | None = Field(None, description="File, line or recipe key.")
    fix: str | None = Field(None, description="What to do about it.")
    phase: str | None = Field(None, description="Out of memory: the phase of the run.")
    module: str | None = Field(None, description="The module that was at work.")
    asked_bytes: Bytes | None = Field(None, description="Out of memory: the failed allocation.")
    tensors: list[LiveTensor] | None = Field(
        None, description="Out of memory: the largest tensors, the largest first."
    )
    fits: dict[str, Count] | None = Field(
        None,
        description="Out of memory: the settings of a batch that was tried and fits, and its "
        "`peak_bytes`; null if no batch fits.",
    )
    step: Count | None = Field(None, description="Not finite: the optimizer step.")
    batch: Count | None = Field(None, description="Not finite: the micro-batch, from 1.")
    rows: list[Count] | None = Field(None, description="Not finite: rows of the training data.")
    parameter: str | None = Field(None, description="Not finite: the first such parameter.")
    checkpoint: str | None = Field(None, description="Not finite: the last good checkpoint.")


class Extension(Block):
    """One time that a run was resumed to train longer."""

    recipe_digest: str | None = Field(None, description="Of the recipe before.")
    num_train_epochs: Number = Field(None, description="Before.")
    max_steps: int | None = Field(None, description="Before; -1 where epochs set the length.")
    steps: Count | None = Field(None, description="All steps of the run since.")
    schedule: str | None = Field(None, description="What became of the learning rate.")


class InitFromBlock(Block):
    """The adapter that training started from."""

    path: str
    kind: Literal["run", "peft"]
    digest: str = Field(description="sha256 (hex) of the file of tensors.")
    head: Literal["loaded", "fresh"] | None = Field(
        None, description="`fresh` where the classes differ; null without a head."
    )


class HeadStart(Block):
    """Where the initial values of a classification head come from."""

    start: Start = Field(
        description="Of the output layer: kept, kept with its classes in the order of the data, "
        "or drawn from the seed."
    )
    kept: list[str] = Field(description="Parameters of the head that the model's files hold.")
    fresh: list[str] = Field(description="Parameters that were drawn at random from the seed.")


class NotAdapted(Block):
    """Large parameters of the blocks, attention left out, that no target module covers."""

    kind: str
    shape: list[Count]
    count: Count


class ModelBlock(Block):
    """The base model, as it was loaded."""

    name: str = Field(description="As in the recipe.")
    architecture: str | None = Field(None, description="The class in transformers.")
    model_type: str | None = None
    parameters: Count | None = None
    dtype: str | None = None
    quantization: str | None = Field(None, description="`8bit`, `4bit` or null.")
    fingerprint: str | None = Field(None, description="sha256 (hex) of the target modules.")
    head: HeadStart | None = Field(None, description="Null for a language model.")
    not_adapted: list[NotAdapted] = []


class TaskBlock(Block):
    """The task and its data."""

    name: str | None = Field(None, description="As in the recipe.")
    kind: TaskKind | None = None
    metric: str | None = Field(None, description="The metric that `score` is a value of.")
    regression: bool = False
    label_names: list[str] | None = None
    positive_label: str | None = Field(
        None,
        description="The class of two that f1, precision and recall are of; null where none of "
        "them is measured.",
    )
    train_examples: Count | None = None
    validation_examples: dict[str, Count] = Field({}, description="By validation set.")
    majority_score: Number = Field(
        None, description="The score of always answering the most frequent class."
    )
    majority_accuracy: Fraction = None
    max_length: Count | None = Field(None, description="Tokens of an example.")
    padding: str | None = None
    notes: list[str] = Field([], description="What was left out, cut or split off.")
    counts: dict[str, Count] = Field(
        {}, description="Conversations that were read, kept and dropped, each with the reason."
    )


class MethodBlock(Block):
    """The method, as the recipe resolved it."""

    name: str
    form: str | None = None
    support: str | None = None
    density: Number = None
    scope: str | None = Field(None, description="What trains beside the targets: head or rest.")
    settings: dict[str, Any] = Field({}, description="All other keys of the method's section.")


class TargetCounts(Block):
    """One target module."""

    name: str
    kind: str = Field(description="Its name within a block, such as `intermediate.dense`.")
    block: int | None = Field(None, description="Number of the transformer block, from 0.")
    out_features: Count
    in_features: Count
    entries: Count = Field(description="Parameters of it that one step changes.")
    touched: Count | None = Field(None, description="Parameters that any step changed.")


class CountsBlock(Block):
    """How many parameters train."""

    model_parameters: Count | None = None
    target_parameters: Count | None = None
    trainable: Count | None = Field(None, description="Parameters that one step changes.")
    trainable_targets: Count | None = Field(None, description="Those in target modules.")
    trainable_head: Count | None = None
    trainable_rest: Count | None = None
    touched: Count | None = Field(
        None,
        description="Parameters that any step of the run changed. A method that chooses again in "
        "every step touches more than it trains at once. Head and rest count whole.",
    )
    touched_targets: Count | None = None
    requested_target_entries: Count | None = Field(
        None, description="Parameters that the recipe asked for in the targets."
    )
    remainder: int | None = Field(None, description="`trainable_targets` less those asked for.")
    density: Number = Field(None, description="`trainable_targets` / `target_parameters`.")
    note: str = ""
    targets: list[TargetCounts] = []


class SparsityBlock(Block):
    """Where the parameters that changed lie in the middle target; null for a dense method."""

    target: str
    rows: Count = Field(description="Of the matrix that is sparse: the core, or the weight.")
    columns: Count
    map: Matrix = Field(description="Share that changed of each of at most 24 x 24 blocks, 0 to 1.")


class Evaluation(Block):
    """One evaluation."""

    step: Count = Field(description="Optimizer steps before it.")
    epoch: Number = None
    metric: str | None = None
    score: Number = Field(
        None, description="The value of `metric`. Of loss and perplexity the lowest is the best."
    )
    loss: Number = Field(None, description="Nats per labelled token or example.")
    values: dict[str, dict[str, Number]] = Field(
        {}, description="All metrics by validation set: fractions, and correlations from -1 to 1."
    )


class TrainingLoss(Block):
    """The training loss at one step that was logged."""

    step: Count
    epoch: Number = None
    loss: Number = Field(None, description="Mean since the step logged before, in nats.")
    learning_rate: Number = None


class MetricsBlock(Block):
    """Scores and losses."""

    initial: Evaluation | None = Field(None, description="Before the first step.")
    best: Evaluation | None = Field(None, description="Of the model that was kept.")
    final: Evaluation | None = Field(None, description="After the last step.")
    history: list[Evaluation] = []
    train: list[TrainingLoss] = []
    notes: list[str] = []


class MemoryCategories(Block):
    """Bytes by what they hold, at one moment."""

    weights: Bytes = 0
    bases: Bytes = 0
    gradients: Bytes = 0
    optimizer_state: Bytes = 0
    saved_activations: Bytes = 0
    other: Bytes = 0
    adapter: Annotated[int, Unit("bytes")] | None = Field(
        None, description="Only in an estimate: what the method adds to the model's weights."
    )


class MemoryPhase(Block):
    """The peak of one phase of a run."""

    peak_bytes: Bytes
    categories: MemoryCategories = Field(default_factory=lambda: MemoryCategories())
    rss_bytes: Bytes | None = Field(None, description="Resident memory of the process.")
    reserved_bytes: Bytes | None = Field(None, description="Held by CUDA's allocator.")


class MemoryBlock(Block):
    """Peak memory of the first process. A step in micro-batches is measured at a later one."""

    device: str | None = None
    how: str | None = Field(None, description="How memory was counted.")
    batch_shape: list[Count] | None = Field(None, description="Examples x tokens of the step.")
    peak_bytes: Bytes | None = None
    peak_phase: str | None = None
    phases: dict[str, MemoryPhase] = Field(
        {}, description="load, calibrate, energy, forward, backward, optimizer, evaluate."
    )


class TimeBlock(Block):
    """Wall time. Of a resumed run all but load_s, evaluate_s and total_s cover the whole run."""

    load_s: Seconds = None
    calibrate_s: Seconds = None
    diagnostics_s: Seconds = None
    train_s: Seconds = None
    evaluate_s: Seconds = None
    total_s: Seconds = None
    steps: Count | None = None
    steps_per_s: Number = None
    step_median_s: Seconds = None
    step_iqr_s: Seconds = Field(None, description="Distance of the quartiles.")
    examples_per_s: Number = None


class EnergyShares(Block):
    """Shares of squared entries of held-out gradients in the largest 1 %; absent: not computed."""

    original: Fraction = Field(None, description="Without a basis.")
    transposed: Fraction = Field(None, description="With Q_in transposed, as published code does.")
    kind_basis: Fraction = Field(None, description="In a basis that a layer kind shares.")
    layer_basis: Fraction = Field(None, description="In a basis of the layer's own.")
    whole_core: Fraction = Field(None, description="In all entries of a truncated core.")


class EnergyRow(EnergyShares):
    """The energy shares of one target module."""

    target: str
    kind: str


class SupportShares(Block):
    """Shares of the energy of held-out gradients that as many parameters hold."""

    count: Number = Field(None, description="Parameters that train.")
    support: Fraction = Field(None, description="In the parameters that train.")
    full_basis: Fraction = Field(None, description="In the best in hindsight, full-rank basis.")
    original: Fraction = Field(None, description="In the best in hindsight, without a basis.")


class SupportRow(SupportShares):
    """The support of one target module against the best in hindsight."""

    target: str
    kind: str


class ComparedBlock(Block):
    """What the support that trains holds, beside the best in hindsight."""

    rows: list[SupportRow] = []
    mean_by_kind: dict[str, SupportShares] = {}
    verdict: str = Field("", description="The sentence of the reports.")


class EnergyBlock(Block):
    """How well the basis concentrates gradients that calibration never saw."""

    top: Number = Field(None, description="Share of the entries that is counted, 0.01.")
    steps: Count | None = None
    rows: list[EnergyRow] = []
    mean_by_kind: dict[str, EnergyShares] = {}
    compared: ComparedBlock | None = None


class Spectrum(Block):
    """Singular values of one side of a basis."""

    key: str = Field(description="Of the basis: a target's name, or a layer kind.")
    side: Side
    values: list[Number] = Field(
        description="Divided by the first, strongest first, at most 256 of them."
    )


class HeatMap(Block):
    """Mean absolute gradients of one target, pooled to at most 96 x 96 cells."""

    target: str
    original: Matrix
    basis: Matrix = Field(description="The same gradients seen in the basis.")


class CalibrationSettings(Block):
    """How a basis was made. Stands in basis.safetensors too, in the metadata key `settings`."""

    steps: Count | None = None
    basis_per: str | None = Field(None, description="`layer` or `kind`.")
    source: str | None = None
    decomposition: str | None = None
    score: str | None = Field(None, description="How the support is chosen.")
    warmup_steps: Count | None = Field(None, description="Steps of the head before calibration.")
    batch_size: Count | None = None
    passes: Count | None = Field(None, description="Passes over the calibration batches.")
    seed: int | None = None
    data: str | None = Field(None, description="sha256 (hex) of the data.")
    seconds: Seconds = None
    peak_bytes: Bytes | None = None
    tokens: Count | None = Field(
        None, description="Read by all passes and the head's warm-up, without padding."
    )


class CalibrationBlock(CalibrationSettings):
    """The basis of a run."""

    stream_bytes: Bytes | None = Field(None, description="Of all running sums.")
    basis_file: str | None = None
    basis_bytes: Bytes | None = None
    reused: bool = Field(False, description="Whether the basis was read from a file.")
    digest: str | None = Field(None, description="sha256 (hex) of the basis' tensors.")
    energy: EnergyBlock | None = None
    spectra: list[Spectrum] = []
    heat_map: HeatMap | None = None


class PrecisionBlock(Block):
    """The number formats that a run computes in."""

    weights: dict[str, Count] = Field({}, description="Parameters by dtype, as loaded.")
    autocast: str | None = Field(None, description="The dtype of autocast.")
    matmul: str | None = Field(None, description="torch's setting for float32 products.")
    device: str | None = None


class HashesBlock(Block):
    """Digests (sha256, hex) by which runs of one comparison are held against each other."""

    data: str | None = None
    head_init: str | None = None
    precision: str | None = None
    order: dict[StepKey, str] = Field({}, description="By step: of all batches up to it.")
    rows: dict[StepKey, str] = Field(
        {}, description="The same over rows without padding, however they are cut into batches."
    )


class SizesBlock(Block):
    """What a run takes on disk, between processes and in the optimizer."""

    adapter_bytes: Bytes | None = None
    gradient_bytes_per_step: Bytes | None = Field(
        None, description="What each of several processes sends in a step; null for one process."
    )
    optimizer_state_bytes: Bytes | None = Field(None, description="At the end of training.")


class EnvironmentBlock(Block):
    """The machine and the software."""

    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    device: str | None = None
    device_name: str | None = None
    threads: Count | None = None
    packages: dict[str, str | None] = Field({}, description="Versions; null: not installed.")


class GitBlock(Block):
    """The checkout that the command ran in."""

    commit: str | None = None
    dirty: bool | None = Field(None, description="Whether tracked files differ from the commit.")


class RunRecord(Record):
    """What `train` and `calibrate` leave. A block is absent until the run has reached it."""

    status: Status = Field(
        description="`pruned` is a run of tuning that its comparison stopped. The file of a run "
        "whose process was killed still says `running`."
    )
    error: ErrorBlock | None = None
    started: str | None = Field(None, description="ISO 8601, UTC; when it was resumed last.")
    finished: str | None = None
    command: Literal["train", "calibrate"] | None = None
    name: str | None = Field(None, description="Of the run's folder.")
    recipe_digest: str | None = Field(
        None, description="sha256 (hex) of the resolved recipe without output_dir."
    )
    seed: int | None = None
    output_dir: str | None = None
    processes: Count | None = Field(None, description="Processes that trained together.")
    split_by: str | None = Field(
        None,
        description="What splits weights over processes: `FSDP2` or `DeepSpeed`; null where each "
        "process holds all of them.",
    )
    resumed_from: Count | None = Field(
        None,
        description="Step of the checkpoint that the run was resumed from last; 0: from the "
        "start; null: never resumed.",
    )
    extended: list[Extension] = []
    init_from: InitFromBlock | None = None
    model: ModelBlock | None = None
    task: TaskBlock | None = None
    method: MethodBlock | None = None
    counts: CountsBlock | None = None
    sparsity: SparsityBlock | None = None
    metrics: MetricsBlock | None = None
    memory: MemoryBlock | None = None
    time: TimeBlock | None = None
    calibration: CalibrationBlock | None = None
    precision: PrecisionBlock | None = None
    hashes: HashesBlock | None = None
    sizes: SizesBlock | None = None
    environment: EnvironmentBlock | None = None
    git: GitBlock | None = None
