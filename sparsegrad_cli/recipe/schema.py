"""Define the sections and keys of a recipe. Sections are frozen and typed. Imports no torch.

A recipe describes one run: model, task, method, targets, calibration, train, seed, output_dir.
Keys under ``train`` have the names of ``transformers.TrainingArguments``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sparsegrad_cli.methods.registry import (
    DEFAULT_METHOD,
    MethodSection,
    settings_class,
    spelled_out,
)
from sparsegrad_cli.recipe.optimizers import (
    DEFAULT_OPTIMIZER,
    check_optimizer_name,
    parse_arguments,
)
from sparsegrad_cli.recipe.section import (
    LARGEST,
    OVER_TOKENS,
    NonNegativeInt,
    PositiveInt,
    Section,
    Seed,
    SettingError,
)
from sparsegrad_cli.recipe.task_section import TaskSection

# Weights of classes enter the loss in float32: its smallest normal number, and about its largest.
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1.2e-38, 3.4e38


class ModelSection(Section):
    """The model. ``model: NAME`` is short for ``model: {name: NAME}``."""

    name: str = Field(
        "builtin:minilm",
        description="hub id, local folder, builtin:minilm, builtin:mpnet or builtin:smollm2",
        min_length=1,
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the frozen weights"
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        None,
        description="load the blocks' linear layers in 8 or 4 bits with bitsandbytes; dtype is "
        "then that of their products; for lora and sparsegrad's form core, with scope head",
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class TargetsSection(Section):
    """The linear layers that are trained; by default those of the MLP blocks."""

    modules: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="auto, or patterns such as '*.up_proj' among the model's linear layers"
    )
    blocks: str | tuple[int, ...] = Field(
        "all", description="all, a Python slice such as '::3', or a list of block numbers"
    )

    @field_validator("blocks", mode="before")
    @classmethod
    def _blocks_are_not_a_number(cls, value: Any) -> Any:
        if isinstance(value, int):  # pydantic's own message names a string and a tuple
            raise ValueError(
                f"expected all, a slice such as '::3' or a list of numbers, got {value}"
            )
        return value

    @field_validator("blocks")
    @classmethod
    def _blocks_are_a_slice(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str) and value != "all":
            parse_slice(value)
        return value


def parse_slice(text: str) -> slice:
    """Return the slice that a text describes: ``"::3"`` is ``slice(None, None, 3)``.

    Raises:
        ValueError: The text is not a slice.
    """
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise ValueError("expected 'all', a slice such as '::3', or a list of numbers")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        raise ValueError(f"blocks: {text!r} is not a slice of whole numbers") from None
    if len(numbers) == 3 and numbers[2] == 0:
        raise ValueError("blocks: a slice step cannot be zero")
    return slice(*numbers)


class CalibrationSection(Section):
    """Gradient steps without an update, from which the bases are computed.

    The defaults of source, decomposition and warmup_steps here are the paper's. The core form has
    other defaults (:func:`calibration_of_the_method`).
    """

    steps: PositiveInt = Field(
        32,
        description="batches whose gradients are read; more give steadier bases and take longer; "
        "12 by default with the core form",
    )
    batch_size: PositiveInt | None = Field(None, description="the training batch size by default")
    select: Literal["random", "maxvol"] = Field(
        "random",
        description="which examples are read: random ones, or of eight times as many those whose "
        "features represent the others (Rectangular Maxvol; one forward pass each)",
    )
    basis_per: Literal["layer", "kind"] = Field(
        "layer",
        description="one basis for each target module, or for each layer kind (the paper)",
    )
    source: Literal["batch", "token", "token_gradient", "random", "original"] = Field(
        "batch",
        description="batch: gradients of batches (the paper); token: g and x of every token "
        "(with the core form by default); token_gradient: the gradients of single tokens; "
        "random, original: bases that do not depend on the data, for comparison",
    )
    decomposition: Literal["exact", "sequential", "randomized"] = Field(
        "exact",
        description="exact: Gram matrices; sequential: the narrow side first, then the wide one "
        "projected; randomized: thin products, no Gram matrix of a wide side (with the core form "
        "by default)",
    )
    power_steps: NonNegativeInt = Field(0, description="randomized: passes beyond the first")
    score: Literal["spectral", "mean", "gradient", "square", "token_square"] = Field(
        "spectral",
        description="how a static support is selected: by the two spectra, or by a second pass for "
        "|mean core gradient|, the mean of its magnitude, of its square, or of its square for each "
        "token",
    )
    warmup_steps: NonNegativeInt = Field(
        0,
        description="steps that train only the head before calibration, on its first batches, "
        "undone afterwards; 50 by default with the core form",
    )
    warmup_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="of the head in these steps"
    )
    keep_head: bool = Field(False, description="start training from the head after warm-up")
    basis: str | None = Field(
        None, min_length=1, description="a basis.safetensors written by calibrate"
    )
    energy_steps: NonNegativeInt = Field(
        4, description="held-out gradient steps for the energy table; 0 omits the table"
    )

    @model_validator(mode="after")
    def _ways_that_exist(self) -> CalibrationSection:
        if self.source in OVER_TOKENS and self.decomposition == "sequential":
            raise SettingError("'sequential' needs source 'batch'", "decomposition", "source")
        return self


class TrainSection(Section):
    """The settings of training, with the names of ``transformers.TrainingArguments``."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3,
        description="size of a step; it matters most, and no rate serves every method: "
        "compare --tune tries several",
    )
    per_device_train_batch_size: PositiveInt = Field(
        16, description="examples in a backward pass on each device; memory grows with it"
    )
    per_device_eval_batch_size: PositiveInt = Field(
        64, description="examples in a batch of an evaluation; changes speed and memory alone"
    )
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="backward passes in an optimizer step: a larger batch in the same memory"
    )
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        3.0, description="passes over the training data"
    )
    max_steps: int = Field(-1, le=LARGEST, description="optimizer steps; -1 uses num_train_epochs")
    lr_scheduler_type: Literal[
        "linear", "constant", "constant_with_warmup", "cosine", "polynomial", "inverse_sqrt"
    ] = Field("constant", description="how the learning rate changes over the run")
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0,
        description="steps, or a share of all steps if below 1, which can also be written as "
        "warmup_ratio; scheduler constant then runs as constant_with_warmup",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="pulls what trains towards zero; biases and parameters of norms do not decay",
    )
    head_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of the task head, and of the pooler where it trains; learning_rate by default",
    )
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="LoRA+ (Hayou et al. 2024): learning rate of B divided by that of A; 1 by "
        "default",
    )
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adagrad",
        "rmsprop",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "lion_32bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
    ] = Field(
        "adamw_torch",
        description="optimizer; those of 8 and 32 bits need bitsandbytes. Methods that choose "
        "parameters in their optimizer need adamw_torch",
    )
    optim_args: str | None = Field(
        None, min_length=1, description="sgd, adagrad, rmsprop: such as 'momentum=0.9'"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="decay of Adam's mean of gradients"
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="decay of Adam's mean of squared gradients"
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        1e-8, description="added to the denominator of Adam's step"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(0.0, description="0 disables clipping")
    loss: Literal["full", "sce", "rece"] = Field(
        "full",
        description="chat tasks: the loss of a training step. full: over the whole vocabulary; "
        "sce: Scalable Cross-Entropy (Mezentsev et al. 2024) and rece: RECE (Gusak et al. 2024), "
        "over classes that random vectors choose. Evaluations always use the full loss",
    )
    loss_buckets: PositiveInt | None = Field(
        None,
        description="sce: random vectors, each with a bucket; 2 sqrt(N) for N labelled tokens in "
        "the batch by default. rece: random vectors and chunks, at most N; "
        "sqrt(4 (1 + 2 loss_neighbours) N) by default",
    )
    loss_bucket_positions: PositiveInt | None = Field(
        None,
        description="sce: labelled tokens in a bucket, at most N; 2 sqrt(N) by default. Tokens in "
        "no bucket are left out of the step",
    )
    loss_bucket_classes: PositiveInt = Field(
        256, description="sce: classes in a bucket, at most the vocabulary"
    )
    loss_mix: bool = Field(
        True,
        description="sce: whether a random vector is a random mixture of the hidden states, not a "
        "normal vector of its own",
    )
    loss_neighbours: NonNegativeInt = Field(
        1, description="rece: chunks of classes on either side that a chunk is compared with"
    )
    loss_rounds: PositiveInt = Field(
        1, description="rece: independent draws, whose classes are joined"
    )
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of each label that is spread evenly over all classes"
    )
    class_weights: Literal["balanced"] | dict[str, float] | tuple[float, ...] | None = Field(
        None,
        description="weight of each class in the loss: balanced (rare classes count more, by the "
        "training rows), a mapping of class names to weights (1 for the others), or a list in the "
        "order of the classes; for several labels a row, weights of the rows that have the label",
    )
    eval_strategy: Literal["steps", "epoch", "no"] = Field(
        "epoch", description="when the model is evaluated: every eval_steps, every epoch, never"
    )
    eval_steps: PositiveInt | None = Field(
        None, description="optimizer steps between evaluations, with eval_strategy: steps"
    )
    save_strategy: Literal["best", "steps", "epoch", "no"] | None = Field(
        None, description="the same as eval_strategy by default"
    )
    save_steps: PositiveInt | None = Field(
        None, description="optimizer steps between checkpoints; eval_steps by default, else 500"
    )
    save_total_limit: PositiveInt | None = Field(
        1, description="checkpoints that are kept, beside the best one; null keeps all"
    )
    load_best_model_at_end: bool = Field(
        True, description="end with the checkpoint of the best evaluation, not with the last step"
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="stop training after this many evaluations without a better score"
    )
    logging_steps: PositiveInt = Field(
        10, description="optimizer steps between two training losses in the log"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        "random",
        description="order of the examples; group_by_length pads less and mixes less",
    )
    bf16: bool = Field(
        False, description="autocast to bfloat16: faster and smaller on GPUs and CPUs that have it"
    )
    fp16: bool = Field(False, description="autocast to float16 with a scaled loss, on a GPU")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    dataloader_num_workers: NonNegativeInt = Field(
        0, description="processes that prepare batches; 0 prepares them in the training process"
    )
    unpadded: bool = Field(
        True,
        description="compute encoders on real tokens only, with the same results; false computes "
        "padding too",
    )
    use_cpu: bool = Field(False, description="train on the CPU although there is a GPU")
    torch_compile: bool = Field(
        False, description="compile the model: minutes at the start, then faster steps on a GPU"
    )
    report_to: str | tuple[str, ...] = Field(
        "none", description="trackers that receive losses and scores: none, all, or their names"
    )
    sample_prompts: str | tuple[str, ...] | None = Field(
        None,
        description="chat tasks: prompts that the model answers at every evaluation, as a list or "
        "a file (one prompt a line, or JSON lines with prompt); training is not affected",
    )
    sample_max_new_tokens: PositiveInt = Field(
        64, description="largest number of tokens of an answer to a sample prompt"
    )
    sample_temperature: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of answers to sample prompts; 0 always takes the most likely token"
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="project that trackers list the run under; the comparison's name by default, "
        "or sparsegrad",
    )
    run_name: str | None = Field(
        None,
        min_length=1,
        description="the run's name in trackers; its folder's name by default, which a comparison "
        "adds to the name",
    )

    @model_validator(mode="before")
    @classmethod
    def _warm_up(cls, data: Any) -> Any:
        """Turn warmup_ratio into a share in warmup_steps, and name the scheduler that will run."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "warmup_ratio" in data:
            data["warmup_steps"] = _share_of_steps(data.pop("warmup_ratio"), data)
        steps = data.get("warmup_steps", 0)
        scheduler = data.get("lr_scheduler_type", cls.model_fields["lr_scheduler_type"].default)
        if scheduler == "constant_with_warmup" and "warmup_steps" not in data:
            raise SettingError(
                "'constant_with_warmup' needs warmup_steps or warmup_ratio",
                "lr_scheduler_type",
                fix="train.warmup_steps: 0.06, or lr_scheduler_type: constant",
            )
        if scheduler in ("constant", "constant_with_warmup") and isinstance(steps, int | float):
            data["lr_scheduler_type"] = "constant_with_warmup" if steps > 0 else "constant"
        return data

    @field_validator("warmup_steps")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value:g} is not a share below 1 or a whole number of steps")
        return value

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @field_validator("sample_prompts")
    @classmethod
    def _prompts_with_text(cls, value: str | tuple[str, ...] | None) -> Any:
        prompts = (value,) if isinstance(value, str) else value
        if prompts is not None and not (prompts and all(text.strip() for text in prompts)):
            raise ValueError("expected prompts that are not empty, or the name of a file")
        return value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_are_positive(cls, value: Any) -> Any:
        if value is None or value == "balanced":
            return value
        weights = value.values() if isinstance(value, dict) else value
        if isinstance(weights, str) or not isinstance(weights, Iterable) or not value:
            raise ValueError(
                "expected balanced, a mapping of class names to weights or a list of weights, got "
                f"{value!r:.60}"
            )
        for weight in weights:
            plain = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not plain or not 0 < weight < math.inf:
                raise ValueError(f"expected weights above 0, got {weight!r:.60}")
            if not _SMALLEST_WEIGHT <= weight <= _LARGEST_WEIGHT:
                raise ValueError(
                    f"expected weights from {_SMALLEST_WEIGHT} to {_LARGEST_WEIGHT}, which float32 "
                    f"can hold, got {weight!r:.60}"
                )
        return value

    @field_validator("optim", mode="before")
    @classmethod
    def _optimizer_exists(cls, value: Any) -> Any:
        check_optimizer_name(value)
        return value

    @field_validator("max_steps")
    @classmethod
    def _steps_or_epochs(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("must be -1 (use num_train_epochs) or at least 1")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainSection:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise SettingError("'steps' needs eval_steps", "eval_strategy", fix="eval_steps: 100")
        if self.bf16 and self.fp16:
            raise SettingError("and fp16 exclude each other", "bf16", "fp16")
        if self.optim_args is not None:
            try:
                parse_arguments(self.optim, self.optim_args)
            except ValueError as error:
                raise SettingError(str(error), "optim_args", "optim") from None
        return self

    @property
    def autocast(self) -> str | None:
        """The name of autocast's dtype, or None without autocast."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _share_of_steps(ratio: Any, data: dict[str, Any]) -> Any:
    """Return ``warmup_ratio`` as a value of ``warmup_steps``."""
    keys = ("warmup_ratio", "warmup_steps")
    if "warmup_steps" in data:
        raise SettingError("is another name for a share of warmup_steps: give one", *keys)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise SettingError(
            f"expected a share of all steps from 0 to below 1, got {ratio!r:.60}",
            keys[0],
            fix="warmup_ratio: 0.06, or warmup_steps: a number of steps",
        )
    return ratio


