"""Whatever can be asked: a run, what was exported of it, a plain model. One seam to the rest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.export.place import RECORD
from sparsegrad_cli.generate.options import ModelOptions
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.io.paths import exists, expanded, is_file, is_folder
from sparsegrad_cli.models.load_model import check_vocabulary, load_causal_lm
from sparsegrad_cli.models.pretrained import load_tokenizer, locate
from sparsegrad_cli.models.quantized import bits_of, placed, quantization_state
from sparsegrad_cli.models.targets import Target, find_targets, fingerprint
from sparsegrad_cli.recipe.schema import ModelSection
from sparsegrad_cli.recipe.tasks import CHAT_TASKS

_DTYPES = ("float32", "bfloat16", "float16")

Loaded = tuple[Any, Any, dict[str, Any]]


def load_run(options: ModelOptions) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model that answers, on its device, with its tokenizer and what answers say of it.

    Returns:
        (model, tokenizer, record). The record has ``model`` (as the user named it), ``kind``
        (run, adapter, lora or model), ``digest`` (sha256 of all weights as they are loaded),
        ``dtype``, ``quantization`` (8bit, 4bit or null), and of a run ``recipe_digest``,
        ``method`` and ``trained`` (sha256 of the file with what was trained).

    Raises:
        UsageError: a device or dtype that cannot be, a calibration, a comparison, a classifier.
        FileFormatError, DownloadError: a file is missing or damaged, or the hub out of reach.
    """
    device = _device(options.device)
    folder = expanded(options.source)
    _check_there(options.source, folder)
    if is_file(folder / "run.json") or is_file(folder / "compare.json"):
        model, tokenizer, about = _from_run(options, folder, device)
    elif options.overrides:
        raise UsageError(
            f"{options.overrides[0]} is for a run, and {options.source} holds none",
            where="command line",
        )
    elif is_file(folder / "adapter.json"):
        model, tokenizer, about = _from_adapter(options, folder, device)
    elif is_file(folder / "adapter_config.json"):
        model, tokenizer, about = _from_lora(options, folder, device)
    else:
        model, tokenizer, about = _plain(options.source, options.dtype, device)
    return _ready(options.source, device, (model, tokenizer, about))


def load_base(section: ModelSection, device: str | None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model that a run began as, loaded as its recipe loads it; see :func:`load_run`."""
    there = _device(device)
    loaded = load_causal_lm(section, there), load_tokenizer(section), {"kind": "model"}
    return _ready(section.name, there, loaded)


def _ready(source: str, device: torch.device, loaded: Loaded) -> Loaded:
    """On its device, with its record complete."""
    model, tokenizer, about = loaded
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UsageError(
            f"{source} generates nothing: it is a {type(model).__name__}",
            fix="a language model, or a run of a chat task",
        )
    check_vocabulary(tokenizer, model, source)
    model = placed(model, device).eval()
    name = str(Path(source)) if exists(source) else source
    record = {"model": name, **about, "digest": weights_digest(model)}
    record["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    record["quantization"] = bits_of(model)
    return model, tokenizer, record


def _check_there(source: str, folder: Path) -> None:
    """Refuse a path to nothing: nobody wants a mistyped folder looked up on the hub."""
    local = source.startswith((".", "/", "~")) or source.count("/") > 1
    beside = folder.parent != Path() and is_folder(folder.parent)
    if not exists(folder) and not source.startswith("builtin:") and (local or beside):
        raise UsageError(
            f"there is no folder {source}",
            fix="a run, an exported folder or a model's folder, a hub id, or builtin:smollm2",
        )


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
        model = placed(load_causal_lm(recipe.model, device), device)
    targets = find_targets(model, recipe.targets)
    base = _Base(model, targets, fingerprint(model, targets))
    check_base(files, base)
    restore(files, base)
    about = {
        "kind": "run",
        "source": files.source,
        "trained": file_digest(files.tensors),
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


def _from_adapter(options: ModelOptions, folder: Path, device: torch.device) -> Loaded:
    """What ``export --to adapter`` wrote, on the base model that it names."""
    from sparsegrad_cli.export.adapter import load_adapter
    from sparsegrad_cli.export.adapter_file import read_settings

    _no_dtype(options, "an adapter has that of its base model")
    base = read_settings(folder).model
    section = ModelSection(name=base.name, revision=base.revision, dtype=base.dtype)
    about = {"kind": "adapter", "base": base.name}
    return load_adapter(folder, device=device), load_tokenizer(section), about


def _from_lora(options: ModelOptions, folder: Path, device: torch.device) -> Loaded:
    """A PEFT adapter, on the base model that it names; as peft loads it, and then without peft.

    What ``export --to lora`` wrote goes onto a base in the run's dtype, quantized as it was.
    """
    from sparsegrad_cli.generate.peft_folder import base_of, on_base

    bits, dtype = _exported_on(folder)
    base, revision = base_of(folder)
    model, tokenizer, _ = _plain(base, options.dtype or dtype, device, revision=revision, bits=bits)
    model = on_base(model, folder)
    if is_file(folder / "tokenizer_config.json") and is_file(folder / "tokenizer.json"):
        tokenizer = _tokenizer_in(folder)
    return model, tokenizer, {"kind": "lora", "base": base}


def _tokenizer_in(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers make of the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileFormatError(
            f"the tokenizer cannot be read: {reason}",
            where=str(folder),
            fix="take its files away: the base model's is used then",
        ) from error


def _exported_on(folder: Path) -> tuple[Any, str | None]:
    """(bits, dtype) of the base of an exported run; of any other folder nothing."""
    path = folder / RECORD
    if not path.is_file():
        return None, None
    try:
        base = plain_json(path.read_bytes())["model"]
        bits, dtype = base.get("quantization"), base["dtype"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"is no record of an export: {error}", where=str(path)) from error
    if bits not in (None, "8bit", "4bit") or dtype not in _DTYPES:
        raise FileFormatError(f"names a base in {bits}, {dtype}", where=str(path))
    return bits, dtype


def _plain(
    name: str,
    dtype: str | None,
    device: torch.device,
    *,
    revision: str | None = None,
    bits: Any = None,
) -> Loaded:
    """A model by name, in the dtype of its files unless another is asked for."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"{dtype!r} is no dtype", where="--dtype", fix=", ".join(_DTYPES))
    chosen: Any = dtype or _stored_dtype(name, revision)
    section = ModelSection(name=name, revision=revision, dtype=chosen, quantization=bits)
    return load_causal_lm(section, device, packed=True), load_tokenizer(section), {"kind": "model"}


def _stored_dtype(name: str, revision: str | None) -> str:
    """What config.json says, float32 if it says nothing; what is wrong with it the loader says."""
    from transformers import AutoConfig

    source = locate(name)
    try:
        kwargs = {} if is_folder(source) else {"revision": revision}
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
    """sha256 (hex) over names, shapes, dtypes and bytes of all parameters, buffers and scales."""
    sha = hashlib.sha256()
    scales = ((f"scale {n}", scale) for n, scale in enumerate(quantization_state(model)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *scales):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat: Any = tensor.detach().to("cpu").contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy())  # numpy has no bfloat16
    return sha.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes.

    Raises:
        FileFormatError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileFormatError(f"cannot be read: {error}", where=str(path)) from error
