"""Wrong calls of the Python API: each raises one sentence that says what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_models import batch, classifier
from torch import nn
from torch.nn import functional as F

import sparsegrad_cli as sg
from sparsegrad_cli.errors import UsageError


class Net(nn.Module):
    """Two linear layers, 12 to 24 to 3."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


PAIRS = [(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]


def net() -> Net:
    """Return a net with the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def calibrated(**settings: Any) -> Any:
    return sg.calibrate(
        net(), PAIRS, **{"loss": F.cross_entropy, "target_modules": ["up", "down"], **settings}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "calibrate: steps: 0 should be greater than or equal to 1$"),
        ({"source": "tokens"}, "calibrate: source: 'tokens' is not one of"),
        ({"rank": 4, "density": 0.1}, "density only chooses the rank: give one of the two"),
        ({"rank": 0}, "rank is 0: expected a whole number from 1 to 24"),
        ({"rank": -1}, "rank is -1: expected a whole number from 1 to 24"),
        ({"rank": 9999}, "rank is 9999: expected a whole number from 1 to 24"),
        ({"rank": 8.5}, "rank is 8.5: expected a whole number"),
        ({"density": 2}, "density is 2: expected a number above 0 and up to 1"),
        ({"density": "0.1"}, "density is '0.1': expected a number"),
        ({"loss": "mse"}, "loss is of type str: expected a function"),
        ({"loss": lambda out, y: F.cross_entropy(out, y, reduction="none")}, "got shape "),
        ({"loss": lambda out, y: 1.0}, "got float"),
    ],
)
def test_calibrate_refuses_arguments_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        calibrated(**settings)
    assert "pydantic" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PAIRS, Net()), "model is of type list: expected a torch.nn.Module as the first"),
        (("bert-base-uncased", PAIRS), "model is of type str"),
        ((Net(), "train.csv"), "batches is of type str: expected an iterable of batches"),
        ((Net(), {"input_ids": torch.zeros(1)}), "batches is of type dict"),
        ((Net(), None), "batches is of type NoneType"),
    ],
)
def test_calibrate_refuses_arguments_of_another_type(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sg.calibrate(*arguments, target_modules=["up"])


def test_calibrate_says_that_batches_lack_labels() -> None:
    unlabelled = {name: value for name, value in batch().items() if name != "labels"}
    for warmup in (0, 50):
        with pytest.raises(ValueError, match="and no loss: batches need labels, or pass pairs"):
            sg.calibrate(classifier("bert"), [unlabelled], warmup_steps=warmup)
    with pytest.raises(ValueError, match="returned Tensor and no loss"):
        sg.calibrate(Net(), [{"x": PAIRS[0][0]}], target_modules=["up"])


def test_a_rank_between_the_sides_keeps_all_directions_of_the_narrow_side() -> None:
    basis = calibrated(rank=20).by_target()["up"]
    assert basis.q_out.shape == (24, 20) and basis.q_in.shape == (12, 12)


@pytest.mark.parametrize("rank", [1, 8])
def test_a_core_that_is_too_small_for_the_density_is_reported(rank: int) -> None:
    basis = calibrated(rank=24)
    asked = round(0.5 * 12 * 24) + round(0.5 * 24 * 3)
    trained = rank * rank + (rank * 3 if rank > 3 else rank * rank)
    message = f"asks for {asked} parameters in 2 target modules, but cores of rank {rank} train "
    with pytest.warns(UserWarning, match=f"{message}{trained}: raise rank, or lower density"):
        tuned = get_peft_model(Net(), sg.peft.SparseGradConfig(basis=basis, rank=rank, density=0.5))
    assert trained == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def test_a_rank_above_all_sides_takes_all_directions() -> None:
    tuned = get_peft_model(Net(), sg.peft.SparseGradConfig(basis=calibrated(rank=24), rank=9999))
    assert tuned.peft_config["default"].layers == {"up": [24, 12, 3], "down": [3, 24, 1]}
    with pytest.raises(ValueError, match="needs 24: calibrate with rank=24"):
        get_peft_model(Net(), sg.peft.SparseGradConfig(basis=calibrated(rank=8), rank=9999))


def test_a_core_that_holds_the_density_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(net(), sg.peft.SparseGradConfig(basis=calibrated(), density=0.01))


def test_a_dense_core_is_sized_by_rank_or_by_density(tmp_path: Path) -> None:
    basis = calibrated(rank=24)
    with pytest.raises(ValueError, match="give rank or density, not both"):
        sg.peft.SparseGradConfig(basis=basis, support="dense", density=0.5, rank=8)
    config = sg.peft.SparseGradConfig(basis=basis, support="dense", rank=2)
    tuned = get_peft_model(Net(), config)
    assert config.density is None and config.layers == {"up": [2, 2, 4], "down": [2, 2, 4]}
    tuned.save_pretrained(tmp_path)
    for density in (None, 0.01):  # 0.01 is what earlier versions saved
        edit(tmp_path, density=density)
        again = PeftModel.from_pretrained(Net(), tmp_path)
        assert again.peft_config["default"].layers == config.layers


def edit(folder: Path, **changes: Any) -> None:
    """Change a saved configuration as a user does in an editor."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("basis", ["basis.safetensors", {}])
def test_a_basis_of_another_type_is_refused(basis: Any) -> None:
    with pytest.raises(ValueError, match=r"basis is of type .*load_basis\(path\)"):
        sg.peft.SparseGradConfig(basis=basis)


@pytest.mark.parametrize(
    "modules",
    [{"target_modules": ["xyz"]}, {"target_modules": "xyz"}, {"exclude_modules": ["up", "down"]}],
)
def test_modules_that_match_nothing_are_refused(modules: Any) -> None:
    config = sg.peft.SparseGradConfig(basis=calibrated(), **modules)
    with pytest.raises(ValueError, match=r"leaves no linear layer .* basis covers up, down$"):
        get_peft_model(Net(), config)


def test_a_wrong_regular_expression_names_the_argument() -> None:
    with pytest.raises(
        ValueError, match=r"target_modules is '\(up': expected a regular expression"
    ):
        sg.peft.SparseGradConfig(target_modules="(up")
    with pytest.raises(ValueError, match=r"exclude_modules is '\(up': expected a regular"):
        sg.peft.SparseGradConfig(exclude_modules="(up")
    with pytest.raises(UsageError, match=r"'\(up' is not a regular expression"):
        calibrated(target_modules="(up")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": "0.01"}, "density is '0.01': expected a number"),
        ({"density": 0}, "density is 0: expected a number above 0 and up to 1"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": True}, "density is True"),
        ({"rank": "8"}, "rank is '8': expected a whole number of at least 1"),
        ({"rank": 8.5}, "rank is 8.5: expected a whole number"),
        ({"rank": 0}, "rank is 0: expected at least 1"),
        ({"support": None}, "support is None: expected one of"),
        ({"support": "refresh", "refresh_steps": "5"}, "refresh_steps is '5'"),
        ({"support": "dynamic", "state_capacity": "2"}, "state_capacity is '2'"),
        ({"target_modules": 5}, "target_modules is 5: expected a list of names"),
        ({"layers": []}, r"layers is \[\]: expected a mapping"),
    ],
)
def test_arguments_of_another_type_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"SparseGradConfig: {message}"):
        sg.peft.SparseGradConfig(**settings)
    sg.peft.SparseGradConfig().save_pretrained(tmp_path)
    edit(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"SparseGradConfig: {message}"):
        sg.peft.SparseGradConfig.from_pretrained(tmp_path)


