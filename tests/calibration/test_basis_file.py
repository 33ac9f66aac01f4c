"""basis.safetensors: a bitwise round trip, and refusal of what is damaged or another's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny_models import calibrated, classifier, one_thread, targets_of

from sparsegrad_cli.calibration.basis_file import (
    BasisFile,
    basis_digest,
    check_belongs,
    check_rank,
    read_basis,
    write_basis,
)
from sparsegrad_cli.errors import FileFormatError, UsageError
from sparsegrad_cli.models.digests import fingerprint
from sparsegrad_cli.models.targets import Target
from sparsegrad_cli.numerics.hosvd import truncated
from sparsegrad_cli.records.basis import BasisMetadata
from sparsegrad_cli.records.run import CalibrationSettings

PARTS = ("q_out", "q_in", "singular_out", "singular_in")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def made(
    basis_per: str = "layer", seed: int = 0, score: str = "spectral"
) -> tuple[BasisFile, list[Target], str]:
    model = classifier(seed=seed)
    targets = targets_of(model)
    found = calibrated(model, targets, steps=2, basis_per=basis_per, score=score)
    mark = fingerprint(model, targets)
    settings = CalibrationSettings(steps=2, batch_size=8, basis_per=basis_per, seed=0)
    digest = basis_digest(found.bases, found.scores)
    about = BasisMetadata(
        model="tiny-bert",
        fingerprint=mark,
        targets=found.keys,
        settings=settings,
        recipe_digest="abc123",
        digest=digest,
    )
    return BasisFile(found.bases, about, found.scores), targets, mark


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "basis.safetensors"
    write_basis(path, made()[0])
    return path


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118


@pytest.mark.parametrize("basis_per", ["layer", "kind"])
def test_round_trip_is_bitwise(tmp_path: Path, basis_per: str) -> None:
    basis, targets, mark = made(basis_per)
    path = tmp_path / "basis.safetensors"
    write_basis(path, basis)
    got = read_basis(path)
    written, read = (m.model_dump(exclude={"check"}) for m in (basis.metadata, got.metadata))
    assert read == written
    assert set(got.bases) == set(basis.bases)
    for key in basis.bases:
        for part in PARTS:
            assert torch.equal(getattr(got.bases[key], part), getattr(basis.bases[key], part))
    check_belongs(got, targets, mark)
    by_target = got.by_target()
    assert set(by_target) == {t.name for t in targets}
    if basis_per == "kind":
        assert by_target[targets[0].name] is by_target[targets[2].name]
    assert [p.name for p in tmp_path.iterdir()] == ["basis.safetensors"], "nothing else is left"


def test_a_kind_basis_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    write_basis(path, made("kind")[0])
    assert len(content(path)[0]) == 2 * len(PARTS)


def test_metadata_says_what_the_file_belongs_to(written: Path) -> None:
    _, metadata = content(written)
    assert metadata["format"] == "sparsegrad-basis-1"
    assert metadata["model"] == "tiny-bert"
    assert metadata["recipe_digest"] == "abc123"
    assert json.loads(metadata["settings"])["steps"] == 2
    assert len(json.loads(metadata["targets"])) == 6


def test_a_basis_of_other_weights_is_refused() -> None:
    basis, _, _ = made()
    other = classifier(seed=1)
    targets = targets_of(other)
    with pytest.raises(UsageError) as caught:
        check_belongs(basis, targets, fingerprint(other, targets), "my.yaml:9: calibration.basis")
    assert "other weights" in caught.value.what
    assert "tiny-bert" in caught.value.what
    assert caught.value.where == "my.yaml:9: calibration.basis"
    assert "sparsegrad calibrate" in str(caught.value.fix)


def test_a_basis_of_other_targets_is_refused_and_says_which() -> None:
    basis, targets, mark = made()
    fewer = targets[2:]
    with pytest.raises(UsageError) as caught:
        check_belongs(basis, fewer, mark)
    assert f"2 others (first: {targets[0].name})" in caught.value.what
    partial = dataclasses.replace(
        basis, metadata=basis.metadata.changed(targets={t.name: t.name for t in fewer})
    )
    with pytest.raises(UsageError) as caught:
        check_belongs(partial, targets, mark)
    assert f"2 targets have no basis in it (first: {targets[0].name})" in caught.value.what
    gpt2 = classifier("gpt2")
    with pytest.raises(UsageError) as caught:
        check_belongs(basis, targets_of(gpt2), mark)
    assert "6 targets have no basis" in caught.value.what and "6 others" in caught.value.what


def test_a_basis_of_other_shapes_is_refused_and_says_which() -> None:
    basis, _, mark = made()
    wider = targets_of(classifier(intermediate_size=56))
    with pytest.raises(UsageError) as caught:
        check_belongs(basis, wider, mark)
    assert wider[0].name in caught.value.what
    assert "40 x 16" in caught.value.what and "56 x 16" in caught.value.what


def assert_refused(path: Path, *texts: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        read_basis(path)
    assert caught.value.where == str(path)
    assert "sparsegrad calibrate" in str(caught.value.fix)
    assert all(text in caught.value.what for text in texts)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 200, 0.5, -1])
def test_a_truncated_file_is_refused(written: Path, keep: float) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    assert_refused(written)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere.safetensors", "cannot be read")
    assert_refused(tmp_path, "cannot be read")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "basis.safetensors"
    path.write_text("q_out: 1\n" * 100)
    assert_refused(path, "cannot be read")


@pytest.mark.parametrize("where", [0.5, 0.9, 0.999])
def test_a_flipped_bit_in_the_tensors_is_refused(written: Path, where: float) -> None:
    data = bytearray(written.read_bytes())
    data[int(where * len(data))] ^= 1
    written.write_bytes(data)
    assert_refused(written, "digest")


def test_every_flipped_bit_of_the_header_is_refused(written: Path) -> None:
    """Names, shapes and what the file belongs to: no traceback, and nothing goes unnoticed."""
    data = written.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(0, header, 11):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 7)
        written.write_bytes(damaged)
        assert_refused(written)


def rewrite(path: Path, change: Any) -> None:
    """Change a file as its writer would have: with a check that fits."""
    tensors, metadata = content(path)
    metadata.pop("check")
    change(tensors, metadata)
    text = json.dumps(metadata, sort_keys=True)
    metadata["check"] = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, metadata)


def test_changed_metadata_is_refused(written: Path) -> None:
    tensors, metadata = content(written)
    changed = metadata["settings"].replace('"steps": 2', '"steps": 3')
    assert changed != metadata["settings"]
    save_file(tensors, written, metadata | {"settings": changed})
    assert_refused(written, "metadata")


def test_another_format_is_refused(written: Path) -> None:
    rewrite(written, lambda t, m: m.update(format="sparsegrad-basis-99"))
    assert_refused(written, "not a basis file of this version")
    save_file({"weight": torch.zeros(2)}, written)
    assert_refused(written, "not a basis file of this version")


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_refused(written: Path, part: str) -> None:
    rewrite(written, lambda t, m: t.pop(next(k for k in t if k.startswith(part))))
    assert_refused(written, part)


@pytest.mark.parametrize(
    "key", ["model", "fingerprint", "targets", "settings", "recipe_digest", "digest"]
)
def test_missing_metadata_is_refused(written: Path, key: str) -> None:
    rewrite(written, lambda t, m: m.pop(key))
    assert_refused(written, key)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"x"', "7", '{"a": [1]}', '{"a": "b"}'])
def test_targets_that_are_no_map_of_keys_are_refused(written: Path, text: str) -> None:
    rewrite(written, lambda t, m: m.update(targets=text))
    assert_refused(written, "the basis file is")


def test_an_exchanged_tensor_is_refused(written: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        first, second = [k for k in tensors if k.startswith("q_in/")][0:3:2]
        tensors[first], tensors[second] = tensors[second], tensors[first]

    rewrite(written, swap)
    assert_refused(written, "digest")


def test_the_digest_depends_on_every_tensor_and_key() -> None:
    basis, _, _ = made("kind")
    first = basis_digest(basis.bases, {})
    assert basis_digest(dict(reversed(list(basis.bases.items()))), {}) == first
    renamed = {f"x{k}": b for k, b in basis.bases.items()}
    assert basis_digest(renamed, {}) != first
    for key, one in basis.bases.items():
        for part in PARTS:
            changed = getattr(one, part).clone()
            changed[(0,) * changed.dim()] += 1e-6
            bases = {**basis.bases, key: dataclasses.replace(one, **{part: changed})}
            assert basis_digest(bases, {}) != first


def test_too_few_directions_are_refused(tmp_path: Path) -> None:
    basis, _, _ = made("layer")
    cut = dataclasses.replace(basis, bases={k: truncated(b, 4) for k, b in basis.bases.items()})
    check_rank(basis, None)
    check_rank(cut, 4)
    with pytest.raises(UsageError, match="holds 4 directions of the output side, 5 are needed"):
        check_rank(cut, 5)
    with pytest.raises(UsageError, match="are needed"):
        check_rank(cut, None)


def test_scores_are_kept_and_covered_by_the_digest(tmp_path: Path) -> None:
    basis, targets, _ = made(score="square")
    path = tmp_path / "basis.safetensors"
    write_basis(path, basis)
    back = read_basis(path)
    assert set(back.scores) == {t.name for t in targets}
    for name, score in basis.scores.items():
        assert torch.equal(back.scores[name], score)
    name = targets[0].name
    rewrite(path, lambda t, m: t.update({f"score/{name}": t[f"score/{name}"] + 1}))
    assert_refused(path, "digest")


def test_a_share_of_energy_is_one_of_the_whole_spectrum() -> None:
    """A basis that holds some directions with their values alone cannot say what share they are."""
    whole, _, _ = made()
    check_rank(whole, 0.9)
    few = {key: truncated(basis, 8) for key, basis in whole.bases.items()}
    with pytest.raises(UsageError, match=r"has 8 of the \d+ singular values"):
        check_rank(dataclasses.replace(whole, bases=few), 0.9)
    spectra = {
        key: dataclasses.replace(whole.bases[key], q_out=basis.q_out[:, :1], q_in=basis.q_in[:, :1])
        for key, basis in few.items()
    }
    with pytest.raises(UsageError, match=r"holds 1 directions of the \w+ side, \d+ are needed"):
        check_rank(dataclasses.replace(whole, bases=spectra), 0.99)
