"""Whatever can be asked: a run, what was exported of it, a plain model. One seam to the rest."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.data.spec import CHAT_TASKS
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.generate.options import ModelOptions
from sparsegrad_cli.modeling.loading import load_causal_lm, load_tokenizer, locate
from sparsegrad_cli.modeling.targets import Target, find_targets, fingerprint
from sparsegrad_cli.recipe.schema import ModelSection

_DTYPES = ("float32", "bfloat16", "float16")


def load_run(options: ModelOptions) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model that answers, on its device, with its tokenizer and what answers say of it.

    Returns:
        (model, tokenizer, record). The record has ``model`` (as the user named it), ``kind``
        (run, adapter, lora or model), ``digest`` (sha256 of all weights as they are loaded),
        ``dtype``, and of a run ``recipe_digest`` and ``method``.

    Raises:
        UsageError: a device or dtype that cannot be, a calibration, a comparison, a classifier.
        FileFormatError, DownloadError: a file is missing or damaged, or the hub out of reach.
    """
    device = _device(options.device)
    folder = Path(options.source).expanduser()
    _check_there(options.source, folder)
    if (folder / "run.json").is_file() or (folder / "compare.json").is_file():
        model, tokenizer, about = _from_run(options, folder, device)
    elif options.overrides:
        raise UsageError(
            f"{options.overrides[0]} is for a run, and {options.source} holds none",
            where="command line",
        )
    elif (folder / "adapter.json").is_file():
        model, tokenizer, about = _from_adapter(options, folder)
    elif (folder / "adapter_config.json").is_file():
        model, tokenizer, about = _from_lora(options, folder)
    else:
        model, tokenizer, about = _plain(options.source, options.dtype)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UsageError(
            f"{options.source} generates nothing: it is a {type(model).__name__}",
            fix="a language model, or a run of a chat task",
        )
    model = model.to(device).eval()
    name = str(Path(options.source)) if folder.exists() else options.source
    record = {"model": name, **about, "digest": weights_digest(model)}
    record["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    return model, tokenizer, record


def _check_there(source: str, folder: Path) -> None:
    """Refuse a path to nothing: nobody wants a mistyped folder looked up on the hub."""
    local = source.startswith((".", "/", "~")) or source.count("/") > 1
    beside = folder.parent != Path() and folder.parent.is_dir()
    if not folder.exists() and not source.startswith("builtin:") and (local or beside):
        raise UsageError(
            f"there is no folder {source}",
            fix="a run, an exported folder or a model's folder, a hub id, or builtin:smollm2",
        )


Loaded = tuple[Any, Any, dict[str, Any]]


def _from_run(options: ModelOptions, folder: Path, device: torch.device) -> Loaded:
    """A run's model in the form it was trained in, as an export takes it, without its data."""
    from sparsegrad_cli.export.restore import blaming_base, check_base, restore
    from sparsegrad_cli.export.run_files import open_run

    _no_dtype(options, "a run has its own: model.dtype of its recipe")
    files = open_run(folder, options.overrides, data=False)
    recipe = files.loaded.recipe
    if recipe.task.name not in CHAT_TASKS:
        raise UsageError(
            f"{folder} generates nothing: it is a run of {recipe.task.name}",
            fix=f"a run of a chat task: {', '.join(CHAT_TASKS)}",
        )
    with blaming_base(files.loaded):
        tokenizer = load_tokenizer(recipe.model)
        model = load_causal_lm(recipe.model).to(device)
    targets = find_targets(model, recipe.targets)
    base = _Base(model, targets, fingerprint(model, targets))
    check_base(files, base)
    restore(files, base)
    about = {
        "kind": "run",
        "source": files.source,
        "recipe_digest": files.record.get("recipe_digest"),
        "method": recipe.method.name,
        "base": recipe.model.name,
    }
    return model, tokenizer, about


@dataclass
class _Base:
    """As :class:`sparsegrad_cli.export.restore.Base`."""

    model: nn.Module
    targets: list[Target]
    fingerprint: str


def _from_adapter(options: ModelOptions, folder: Path) -> Loaded:
    """What ``export --to adapter`` wrote, on the base model that it names."""
    from sparsegrad_cli.export.adapter import load_adapter
    from sparsegrad_cli.export.adapter_file import read_settings

    _no_dtype(options, "an adapter has that of its base model")
    base = read_settings(folder).model
    section = ModelSection(name=base.name, revision=base.revision, dtype=base.dtype)
    about = {"kind": "adapter", "base": base.name}
    return load_adapter(folder), load_tokenizer(section), about


def _from_lora(options: ModelOptions, folder: Path) -> Loaded:
    """A PEFT adapter, on the base model that it names; as peft loads it, and then without peft."""
    from peft import PeftModel

    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        revision = config.get("revision")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise FileFormatError(f"is no adapter_config.json: {error}", where=str(path)) from error
    model, tokenizer, _ = _plain(str(base), options.dtype, revision=revision)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft and transformers about each other
            wrapped = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # of peft, torch or safetensors: whatever they make of the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"peft cannot load it: {reason}", where=str(folder)) from error
    if (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    return wrapped.get_base_model(), tokenizer, {"kind": "lora", "base": str(base)}


def _plain(name: str, dtype: str | None, *, revision: str | None = None) -> Loaded:
    """A model by name, in the dtype of its files unless another is asked for."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"{dtype!r} is no dtype", where="--dtype", fix=", ".join(_DTYPES))
    chosen: Any = dtype or _stored_dtype(name, revision)
    section = ModelSection(name=name, revision=revision, dtype=chosen)
    return load_causal_lm(section), load_tokenizer(section), {"kind": "model"}


def _stored_dtype(name: str, revision: str | None) -> str:
    """What config.json says, float32 if it says nothing; what is wrong with it the loader says."""
    from transformers import AutoConfig

    source = locate(name)
    try:
        kwargs = {} if Path(source).is_dir() else {"revision": revision}
        stored = AutoConfig.from_pretrained(source, **kwargs).get_text_config().dtype
    except Exception:
        return "float32"
    word = str(stored).removeprefix("torch.")
    return word if word in _DTYPES else "float32"


def _no_dtype(options: ModelOptions, reason: str) -> None:
    if options.dtype is not None:
        raise UsageError(f"--dtype is for plain models: {reason}", where="--dtype")


def _device(name: str | None) -> torch.device:
    """The device by its name; a GPU if there is one, when none is named.

    Raises:
        UsageError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the device {name!r} is not here: {reason}", where="--device", fix="cpu, cuda, cuda:1"
        ) from error
    if device.type == "meta":
        raise UsageError("the meta device computes nothing", where="--device", fix="cpu, cuda")
    return device


def weights_digest(model: nn.Module) -> str:
    """sha256 (hex) over names, shapes, dtypes and bytes of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat: Any = tensor.detach().to("cpu").contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy())  # numpy has no bfloat16
    return sha.hexdigest()
