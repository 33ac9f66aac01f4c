"""Load a chat model: that of a run, an exported one, or a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.generate.options import ModelOptions
from sparsegrad_cli.generate.peft_folder import base_of, load_onto, tokenizer_in
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import (
    exists,
    expanded,
    file_digest,
    is_file,
    is_folder,
    looks_like_folder,
)
from sparsegrad_cli.methods.peft_folder import CONFIG
from sparsegrad_cli.models.digests import fingerprint, weights_digest
from sparsegrad_cli.models.load_model import check_vocabulary, load_causal_lm
from sparsegrad_cli.models.pretrained import load_tokenizer, locate
from sparsegrad_cli.models.quantized import bits_of, move_model
from sparsegrad_cli.models.targets import find_targets
from sparsegrad_cli.progress import Observer
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import CHAT_TASKS
from sparsegrad_cli.records.store import EXPORT
from sparsegrad_cli.restore.exported_adapter import SETTINGS, load_adapter, read_settings
from sparsegrad_cli.restore.restore import BaseModule, base_model_errors, check_base, restore
from sparsegrad_cli.restore.run_files import open_run
from sparsegrad_cli.tasks.answerer import Answerer
from sparsegrad_cli.tasks.generation_settings import GenerationSettings

_DTYPES = ("float32", "bfloat16", "float16")


class ChatModel(NamedTuple):
    """A model that answers.

    Attributes:
        model: A causal language model on its device, in eval mode.
        tokenizer: Its tokenizer.
        about: The fields in every line of answers: ``model`` (as the user named it), ``kind``
            (run, adapter, lora or model), ``digest`` (sha256 of all weights as loaded), ``dtype``,
            ``quantization`` (8bit, 4bit or null); for a run ``recipe_digest``, ``method`` and
            ``trained`` (sha256 of the file with the trained parameters).
    """

    model: nn.Module
    tokenizer: Any
    about: dict[str, Any]


def load_chat_model(options: ModelOptions) -> ChatModel:
    """Load the model that ``options.source`` names.

    Raises:
        UsageError: A path, a device or a dtype does not exist; or the source is a calibration, a
            comparison or a classifier, which do not generate text.
        FileFormatError, DownloadError: A file is missing or damaged, or the hub is not reachable.
    """
    device = _device(options.device)
    folder = expanded(options.source)
    _check_exists(options.source, folder)
    if is_file(folder / "run.json") or is_file(folder / "compare.json"):
        loaded = _from_run(options, folder, device)
    elif options.overrides:
        raise UsageError(
            f"{options.overrides[0]} applies to runs, and {options.source} is not a run",
            where="command line",
        )
    elif is_file(folder / SETTINGS):
        loaded = _from_adapter(options, folder, device)
    elif is_file(folder / CONFIG):
        loaded = _from_peft(options, folder, device)
    else:
        loaded = _plain(_section(options.source, options.dtype), device)
    return _ready(options.source, device, loaded)


def load_answerer(
    options: ModelOptions, settings: GenerationSettings, observer: Observer
) -> tuple[Answerer, dict[str, Any]]:
    """Load a model, and return it ready to answer, with its description for records.

    Raises:
        SparsegradError: See :func:`load_chat_model`.
    """
    observer.phase("load", options.source)
    model, tokenizer, about = load_chat_model(options)
    if about.get("source") not in (None, "adapter"):
        observer.note(f"the run has no adapter yet: {about['source']} is used")
    return Answerer(model, tokenizer, settings), about


def load_base(section: ModelSection, device: str | None) -> ChatModel:
    """Load the base model of a run, as its recipe does; see :func:`load_chat_model`."""
    there = _device(device)
    model, tokenizer = load_causal_lm(section, there), load_tokenizer(section)
    return _ready(section.name, there, ChatModel(model, tokenizer, {"kind": "model"}))


def _ready(source: str, device: torch.device, loaded: ChatModel) -> ChatModel:
    """Check that the model generates text, move it to its device and complete ``about``."""
    model: Any = loaded.model
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UsageError(
            f"expected a model that generates text, got {type(model).__name__} in {source}",
            fix="a language model, or a run of a chat task",
        )
    check_vocabulary(loaded.tokenizer, model, source)
    model = move_model(model, device).eval()
    about = {
        "model": str(Path(source)) if exists(source) else source,
        **loaded.about,
        "digest": weights_digest(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "quantization": bits_of(model),
    }
    return ChatModel(model, loaded.tokenizer, about)


def _check_exists(source: str, folder: Path) -> None:
    """Refuse a path that does not exist, instead of searching the hub for a mistyped folder."""
    beside = folder.parent != Path() and is_folder(folder.parent)
    local = looks_like_folder(source) or beside
    if not exists(folder) and not source.startswith("builtin:") and local:
        raise UsageError(
            f"there is no folder {source}",
            fix="a run, an exported folder or a model's folder, a hub id, or builtin:smollm2",
        )


def _from_run(options: ModelOptions, folder: Path, device: torch.device) -> ChatModel:
    """Load a run's model in the form it was trained in, without the run's data."""
    _refuse_dtype(options, "a run uses model.dtype of its recipe")
    files = open_run(folder, options.overrides, data=False)
    recipe = files.loaded.recipe
    if recipe.task.name not in CHAT_TASKS:
        raise UsageError(
            f"expected a run that generates text, got a run of {recipe.task.name}: {folder}",
            fix=f"a run of a chat task: {', '.join(CHAT_TASKS)}",
        )
    with base_model_errors(files.loaded):
        tokenizer = load_tokenizer(recipe.model)
        model = move_model(load_causal_lm(recipe.model, device), device)
    targets = find_targets(model, recipe.targets)
    base = BaseModule(model, targets, fingerprint(model, targets))
    check_base(files, base)
    restore(files, base)
    about = {
        "kind": "run",
        "source": files.source,
        "trained": file_digest(files.tensors),
        "recipe_digest": files.record.recipe_digest,
        "method": recipe.method.name,
        "base": recipe.model.name,
    }
    return ChatModel(model, tokenizer, about)


def _from_adapter(options: ModelOptions, folder: Path, device: torch.device) -> ChatModel:
    """Load an export of ``export --to adapter`` into the base model that it names."""
    _refuse_dtype(options, "an adapter uses that of its base model")
    base = read_settings(folder).model
    section = ModelSection(name=base.name, revision=base.revision, dtype=base.dtype)
    about = {"kind": "adapter", "base": base.name}
    return ChatModel(load_adapter(folder, device=device), load_tokenizer(section), about)


def _from_peft(options: ModelOptions, folder: Path, device: torch.device) -> ChatModel:
    """Load a PEFT adapter into the base model that it names.

    For an export of a run, the base model has the dtype and quantization of the run.
    """
    bits, dtype = _exported_base(folder)
    base, revision = base_of(folder)
    section = _section(base, options.dtype or dtype, revision, bits)
    model, tokenizer, _ = _plain(section, device)
    model = load_onto(model, folder)
    return ChatModel(model, tokenizer_in(folder) or tokenizer, {"kind": "lora", "base": base})


def _exported_base(folder: Path) -> tuple[Any, str | None]:
    """Return (quantization, dtype) of the base of an export; (None, None) for other folders."""
    path = folder / EXPORT
    if not path.is_file():
        return None, None
    try:
        base = plain_json(path.read_bytes())["model"]
        bits, dtype = base.get("quantization"), base["dtype"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"is not a record of an export: {error}", where=str(path)) from error
    if bits not in (None, "8bit", "4bit") or dtype not in _DTYPES:
        raise FileFormatError(f"names a base model in {bits!s:.40}, {dtype!s:.40}", where=str(path))
    return bits, dtype


def _section(
    name: str, dtype: str | None, revision: str | None = None, bits: Any = None
) -> ModelSection:
    """Return the settings of a model by name, in the dtype of its files by default."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"{dtype!r} is not a dtype", where="--dtype", fix=", ".join(_DTYPES))
    chosen: Any = dtype or _stored_dtype(name, revision)
    return ModelSection(name=name, revision=revision, dtype=chosen, quantization=bits)


