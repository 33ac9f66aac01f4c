"""Load the model of a recipe: a classifier, a language model, or a second copy of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models.classification_head import (
    HeadStart,
    class_dimensions,
    copy_output_layer,
    describe_head_start,
    match_labels,
    reorder_output_layer,
)
from sparsegrad_cli.models.pretrained import (
    from_pretrained,
    load_configuration,
    require_task,
)
from sparsegrad_cli.models.quantized import (
    quantization_config,
    require_bitsandbytes,
    use_frozen_forward,
)
from sparsegrad_cli.models.targets import linear_outside_blocks
from sparsegrad_cli.recipe.schema import ModelSection, Recipe
from sparsegrad_cli.recipe.tasks import TaskSpec

_CPU = torch.device("cpu")
# The words of transformers.
_PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multilabel": "multi_label_classification",
}


def device_of(recipe: Recipe) -> torch.device:
    """Return the current CUDA device, or the CPU without CUDA or with ``train.use_cpu``."""
    if recipe.train.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def name_labels(config: Any, spec: TaskSpec) -> None:
    """Set a task's classes in a model's configuration, and what kind of problem it is."""
    names = spec.label_names or ("score",)
    config.num_labels = 1 if spec.regression else len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = _PROBLEM_TYPES[spec.kind]


class Classifier(NamedTuple):
    """A sequence classifier, and where its head comes from."""

    model: nn.Module
    head: HeadStart


def load_classifier(
    section: ModelSection, spec: TaskSpec, seed: int, device: torch.device = _CPU
) -> Classifier:
    """Load a sequence classifier (or regressor) for a task.

    An output layer in the files is kept if it has the task's classes, and is then put into their
    order. Otherwise it is initialized at random, like all parameters that the files lack. The
    global random state is seeded just before the model is built, so that the head starts from the
    same values for every method.

    Args:
        section: The model in the recipe.
        spec: The task.
        seed: Seed of the parameters that are initialized at random.
        device: Device of a quantized model, which cannot be moved. Other models are built on the
            CPU.

    Raises:
        UsageError: See :func:`require_task`; or the folder holds quantized weights; or bitsandbytes
            is missing.
        DownloadError, FileFormatError: See :func:`from_pretrained`.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    kind: Any = AutoModelForSequenceClassification
    config = load_configuration(section)
    require_task(config, section.name, chat=False)
    match = match_labels(config, spec)
    name_labels(config, spec)
    set_seed(seed)
    loaded = _model(kind, section, config, device)
    model = _with_body(section, loaded)
    more = _with_one_more(config)
    dimensions = class_dimensions(model, _weightless(kind, more, section))
    stored = dimensions.keys() - loaded.lacking
    if stored and match.order is not None:
        reorder_output_layer(model, {name: dimensions[name] for name in stored}, match.order)
    elif stored:
        # transformers initializes it, as it does if the files hold one for other classes.
        set_seed(seed)
        plain = section.model_copy(update={"quantization": None})
        copy_output_layer(model, dimensions, _model(kind, plain, more).model)
    lacking = sorted({*loaded.lacking, *(dimensions if match.order is None else ())})
    held = bool(dimensions.keys() - loaded.missing)
    return Classifier(model, describe_head_start(model, list(dimensions), lacking, match, held))


def _with_one_more(config: Any) -> Any:
    """Return the configuration for one more class."""
    other = copy.deepcopy(config)
    other.problem_type = None  # A regression has one class only.
    other.num_labels = config.num_labels + 1
    return other


def load_causal_lm(
    section: ModelSection, device: torch.device = _CPU, *, packed: bool = False
) -> nn.Module:
    """Load a causal language model. No parameter is added or initialized at random.

    Args:
        section: The model in the recipe.
        device: See :func:`load_classifier`.
        packed: Accept weights that are quantized on disk, which cannot be trained.

    Raises:
        UsageError: See :func:`load_classifier`.
        DownloadError, FileFormatError: See :func:`from_pretrained`; or weights are missing, such
            as the head of a model that was saved without it.
    """
    from transformers import AutoModelForCausalLM

    config = load_configuration(section)
    require_task(config, section.name, chat=True)
    kind: Any = AutoModelForCausalLM
    model, lacking, _ = _model(kind, section, config, device, packed=packed)
    if lacking:
        raise FileFormatError(
            f"{section.name} is not a complete causal language model: it lacks {_shorten(lacking)}",
            where="model.name",
            fix="save it again with its language-model head (AutoModelForCausalLM)",
        )
    return model


