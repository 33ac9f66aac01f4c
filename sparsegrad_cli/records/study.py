"""compare.json: the record of a comparison."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sparsegrad_cli.records.base import (
    Block,
    Bytes,
    Count,
    Fraction,
    Interval,
    Number,
    Record,
    Seconds,
)
from sparsegrad_cli.records.run import (
    EnvironmentBlock,
    ErrorBlock,
    GitBlock,
    MemoryCategories,
    RunRecord,
    Status,
)

CellStatus = Literal[
    "pending", "running", "done", "failed", "out_of_memory", "interrupted", "pruned"
]
Verdict = Literal["met", "over", "under"]


class CellEntry(Block):
    """One run of a comparison: a task, a method and a seed."""

    task: str
    method: str
    seed: int
    run_dir: str | None = Field(None, description="Relative to the comparison's folder.")
    status: CellStatus
    error: ErrorBlock | None = None
    run: RunRecord | None = Field(
        None, description="Its run.json without calibration.heat_map and calibration.spectra."
    )


class Difference(Block):
    """A mean paired difference of scores."""

    against: str = Field(description="The other method.")
    mean: Number = None
    interval: Interval | None = Field(None, description="95 % confidence interval.")
    n: Count = Field(description="Number of seeds that both methods have finished.")


class ResultRow(Block):
    """One task and method over all seeds. Bytes are maxima over seeds, other numbers means."""

    task: str
    method: str
    seeds_done: Count = 0
    seeds_asked: Count = 0
    status: CellStatus = "pending"
    metric: str | None = None
    positive_label: str | None = None
    score_mean: Number = None
    score_std: Number = None
    score_interval: Interval | None = Field(None, description="95 % confidence interval.")
    scores: list[Number] = Field([], description="By seed.")
    validation_loss_mean: Number = Field(None, description="Of the test set, if there is one.")
    trainable_targets: Count | None = None
    trainable: Count | None = None
    touched_targets: Number = None
    touched: Number = None
    peak_bytes: Bytes | None = Field(None, description="Peak of the training step.")
    memory_categories: MemoryCategories | None = Field(None, description="At that peak.")
    beyond_weights_bytes: int | None = Field(None, description="`peak_bytes` minus the weights.")
    peak_charged_bytes: Bytes | None = Field(
        None, description="`peak_bytes`, or the peak of calibration if that is higher."
    )
    optimizer_state_bytes: Bytes | None = None
    saved_activation_bytes: Bytes | None = None
    adapter_bytes: Bytes | None = None
    steps_per_s: Number = None
    steps_per_s_iqr: Number = None
    train_s: Seconds = None
    calibrate_s: Seconds = Field(None, description="Charged in full to every run.")
    calibrate_tokens: Number = None
    calibrate_peak_bytes: Bytes | None = None
    basis_uses: Count | None = Field(None, description="Number of runs in the same basis.")
    calibrate_s_per_use: Seconds = Field(None, description="Divided among those runs.")
    note: str = ""
    difference: Difference | None = None


class PairTest(Block):
    """Two methods on all tasks and seeds that both have finished."""

    a: str
    b: str
    n: Count = Field(description="Number of pairs of runs.")
    tasks: Count
    seeds: Count
    metric: str | None = Field(None, description="Null if the tasks' metrics cannot be averaged.")
    wins: Count = Field(description="Pairs that `a` won; lower is better for loss and perplexity.")
    losses: Count
    mean: Number = Field(None, description="Mean of a - b.")
    interval: Interval | None = Field(None, description="95 % confidence interval.")
    p: Fraction = Field(None, description="p-value of the permutation test.")
    p_holm: Fraction = Field(None, description="`p`, corrected for the number of pairs.")
    p_t: Fraction = Field(None, description="p-value of the t-test.")
    p_t_holm: Fraction = None
    smallest_p: Fraction = Field(None, description="The smallest p that so many pairs can give.")
    seeds_needed: Count | None = Field(
        None,
        description="Number of seeds that would show the difference with a probability of 80 %, if "
        "further seeds have the same mean and spread; at most 10,000. Null if the difference is "
        "shown already, or if it is zero.",
    )
    better: str | None = Field(None, description="The better method; null if none is shown.")
    examples_share: Fraction = Field(
        None,
        description="Share of the variance of the mean that is due to the test rows, which more "
        "seeds do not reduce.",
    )
    margin: Number = Field(
        None,
        description="`p` is of the hypothesis that `a` is worse than `b` by this margin or more, "
        "doubled so that it stands for the same two-sided level.",
    )
    not_inferior: bool | None = Field(None, description="Whether that hypothesis is rejected.")


class PairTestsBlock(Block):
    """Which methods differ, over all seeds and tasks."""

    over: Literal["seeds", "seeds_and_examples"] = "seeds"
    row: str | None = Field(None, description="The row that all pairs have in common.")
    margins: dict[str, Number] = Field({}, description="Of non-inferiority, as asked.")
    test: str
    check: str
    correction: str
    level: Fraction = None
    untested: Count = Field(0, description="Pairs with too few seeds in common.")
    reason: str = Field("", description="Why no pair could be tested, if there is another reason.")
    pairs: list[PairTest] = []


class KeyDifference(Block):
    """A recipe key that differs between the methods of a task."""

    task: str
    key: str
    values: dict[str, Any] = Field(description="By method.")
    why: str | None = Field(None, description="`budget` if the value was set for the budget.")


class ParityBlock(Block):
    """Whether the recipes differ only in the methods."""

    compared: Count = Field(0, description="Number of compared keys.")
    declared: list[KeyDifference] = Field([], description="Allowed ones, such as learning rates.")
    flagged: list[KeyDifference] = Field([], description="Those under `differ` in the study.")


class Check(Block):
    """What the runs of a task and seed have in common; null if fewer than two recorded it."""

    task: str
    seed: int
    methods: Count = 0
    same_data: bool | None = None
    same_head_init: bool | None = None
    same_model: bool | None = None
    same_precision: bool | None = None
    same_order: bool | None = None
    steps_compared: Count | None = Field(None, description="Steps whose order was compared.")
    same_code: bool | None = None


class LargerSize(Block):
    """The next size of a method, which would exceed the budget."""

    size: str
    takes: Number = Field(None, description="Parameters or bytes, by kind of budget.")


class BudgetRow(Block):
    """One task and method under a budget."""

    task: str
    method: str
    matched: bool = True
    key: str | None = Field(None, description="sha256 (hex) of the settings behind the size.")
    set: dict[str, Any] = Field({}, description="Overrides of the recipe.")
    size: str | None = Field(None, description="In words, such as `rank 3`.")
    predicted: Number = None
    remainder: Number = Field(None, description="The request minus the prediction.")
    limit: str | None = Field(None, description="Why a larger size is not possible.")
    larger: LargerSize | None = None
    shape: list[Count] | None = Field(None, description="Counted batch, examples x tokens.")
    shape_from: str | None = None
    notes: list[str] = []
    runs: Count | None = Field(None, description="Number of measured runs.")
    measured: Number = Field(None, description="Maximum over seeds.")
    deviation: Number = Field(
        None, description="Largest relative deviation of a seed from the request."
    )
    verdict: Verdict | None = None


class BudgetBlock(Block):
    """The budget that every method is sized for; null if `match` names no budget."""

    match: str | None = None
    kind: str | None = Field(None, description="trainable, optimizer_state or peak.")
    request: Number = Field(None, description="Parameters or bytes.")
    tolerance: Fraction = None
    kernels: str | None = Field(None, description="Kernels whose memory was counted: cpu or cuda.")
    rehearsals: Count | None = Field(None, description="Fake runs that the solver needed.")
    solved_s: Seconds = None
    rows: list[BudgetRow] = []


class SearchDimension(Block):
    """One recipe key that is tuned: a range, or choices."""

    key: str
    low: Number = None
    high: Number = None
    log: bool = False
    centre: Number = None
    centre_from: str | None = Field(None, description="Its source: `tune`, `study` or `measured`.")
    choices: list[Any] | None = None


class TrialRun(Block):
    """One seed of a trial."""

    seed: int
    status: CellStatus
    score: Number = None
    loss: Number = None
    seconds: Seconds = None
    steps: Count | None = None
    run_dir: str | None = None


class Trial(Block):
    """One trial of tuning."""

    number: Count
    settings: dict[str, Any] = Field(description="By recipe key.")
    status: CellStatus
    metric: str | None = None
    score: Number = Field(None, description="Mean over its seeds.")
    loss: Number = None
    seconds: Seconds = Field(None, description="Over all processes, also interrupted ones.")
    steps: Count | None = None
    error: str | None = None
    runs: list[TrialRun] = []


class BestTrial(Block):
    """The trial whose settings are used."""

    number: Count
    settings: dict[str, Any]
    score: Number = None
    loss: Number = None


class Edge(Block):
    """A best value at the end of its range."""

    key: str
    end: str


class TuningSeries(Block):
    """All trials of a method on a task."""

    task: str
    method: str
    seed: int | None = Field(None, description="If every seed is tuned by itself.")
    metric: str | None = None
    space: list[SearchDimension] = []
    seconds: Seconds = None
    best: BestTrial | None = Field(None, description="Null until all trials have ended.")
    edges: list[Edge] = []
    trials: list[Trial] = []


class TuningBlock(Block):
    """How every method was tuned; null without tuning."""

    trials: Count
    seeds: list[int] = []
    own_seeds: bool = Field(
        False, description="Every seed was tuned by itself; the best trial is its run."
    )
    keys: list[str] = []
    sampler: str | None = None
    pruner: str | None = None
    optuna: str | None = Field(None, description="Version of Optuna.")
    series: list[TuningSeries] = []


class PublishedFigure(Block):
    """A published result, shown next to the study's own."""

    source: str
    task: str
    method: str
    score: Number = Field(None, description="A fraction.")
    std: Number = None
    steps_per_s: Number = None
    peak_mb: Number = Field(None, description="Megabytes of 1,000,000 bytes.")
    learning_rate: Number = None