def test_a_density_of_none_is_the_default() -> None:
    assert sg.peft.SparseGradConfig(density=None).density == 0.01


def test_the_optimizer_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match="got one without: wrap it with"):
        sg.peft.optimizer(Net())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static adapter of two modules that share their bases with two others."""
    folder = tmp_path_factory.mktemp("saved")
    model = classifier("bert")
    basis = sg.calibrate(model, [batch()], density=0.05, basis_per="kind", warmup_steps=0)
    config = sg.peft.SparseGradConfig(basis=basis, density=0.05, rank=10)
    assert len(config.shared_bases) == 0
    get_peft_model(model, config).save_pretrained(folder)
    assert config.shared_bases
    return folder


def sizes_of(folder: Path, change: Any) -> dict[str, list[int]]:
    layers = json.loads((folder / "adapter_config.json").read_text())["layers"]
    return {name: change(*sizes) for name, sizes in layers.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda at: {"shared_bases": {"x.y": "x.z"}}, "shared_bases: x.y takes the bases of 'x.z'"),
        (lambda at: {"shared_bases": {}}, "no bases, and shared_bases does not say"),
        (lambda at: {"support": "dynamic"}, r"values of the shape \(\d+,\), expected \(10, 10\)"),
        (lambda at: {"support": "dense"}, "does not fit support 'dense'"),
        (lambda at: {"layers": sizes_of(at, lambda r, c, n: [r, c])}, r"expected \[r_out, r_in"),
        (lambda at: {"layers": sizes_of(at, lambda r, c, n: [r, c, r * c + 1])}, "does not fit"),
        (lambda at: {"layers": sizes_of(at, lambda r, c, n: [r, c, n - 1])}, "values of the shape"),
        (lambda at: {"layers": sizes_of(at, lambda r, c, n: [12, 12, n])}, "expected 12 x 12"),
    ],
)
def test_an_edited_configuration_that_does_not_fit_its_file_is_refused(
    changes: Any, message: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "edited")
    PeftModel.from_pretrained(classifier("bert"), folder)  # it loads as it was saved
    edit(folder, **changes(folder))
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(classifier("bert"), folder)


@pytest.mark.parametrize("support", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0: expected a number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "x"}, "lr is 'x'"),
        ({"head_lr": -1}, "head_lr is -1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"eps": -1}, "eps is -1"),
        ({"betas": (1.2, 0.9)}, "betas is .*: expected two numbers from 0 to below 1"),
        ({"betas": 0.9}, "betas is 0.9"),
    ],
)
def test_numbers_of_the_optimizer_are_checked(support: Any, arguments: Any, message: str) -> None:
    model = get_peft_model(Net(), sg.peft.SparseGradConfig(basis=calibrated(), support=support))
    with pytest.raises(ValueError, match=message):
        sg.peft.optimizer(model, **arguments)


def test_a_basis_of_other_weights_or_layers_is_reported() -> None:
    basis = calibrated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(net(), sg.peft.SparseGradConfig(basis=basis))
    with pytest.warns(UserWarning, match="a model with other weights or layers"):
        get_peft_model(Net(), sg.peft.SparseGradConfig(basis=basis))
    fewer = nn.Module()
    fewer.up = nn.Linear(12, 24)
    with pytest.warns(UserWarning, match="a model with other weights or layers"):
        get_peft_model(fewer, sg.peft.SparseGradConfig(basis=basis, target_modules=["up"]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calibrate_needs_gradients(context: Any) -> None:
    with context(), pytest.raises(ValueError, match=r"outside torch\.no_grad"):
        calibrated()


def test_a_basis_is_shown_in_one_line() -> None:
    assert repr(calibrated()) == "<BasisFile of Net: 2 bases of rank 3 to 8 for 2 modules>"


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(net(), sg.peft.SparseGradConfig(basis=calibrated()))
    model.save_pretrained(tmp_path)
    shallow = nn.Module()
    shallow.up = nn.Linear(12, 24)
    with pytest.raises(ValueError, match="cores for 1 modules that are not in the model"):
        PeftModel.from_pretrained(shallow, tmp_path)


def test_all_linear_says_what_to_do_instead() -> None:
    with pytest.raises(ValueError, match="leave it out to adapt all modules that the basis covers"):
        sg.peft.SparseGradConfig(basis=calibrated(), target_modules="all-linear")
