"""Upload an export to the Hugging Face Hub: private by default, without paths of this machine.

The endpoint is the one of huggingface_hub (``HF_ENDPOINT``), and so is the token (``HF_TOKEN`` or
``hf auth login``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsegrad_cli.error_mapping import first_line
from sparsegrad_cli.errors import UploadError, UsageError
from sparsegrad_cli.io.bounded_json import plain_json
from sparsegrad_cli.records.export import ExportRecord, HubUpload
from sparsegrad_cli.records.store import EXPORT
from sparsegrad_cli.restore.exported_adapter import SETTINGS

_GIT = ".gitattributes"  # The hub writes it into every new repository.
_PEFT_CONFIG = "adapter_config.json"
# Files of the base model's tokenizer may hold tokens that look like the start of a path.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
# Keys of export.json that are about this machine, or about files that are changed here.
_PRIVATE_KEYS = ("run", "notes", "load", "pipeline", "output_dir", "files", "bytes", "hub")


@dataclass(frozen=True)
class HubTarget:
    """Where to push an export.

    Attributes:
        repository: OWNER/NAME.
        public: Whether everyone may see a new repository.
        overwrite: Whether an export that is in the repository may be replaced.
    """

    repository: str
    public: bool = False
    overwrite: bool = False

    @property
    def visibility(self) -> str:
        """``public`` or ``private``."""
        return "public" if self.public else "private"


@dataclass(frozen=True)
class Destination:
    """A repository that was checked.

    Attributes:
        target: What the user asked for.
        existing: The files in the repository, if it exists.
    """

    target: HubTarget
    existing: tuple[str, ...] | None

    def upload(self, files: Mapping[str, bytes | Path], folder: Path) -> HubUpload:
        """Create the repository if necessary, and commit the files to it in one commit.

        Args:
            files: Path in the repository -> content, or the file that holds it.
            folder: The export's folder, for the errors.

        Raises:
            UploadError: The hub refuses, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api, repository = HfApi(), self.target.repository
        old = set(self.existing or ()) - set(files) - {_GIT}
        more = (
            f"the export is complete in {folder}; --overwrite exports again and uploads once more"
        )
        with hub_errors(repository, more=(more,)):
            url = api.create_repo(repository, private=not self.target.public, exist_ok=True)
            commit = api.create_commit(
                repository,
                [
                    *(CommitOperationAdd(path, content) for path, content in files.items()),
                    *(CommitOperationDelete(path) for path in sorted(old)),
                ],
                commit_message="Upload an export of sparsegrad",
            )
        return HubUpload(
            repository=repository,
            url=str(url),
            public=self.target.public,
            commit=commit.oid,
            files=sizes(files),
        )


def check_target(target: HubTarget) -> Destination:
    """Ask the hub, before anything is exported, whether the upload can succeed.

    Raises:
        UsageError: The name is not OWNER/NAME, or there is no token.
        UploadError: The hub cannot be reached or refuses the token, or the repository holds
            something that must not be replaced, or has another visibility.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository = target.repository
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(first_line(error), where="--push-to-hub") from None
    if repository.count("/") != 1:
        raise UsageError(
            f"expected OWNER/NAME, got {repository!r}",
            where="--push-to-hub",
            fix="OWNER is your name on the hub, or that of an organization",
        )
    if get_token() is None:
        raise UsageError(
            "expected a token of the Hugging Face Hub, and there is none",
            where="--push-to-hub",
            fix="hf auth login, or set HF_TOKEN to a token that may write",
        )
    api = HfApi()
    with hub_errors(repository):
        api.whoami()
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError:
            return Destination(target, None)
    existing = tuple(sibling.rfilename for sibling in found.siblings or ())
    _check_existing(target, existing, private=bool(found.private))
    return Destination(target, existing)


def _check_existing(target: HubTarget, existing: Sequence[str], *, private: bool) -> None:
    """Refuse a repository that holds something else, or is seen by others than was asked for."""
    name = target.repository
    if private == target.public:
        is_now = "private" if private else "public"
        raise UploadError(
            f"expected the repository {name} to be {target.visibility}, and it is {is_now}",
            where="--push-to-hub",
            fix="leave out --public" if private else "--public, or another name",
        )
    if set(existing) <= {_GIT}:
        return
    if EXPORT not in existing:
        raise UploadError(
            f"the repository {name} holds something other than an export and is not replaced",
            where="--push-to-hub",
            fix="choose another name",
        )
    if not target.overwrite:
        raise UploadError(
            f"the repository {name} exists and holds an export",
            where="--push-to-hub",
            fix="--overwrite replaces it in a new commit; or choose another name",
        )


@contextmanager
def hub_errors(repository: str, more: Sequence[str] = ()) -> Iterator[None]:
    """Turn errors of huggingface_hub inside into ours, with what to do about each.

    Args:
        repository: OWNER/NAME.
        more: Further lines of the error.

    Raises:
        UploadError: The hub refused a request, or cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]

    where = "--push-to-hub"
    try:
        yield
    except HfHubHTTPError as error:
        what, fix = _refusal(error.response.status_code, repository)
        said = error.server_message or first_line(error)
        raise UploadError(what, where=where, fix=fix, more=(f"the hub said: {said}", *more)) from (
            error
        )
    except OfflineModeIsEnabled:
        what = "the hub cannot be reached: HF_HUB_OFFLINE is set"
        raise UploadError(what, where=where, fix="unset HF_HUB_OFFLINE", more=more) from None
    except (ClientError, OSError) as error:
        what = f"the hub cannot be reached: {first_line(error)}"
        fix = "check the connection and HF_ENDPOINT"
        raise UploadError(what, where=where, fix=fix, more=more) from error
    except ValueError as error:  # huggingface_hub's words for an answer that it cannot use.
        what = f"the hub did not take the upload: {first_line(error)}"
        raise UploadError(what, where=where, more=more) from error