def reload_model(section: ModelSection, like: nn.Module, seed: int) -> nn.Module:
    """Load a model again from its files, without quantization.

    Args:
        section: The model in the recipe.
        like: A model that gives the class and the configuration.
        seed: Seed of the parameters that the files lack, such as a task head.

    Raises:
        DownloadError, FileFormatError: See :func:`from_pretrained`.
    """
    from transformers import set_seed

    set_seed(seed)
    config: Any = copy.deepcopy(like.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers added it when it quantized the model.
    return _with_body(section, _model(type(like), section, config))


def load_by_auto_class(
    auto: str,
    section: ModelSection,
    settings: Mapping[str, Any],
    device: torch.device = _CPU,
) -> nn.Module:
    """Load a model with an Auto class of transformers.

    Args:
        auto: Name of the Auto class.
        section: The model in the recipe.
        settings: Changes to the model's configuration.
        device: See :func:`load_classifier`.

    Raises:
        UsageError: The folder holds quantized weights, or bitsandbytes is missing.
        DownloadError, FileFormatError: See :func:`from_pretrained`.
    """
    import transformers

    config = load_configuration(section)
    for name, value in settings.items():
        setattr(config, name, value)
    kind = getattr(transformers, auto)
    return _with_body(section, _model(kind, section, config, device))


def check_vocabulary(tokenizer: Any, model: nn.Module, where: str) -> None:
    """Check that the model has an embedding for every token id of the tokenizer.

    The model may have more embeddings: vocabularies are often padded to a round number.

    Args:
        tokenizer: A transformers tokenizer.
        model: The model.
        where: The recipe key for the error.

    Raises:
        UsageError: Embeddings are missing; the error names their tokens.
    """
    get_embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        table = get_embeddings()
    except NotImplementedError:  # A model that reads bytes has no embeddings.
        return
    if not isinstance(table, nn.Embedding):
        return
    beyond = {n: t for t, n in tokenizer.get_vocab().items() if n >= table.num_embeddings}
    if not beyond:
        return
    some = [f"{beyond[number]!r} ({number})" for number in sorted(beyond)]
    raise UsageError(
        f"expected an embedding for every token, but the tokenizer has ids up to {max(beyond)} "
        f"and the model {table.num_embeddings} embeddings: there is none for {_shorten(some)}",
        where=where,
        fix="add them with model.resize_token_embeddings(len(tokenizer)) of transformers, save the "
        "model and name it here; or take the added tokens out of the tokenizer's files",
    )


class _Loaded(NamedTuple):
    """A model that transformers has loaded.

    Attributes:
        model: The model.
        lacking: Names of the parameters that the files lack or hold in another shape. They were
            initialized at random.
        missing: Names of those that the files lack.
    """

    model: nn.Module
    lacking: list[str]
    missing: set[str]


def _with_body(section: ModelSection, loaded: _Loaded) -> nn.Module:
    """Return the model if at most its head or pooler was initialized at random.

    Raises:
        FileFormatError: Weights of its body are missing, or have another shape.
    """
    model = loaded.model
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    body = [k for k in loaded.lacking if k.startswith(prefix) and "pooler" not in k.split(".")]
    if body:
        raise FileFormatError(
            f"{section.name} does not hold the model that its config.json describes: it lacks "
            f"{_shorten(body)}, or holds them in another shape",
            where="model.name",
            fix="download or copy the model's files again",
        )
    return model


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _model(
    kind: Any,
    section: ModelSection,
    config: Any,
    device: torch.device = _CPU,
    *,
    packed: bool = False,
) -> _Loaded:
    """Call ``kind.from_pretrained``, with quantization if the section asks for it.

    Raises:
        UsageError: The folder holds quantized weights, or bitsandbytes is missing.
        DownloadError, FileFormatError: See :func:`from_pretrained`.
    """
    stored = getattr(config, "quantization_config", None) is not None
    if stored and (section.quantization is not None or not packed):
        raise UsageError(
            f"{section.name} holds weights that are quantized already",
            where="model.name",
            fix="name the model that it was made from, with model.quantization: 4bit or 8bit",
        )
    dtype = getattr(torch, section.dtype)
    # A head of another shape is initialized at random; the caller refuses other mismatches.
    more: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True}
    more |= {"use_safetensors": True, "output_loading_info": True}
    if section.quantization is not None:
        require_bitsandbytes()
        skipped = linear_outside_blocks(_weightless(kind, config, section))
        more["quantization_config"] = quantization_config(section.quantization, dtype, skipped)
    if stored or section.quantization is not None:
        more["device_map"] = {"": device}
    model, report = from_pretrained(
        kind.from_pretrained, section, what="model", config=config, **more
    )
    use_frozen_forward(model, dtype)
    missing = set(report["missing_keys"])
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    return _Loaded(model, sorted(missing | mismatched), missing)


def _weightless(kind: Any, config: Any, section: ModelSection) -> nn.Module:
    """Return the model on the meta device, without changing the global random state."""
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        plain: nn.Module
        if hasattr(kind, "from_config"):
            plain = kind.from_config(config, trust_remote_code=section.trust_remote_code)
        else:
            plain = kind(config)
    return plain
