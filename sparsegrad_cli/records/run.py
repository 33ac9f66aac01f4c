"""run.json: the record of a training or calibration run.

A run writes its record at every milestone, so a running or failed run has only some of the blocks.
"""

from __future__ import annotations

import json
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
LossName = Literal["full", "sce", "rece"]
TaskKind = Literal["classification", "regression", "multilabel", "chat"]


class LiveTensor(Block):
    """A tensor that was in memory when an allocation failed."""

    bytes: Bytes
    category: str = Field(description="What it is: weights, gradients, saved_activations, ...")
    shape: list[Count]
    dtype: str
    of: str = Field("", description="The module or parameter that it belongs to.")


class ErrorBlock(Block):
    """Why a run ended early. Keys after `fix` exist for some kinds of error only."""

    title: str
    what: str = Field(description="What was expected and what was found.")
    where: str | None = Field(None, description="File, line or recipe key.")
    fix: str | None = Field(None, description="What to do about it.")
    phase: str | None = Field(None, description="Out of memory: the phase of the run.")
    module: str | None = Field(None, description="The module that was running.")
    asked_bytes: Bytes | None = Field(None, description="Out of memory: the failed allocation.")
    tensors: list[LiveTensor] | None = Field(
        None, description="Out of memory: the largest tensors, the largest first."
    )
    fits: dict[str, Count] | None = Field(
        None,
        description="Out of memory: the settings of a batch that was tried and fits, and its "
        "`peak_bytes`; null if no batch fits.",
    )
    step: Count | None = Field(None, description="NaN or Inf: the optimizer step.")
    batch: Count | None = Field(None, description="NaN or Inf: the micro-batch, from 1.")
    rows: list[Count] | None = Field(None, description="NaN or Inf: rows of the training data.")
    parameter: str | None = Field(None, description="NaN or Inf: the first such parameter.")
    checkpoint: str | None = Field(None, description="NaN or Inf: the last good checkpoint.")


class Extension(Block):
    """One time that a run was resumed to train longer."""

    recipe_digest: str | None = Field(None, description="Digest of the earlier recipe.")
    num_train_epochs: Number = Field(None, description="The earlier value.")
    max_steps: int | None = Field(None, description="The earlier value; -1: set by epochs.")
    steps: Count | None = Field(None, description="The new total number of steps.")
    schedule: str | None = Field(None, description="How the learning rate continues.")


class InitFromBlock(Block):
    """The adapter that training started from."""

    path: str
    kind: Literal["run", "peft"]
    digest: str = Field(description="sha256 (hex) of the file of tensors.")
    head: Literal["loaded", "fresh"] | None = Field(
        None, description="`fresh` if the classes differ; null without a head."
    )


class HeadStart(Block):
    """Where the initial values of a classification head come from."""

    start: Start = Field(
        description="The output layer: `kept` from the model's files, `aligned` (kept, with the "
        "classes in the order of the data), or `fresh` from the random seed."
    )
    kept: list[str] = Field(description="Head parameters that the model's files contain.")
    fresh: list[str] = Field(description="Head parameters initialized from the random seed.")


class NotAdapted(Block):
    """Large parameters of transformer blocks, except attention, that no target module covers."""

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


class MixedSource(Block):
    """One source of a training mixture."""

    name: str
    weight: Number = Field(description="As in the recipe.")
    rows: Count = Field(description="Training rows, or conversations, that it has.")
    taken: Count = Field(description="Those that are trained on; repeated ones count each time.")


class TaskBlock(Block):
    """The task and its data."""

    name: str | None = Field(None, description="As in the recipe.")
    kind: TaskKind | None = None
    metric: str | None = Field(None, description="The metric that `score` is a value of.")
    metric_set: str | None = Field(
        None, description="The validation set that `score` is measured on."
    )
    regression: bool = False
    label_names: list[str] | None = None
    positive_label: str | None = Field(
        None,
        description="The class that f1, precision and recall refer to, in a task with two classes; "
        "null if none of them is measured.",
    )
    class_weights: dict[str, Number] | None = Field(
        None, description="Weight of each class in the loss, counted on the training rows."
    )
    training_loss: LossName = Field(
        "full",
        description="The loss of a training step: `full`, or over a sample of the vocabulary. "
        "`metrics.train` are values of it; evaluations always use the full loss.",
    )
    text_columns: list[str] = Field(
        [], description="Columns of the texts: one or two; none for conversations."
    )
    train_examples: Count | None = None
    sources: list[MixedSource] = Field([], description="Of a mixture, `task.mix`.")
    validation_examples: dict[str, Count] = Field({}, description="By validation set.")
    test_examples: dict[str, Count] = Field(
        {}, description="By test set; empty without `task.holdout`."
    )
    majority_score: Number = Field(
        None, description="The score of always predicting the most frequent class."
    )
    majority_accuracy: Fraction = None
    max_length: Count | None = Field(None, description="Largest number of tokens of an example.")
    padding: str | None = None
    notes: list[str] = Field([], description="Notes on rows that were left out, cut or split off.")
    counts: dict[str, Count] = Field(
        {}, description="Number of conversations that were read and kept, and dropped by reason."
    )

    @property
    def baseline(self) -> tuple[str, float] | None:
        """What the same answer for every row scores: the answer's name, and the score."""
        if self.majority_score is None:
            return None
        names = {"regression": "mean score", "multilabel": "most frequent labels"}
        return names.get(self.kind or "", "majority class"), self.majority_score