def _plain(section: ModelSection, device: torch.device) -> ChatModel:
    model = load_causal_lm(section, device, packed=True)
    return ChatModel(model, load_tokenizer(section), {"kind": "model"})


def _stored_dtype(name: str, revision: str | None) -> str:
    """Return the dtype in config.json, or float32; the loader reports a damaged file."""
    from transformers import AutoConfig

    source = locate(name)
    try:
        kwargs = {} if is_folder(source) else {"revision": revision}
        stored = AutoConfig.from_pretrained(source, **kwargs).get_text_config().dtype
    except Exception:
        return "float32"
    word = str(stored).removeprefix("torch.")
    return word if word in _DTYPES else "float32"


def _refuse_dtype(options: ModelOptions, reason: str) -> None:
    if options.dtype is not None:
        raise UsageError(f"--dtype is for plain models: {reason}", where="--dtype")


def _device(name: str | None) -> torch.device:
    """Return a device by name; without a name, a GPU if there is one.

    Raises:
        UsageError: The device does not exist here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"there is no device {name!r} here: {first_line(error)}",
            where="--device",
            fix="cpu, cuda, cuda:1",
        ) from error
    if device.type == "meta":
        raise UsageError("the meta device holds no data", where="--device", fix="cpu, cuda")
    return device