def _refusal(status: int, repository: str) -> tuple[str, str]:
    """Return what an HTTP status means here, and what to do."""
    if status == 401:
        return "the hub does not accept the token", "hf auth login, or set HF_TOKEN to a valid one"
    if status == 403:
        fix = "use a token that may write, and a name or organization that it belongs to"
        return f"the token may not write to {repository}", fix
    return f"the hub refused the upload to {repository} (HTTP {status})", "try again later"


def public_files(
    folder: Path, record: ExportRecord, card: str, base: str
) -> dict[str, bytes | Path]:
    """Return what is uploaded: the export's files, with paths of this machine taken out.

    Args:
        folder: The export's folder.
        record: Its export.json.
        card: README.md, as it is shown on the hub.
        base: The name of the base model without a path.

    Returns:
        Path in the repository -> content, or the file that holds it.
    """
    files: dict[str, bytes | Path] = {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    model = record.model.changed(name=base)
    files[EXPORT] = _json_bytes(record.without(*_PRIVATE_KEYS).changed(model=model).to_json())
    files["README.md"] = card.encode()
    if (folder / _PEFT_CONFIG).is_file():
        config = plain_json((folder / _PEFT_CONFIG).read_bytes())
        files[_PEFT_CONFIG] = _json_bytes(config | {"base_model_name_or_path": base})
    if (folder / SETTINGS).is_file():
        settings = plain_json((folder / SETTINGS).read_bytes())
        files[SETTINGS] = _json_bytes(settings | {"model": settings["model"] | {"name": base}})
    return files


def refuse_local_paths(files: Mapping[str, bytes | Path], paths: Sequence[Path]) -> None:
    """Refuse an upload that would show where files lie on this machine.

    Of tensor files, the headers are read.

    Args:
        files: See :func:`public_files`.
        paths: Folders and files of this machine, beside the home folder.

    Raises:
        UploadError: A file names one of them.
    """
    known = {str(form) for path in paths for form in (path, path.absolute(), path.resolve())}
    known = {path for path in known if len(Path(path).parts) > 2}  # More than /tmp, or a bare name.
    home = [str(Path.home())] if len(Path.home().parts) > 1 else []  # Not the root folder.
    for name, content in files.items():
        text = _readable(content, tensors=name.endswith(".safetensors"))
        forbidden = known if name in _VOCABULARIES else known.union(home)
        for path in sorted(forbidden):
            # JSON writes characters outside of ASCII as escapes.
            if path.encode() in text or json.dumps(path)[1:-1].encode() in text:
                raise UploadError(
                    f"expected a file without paths of this machine, and {name} holds {path}",
                    where="--push-to-hub",
                    fix="export from a copy of the run in another folder",
                )


def _readable(content: bytes | Path, *, tensors: bool) -> bytes:
    if isinstance(content, bytes):
        return content
    if not tensors:
        return content.read_bytes()
    with content.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def sizes(files: Mapping[str, bytes | Path]) -> dict[str, int]:
    """Return the bytes of every file."""
    return {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in files.items()
    }


def _json_bytes(content: object) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