class MethodBlock(Block):
    """The method, with the settings of its recipe. `counts` has the size that follows from them."""

    name: str
    form: str | None = None
    support: str | None = None
    density: Number = None
    scope: str | None = Field(
        None, description="What trains besides the targets: head, pooler or rest."
    )
    settings: dict[str, Any] = Field({}, description="All other keys of the method's section.")


class ParameterGroup(Block):
    """Parameters with one learning rate and one weight decay."""

    parameters: Count
    learning_rate: Number = Field(description="At the start, before the schedule.")
    weight_decay: Number = None


class OptimizerBlock(Block):
    """The optimizer, read off the one that trains."""

    name: str = Field(description="`train.optim`.")
    type: str = Field(description="Its class.")
    groups: list[ParameterGroup]


class TargetCounts(Block):
    """One target module."""

    name: str
    kind: str = Field(description="Its name within a block, such as `intermediate.dense`.")
    block: int | None = Field(None, description="Number of the transformer block, from 0.")
    out_features: Count
    in_features: Count
    entries: Count = Field(description="Its parameters that one step changes.")
    touched: Count | None = Field(None, description="Its parameters that changed in any step.")


class CountsBlock(Block):
    """How many parameters train."""

    model_parameters: Count | None = None
    target_parameters: Count | None = None
    trainable: Count | None = Field(None, description="Parameters that one step changes.")
    trainable_targets: Count | None = Field(None, description="Of these, in target modules.")
    trainable_head: Count | None = None
    trainable_rest: Count | None = None
    touched: Count | None = Field(
        None,
        description="Parameters that changed in any step, which can be more than train at once. "
        "Head and rest are counted as a whole.",
    )
    touched_targets: Count | None = None
    requested_target_entries: Count | None = Field(
        None, description="Parameters in the targets that the recipe asks for."
    )
    remainder: int | None = Field(None, description="`trainable_targets` minus the request.")
    density: Number = Field(None, description="`trainable_targets` / `target_parameters`.")
    note: str = ""
    targets: list[TargetCounts] = []


class SparsityBlock(Block):
    """Where the changed parameters lie in the middle target; null if all parameters train."""

    target: str
    rows: Count = Field(description="Rows of the sparse matrix: the core, or the weight.")
    columns: Count
    map: Matrix = Field(description="Changed share of each of at most 24 x 24 blocks, 0 to 1.")


class SampleAnswer(Block):
    """The model's answer to one of `train.sample_prompts`."""

    prompt: str
    answer: str
    tokens: Count = Field(description="Generated tokens, with the end-of-turn token.")
    stopped: Literal["end", "length", "full"] = Field(
        description="`end`: at the end of the turn; `length`: at `train.sample_max_new_tokens`; "
        "`full`: at the model's last position."
    )


class Evaluation(Block):
    """One evaluation."""

    step: Count = Field(description="Number of optimizer steps before it.")
    epoch: Number = None
    metric: str | None = None
    score: Number = Field(
        None, description="The value of `metric`. Lower is better for loss and perplexity."
    )
    loss: Number = Field(None, description="Nats per labelled token or example.")
    threshold: Fraction = Field(
        None,
        description="With several labels a row: the probability from which a label is given. It "
        "has the highest micro F1 on all rows of the first validation set. `score` and `values` "
        "are cross-fitted: each half of the rows at the threshold of the other half.",
    )
    values: dict[str, dict[str, Number]] = Field(
        {}, description="All metrics by validation set: fractions, or correlations from -1 to 1."
    )
    samples: list[SampleAnswer] = Field(
        [], description="Answers to `train.sample_prompts`; only in `history`."
    )


class TrainingLoss(Block):
    """The training loss at a logged step."""

    step: Count
    epoch: Number = None
    loss: Number = Field(None, description="Mean since the previous logged step, in nats.")
    learning_rate: Number = None