class StudyRecord(Record):
    """The record of `compare`. `rows`, `tests` and `checks` are computed from `cells`."""

    name: str | None = None
    digest: str | None = Field(None, description="sha256 (hex) of all runs and their tuning.")
    status: Status = "running"
    command: str | None = Field(None, description="The command line.")
    started: str | None = Field(None, description="ISO 8601, UTC.")
    finished: str | None = None
    match: str | None = Field(None, description="What methods have in common, as in the study.")
    budget: BudgetBlock | None = None
    parity: ParityBlock | None = None
    engine: str | None = Field(None, description="Where the runs train: local, slurm or ray.")
    jobs: Count | None = Field(None, description="Number of runs submitted at once.")
    methods: list[str] = []
    tasks: list[str] = []
    seeds: list[int] = []
    figures: list[PublishedFigure] = []
    environment: EnvironmentBlock | None = None
    git: GitBlock | None = None
    tuning: TuningBlock | None = None
    cells: list[CellEntry]
    rows: list[ResultRow] = []
    tests: PairTestsBlock | None = None
    checks: list[Check] = []


class PlanRow(Block):
    """One task and method of a plan."""

    task: str
    method: str
    recipe: dict[str, Any] = Field(description="Resolved recipe of the first seed, before tuning.")


class PlanRecord(Block):
    """Output of `compare --dry-run --json`."""

    name: str
    match: str | None = None
    seeds: list[int]
    cells: Count = Field(description="Number of runs.")
    trials: Count | None = Field(None, description="Trials of tuning for each row, or its seeds.")
    own_seeds: bool = Field(False, description="Whether every seed of a row is tuned by itself.")
    parity: ParityBlock | None = None
    budget: BudgetBlock | None = None
    rows: list[PlanRow]