def calibration_of_the_method(method: Any, calibration: dict[str, Any]) -> dict[str, Any]:
    """Return the calibration section with the method's defaults filled in.

    Args:
        method: The method section of a recipe, not yet checked.
        calibration: Its calibration section, not yet checked.
    """
    settings = settings_class(method)
    if settings is None:
        return calibration
    said = method if isinstance(method, dict) else {}
    return settings.calibration_defaults(said, calibration)


class Recipe(Section):
    """The complete description of one run."""

    model: ModelSection = Field(ModelSection(), description="the model that is fine-tuned")
    task: TaskSection = Field(TaskSection(), description="data, labels and metric")
    method: MethodSection = Field(
        DEFAULT_METHOD, description="what trains, and how: a name, or a name with settings"
    )
    targets: TargetsSection = Field(
        TargetsSection(), description="the linear layers that the method adapts"
    )
    scope: Literal["head", "pooler", "rest"] = Field(
        "head",
        description="what trains beside the target modules: the head; the head and the encoder's "
        "pooler, which pretraining may have left as it was (MiniLM); or everything else",
    )
    match: Literal["trainable"] | None = Field(
        None, description="solve the method's size, such as LoRA's rank, from method.density"
    )
    calibration: CalibrationSection = Field(
        CalibrationSection(), description="the gradient steps that bases are computed from"
    )
    train: TrainSection = Field(TrainSection(), description="the settings of training")
    seed: Seed = Field(
        42, description="of a new head, the data order, dropout and all else that is drawn"
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description="a run's folder or a PEFT LoRA folder; training starts from its values; "
        "for lora and sparsegrad's form core",
    )
    output_dir: str | None = Field(
        None, min_length=1, description="runs/<task>-<method>-<n> by default"
    )

    @model_validator(mode="before")
    @classmethod
    def _calibration_defaults(cls, data: Any) -> Any:
        """Fill in the method's defaults, so that the resolved recipe shows them."""
        if not isinstance(data, dict):
            return data
        calibration = data.get("calibration", {})
        if not isinstance(calibration, dict):
            return data
        return data | {
            "calibration": calibration_of_the_method(data.get("method", {}), calibration)
        }

    @field_validator("match", mode="before")
    @classmethod
    def _nothing_to_match(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("model", "task", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _short_method(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" not in value:
            return {"name": DEFAULT_METHOD.name, **value}
        written = spelled_out(value)
        for key, given in value.items() if isinstance(value, dict) else ():
            stands_for = spelled_out(value["name"])
            if key != "name" and isinstance(stands_for, dict) and key in stands_for:
                meant = stands_for[key]
                if given != meant and str(given).lower() != str(meant).lower():
                    name, meant = value["name"], _yaml(meant)
                    what = f"contradicts the name {name}, which stands for {key}: {meant}"
                    raise SettingError(what, key, fix="leave it out, or use another name")
        return written

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self.method.check(self)
        refused = self.method.optimizer_refusal()
        if self.train.optim != DEFAULT_OPTIMIZER and refused is not None:
            key, why = refused
            raise SettingError(
                f"{self.train.optim!r} cannot be used: {why}",
                "train.optim",
                f"method.{key}",
                fix=f"train.optim: {DEFAULT_OPTIMIZER}, or leave it out",
            )
        return self