class MetricsBlock(Block):
    """Scores and losses."""

    initial: Evaluation | None = Field(None, description="Before the first step.")
    best: Evaluation | None = Field(None, description="The model that was kept.")
    final: Evaluation | None = Field(None, description="After the last step.")
    test: Evaluation | None = Field(
        None,
        description="The kept model on the test sets, which chose nothing; `score` and `loss` are "
        "those of the first set. Only with `task.holdout`; test.csv has the answers.",
    )
    history: list[Evaluation] = []
    train: list[TrainingLoss] = []
    notes: list[str] = []

    @property
    def reported(self) -> Evaluation | None:
        """The kept model on the test sets, or else on the validation data that chose it."""
        return self.test or self.best


class MemoryCategories(Block):
    """Bytes in memory by category, at one moment."""

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
    reserved_bytes: Bytes | None = Field(None, description="Reserved by the CUDA allocator.")


class MemoryBlock(Block):
    """Peak memory of rank zero. With gradient accumulation, a later micro-batch is measured."""

    device: str | None = None
    how: str | None = Field(None, description="How memory was counted.")
    batch_shape: list[Count] | None = Field(None, description="Examples x tokens of a step.")
    peak_bytes: Bytes | None = None
    peak_phase: str | None = None
    phases: dict[str, MemoryPhase] = Field(
        {}, description="load, calibrate, energy, forward, backward, optimizer, evaluate."
    )


class TokensBlock(Block):
    """Tokens of rank zero's training batches. Older versions did not count them before a resume."""

    real: Count = Field(0, description="Tokens of the texts.")
    padded: Count = Field(0, description="Tokens of the batches with their padding.")
    computed: Number = Field(
        0.0,
        description="Tokens whose hidden states were computed, as a mean over the blocks: an "
        "encoder computes real tokens only, and its last block may compute one of each row.",
    )


class TimeBlock(Block):
    """Wall time. For a resumed run, all but load_s, evaluate_s and total_s cover the whole run."""

    load_s: Seconds = None
    calibrate_s: Seconds = None
    diagnostics_s: Seconds = None
    train_s: Seconds = None
    evaluate_s: Seconds = None
    total_s: Seconds = None
    steps: Count | None = None
    steps_per_s: Number = None
    step_median_s: Seconds = None
    step_iqr_s: Seconds = Field(None, description="Interquartile range.")
    examples_per_s: Number = None


class EnergyShares(Block):
    """Share of the squared norm of held-out gradients in the largest 1 % of entries."""

    original: Fraction = Field(None, description="Without a basis.")
    transposed: Fraction = Field(None, description="With Q_in transposed, as published code does.")
    kind_basis: Fraction = Field(None, description="In a basis shared by a layer kind.")
    layer_basis: Fraction = Field(None, description="In the layer's own basis.")
    whole_core: Fraction = Field(None, description="In all entries of a truncated core.")


class EnergyRow(EnergyShares):
    """The energy shares of one target module."""

    target: str
    kind: str


class SupportShares(Block):
    """Shares of the squared norm of held-out gradients in the same number of parameters."""

    count: Number = Field(None, description="Number of trainable parameters.")
    support: Fraction = Field(None, description="In the trained parameters.")
    full_basis: Fraction = Field(
        None, description="In the best ones in hindsight, full-rank basis."
    )
    original: Fraction = Field(None, description="In the best ones in hindsight, without a basis.")


class SupportRow(SupportShares):
    """The support of one target module compared with the best one in hindsight."""

    target: str
    kind: str


class ComparedBlock(Block):
    """The trained support compared with the best one in hindsight."""

    rows: list[SupportRow] = []
    mean_by_kind: dict[str, SupportShares] = {}
    verdict: str = Field("", description="The sentence that reports show.")


class EnergyBlock(Block):
    """How well the basis concentrates gradients that calibration never saw."""

    top: Number = Field(None, description="Share of the entries that is counted: 0.01.")
    steps: Count | None = None
    rows: list[EnergyRow] = []
    mean_by_kind: dict[str, EnergyShares] = {}
    compared: ComparedBlock | None = None


class Spectrum(Block):
    """Singular values of one side of a basis."""

    key: str = Field(description="The basis: a target's name, or a layer kind.")
    side: Side
    values: list[Number] = Field(description="Divided by the first, largest first, at most 256.")


class HeatMap(Block):
    """Mean absolute gradients of one target, pooled to at most 96 x 96 cells."""

    target: str
    original: Matrix
    basis: Matrix = Field(description="The same gradients in the basis.")


class CalibrationSettings(Block):
    """How a basis was computed. Also in the metadata of basis.safetensors, under `settings`."""

    steps: Count | None = None
    select: str = Field("random", description="How its examples are chosen.")
    basis_per: str | None = Field(None, description="`layer` or `kind`.")
    source: str | None = None
    decomposition: str | None = None
    score: str | None = Field(None, description="How the support is chosen.")
    warmup_steps: Count | None = Field(None, description="Steps of the head before calibration.")
    batch_size: Count | None = None
    passes: Count | None = Field(None, description="Passes over the calibration batches.")
    seed: Count | None = None
    data: str | None = Field(None, description="sha256 (hex) of the data.")
    seconds: Seconds = None
    peak_bytes: Bytes | None = None
    tokens: Count | None = Field(
        None, description="Tokens in all passes and in the head's warm-up, without padding."
    )


class CalibrationBlock(CalibrationSettings):
    """The basis of a run."""

    stream_bytes: Bytes | None = Field(None, description="Size of all running sums.")
    basis_file: str | None = None
    basis_bytes: Bytes | None = None
    reused: bool = Field(False, description="Whether the basis was read from a file.")
    digest: str | None = Field(None, description="sha256 (hex) of the basis tensors.")
    energy: EnergyBlock | None = None
    spectra: list[Spectrum] = []
    heat_map: HeatMap | None = None


class PrecisionBlock(Block):
    """The number formats of a run."""

    weights: dict[str, Count] = Field({}, description="Parameters by dtype, as loaded.")
    autocast: str | None = Field(None, description="The dtype of autocast.")
    matmul: str | None = Field(None, description="torch's setting for float32 matrix products.")
    device: str | None = None

    @property
    def formats(self) -> PrecisionBlock:
        """The block without the numbers of parameters, which differ with a head's labels."""
        return self.changed(weights=dict.fromkeys(self.weights, 0))


class HashesBlock(Block):
    """Digests (sha256, hex) that show whether runs of a comparison had the same inputs."""

    data: str | None = None
    body: str | None = Field(None, description="The model's weights without the head.")
    head_init: str | None = None
    precision: str | None = Field(
        None,
        description="Of the block `precision` without the numbers of parameters; records of older "
        "versions count them in, so compare the blocks.",
    )
    order: dict[StepKey, str] = Field({}, description="By step: all batches up to it.")
    rows: dict[StepKey, str] = Field(
        {}, description="By step: all rows up to it, without padding and regardless of batches."
    )


class SizesBlock(Block):
    """Sizes on disk, in the optimizer, and of gradients sent between processes."""

    adapter_bytes: Bytes | None = None
    gradient_bytes_per_step: Bytes | None = Field(
        None, description="What each process sends in a step; null for a single process."
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
    """The git checkout in which the command ran."""

    commit: str | None = None
    dirty: bool | None = Field(None, description="Whether tracked files differ from the commit.")


class RunRecord(Record):
    """The record of `train` and `calibrate`. A block is absent until the run has reached it."""

    status: Status = Field(
        description="`pruned`: tuning stopped the run early. The status stays `running` if the "
        "process was killed."
    )
    error: ErrorBlock | None = None
    started: str | None = Field(None, description="ISO 8601, UTC; the time of the last resume.")
    finished: str | None = None
    command: Literal["train", "calibrate"] | None = None
    name: str | None = Field(None, description="Name of the run's folder.")
    recipe_digest: str | None = Field(
        None, description="sha256 (hex) of the resolved recipe without output_dir."
    )
    seed: Count | None = None
    output_dir: str | None = None
    processes: Count | None = Field(None, description="Number of processes that trained together.")
    split_by: str | None = Field(
        None,
        description="What shards weights over processes: `FSDP2` or `DeepSpeed`; null if each "
        "process holds all of them.",
    )
    resumed_from: Count | None = Field(
        None,
        description="Step of the checkpoint of the last resume; 0: from the start; null: never "
        "resumed.",
    )
    extended: list[Extension] = []
    init_from: InitFromBlock | None = None
    model: ModelBlock | None = None
    task: TaskBlock | None = None
    method: MethodBlock | None = None
    counts: CountsBlock | None = None
    optimizer: OptimizerBlock | None = None
    sparsity: SparsityBlock | None = None
    metrics: MetricsBlock | None = None
    memory: MemoryBlock | None = None
    tokens: TokensBlock | None = None
    time: TimeBlock | None = None
    calibration: CalibrationBlock | None = None
    precision: PrecisionBlock | None = None
    hashes: HashesBlock | None = None
    sizes: SizesBlock | None = None
    environment: EnvironmentBlock | None = None
    git: GitBlock | None = None

    @property
    def number_formats(self) -> str | None:
        """What runs of equal precision share, as text; None if it was not recorded."""
        if self.precision is not None:
            return json.dumps(self.precision.formats.to_json(), sort_keys=True)
        return self.hashes.precision if self.hashes else None
