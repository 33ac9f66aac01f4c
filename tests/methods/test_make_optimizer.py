"""``train.optim``: the same optimizers as in Trainer, learning rates by group, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from support.cli_runs import Cli
from support.tiny_models import Tuned, snapshot
from transformers import Trainer, TrainingArguments

from sparsegrad_cli.errors import RecipeError
from sparsegrad_cli.methods.optimizer import make_optimizer, parameter_groups
from sparsegrad_cli.models.targets import head_parameters
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.recipe.optimizers import OPTIMIZERS
from sparsegrad_cli.recipe.schema import TrainSection
from sparsegrad_cli.run.checkpoint_state import LoopState, Progress
from sparsegrad_cli.training import checkpoint
from sparsegrad_cli.training.schedule import StepPlan, make_scheduler

ARGUMENTS = {
    "sgd": "momentum=0.9,nesterov=true",
    "adagrad": "lr_decay=0.01",
    "rmsprop": "momentum=0.5, alpha=0.9, centered=true",
}


def section(optim: str, **more: Any) -> TrainSection:
    more = {"learning_rate": 3e-3, "weight_decay": 0.1, "optim_args": ARGUMENTS.get(optim), **more}
    return TrainSection.model_validate({"optim": optim, **more})


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizer_is_the_one_that_trainer_makes(optim: str, tmp_path: Path) -> None:
    """Class, arguments and decay as ``Trainer`` has them for the same arguments."""
    train = section(optim, adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-6)
    arguments = TrainingArguments(
        str(tmp_path),
        optim=optim,
        optim_args=train.optim_args and train.optim_args.replace(" ", ""),
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        use_cpu=True,
        report_to="none",
    )
    tuned = Tuned("full")
    expected = Trainer(tuned.model, arguments).create_optimizer()
    made = make_optimizer(tuned.model, train)
    assert type(made) is type(expected)
    for ours, theirs in zip(made.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert {k: v for k, v in ours.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
    if OPTIMIZERS[optim].of_bitsandbytes:
        assert vars(made.args) == vars(expected.args)  # type: ignore[attr-defined]


def test_head_and_b_have_their_own_rates() -> None:
    """LoRA+: the rate of B is the ratio times that of A, as peft's own function groups them."""
    train = section("sgd", optim_args=None, head_learning_rate=0.5, lora_plus_ratio=16.0)
    tuned = Tuned("lora")
    groups = parameter_groups(tuned.model, train)
    names = {id(p): name for name, p in tuned.model.named_parameters()}
    head = {id(p) for p in head_parameters(tuned.model).values()}
    rates: dict[int, float] = {}
    for group in groups:
        assert group["params"]
        rates |= {id(p): group.get("lr", train.learning_rate) for p in group["params"]}
    assert {names[p] for p, rate in rates.items() if rate == 0.5} == {names[p] for p in head}
    rest = {p: rate for p, rate in rates.items() if p not in head}
    theirs = create_loraplus_optimizer(
        tuned.model,
        torch.optim.SGD,
        lr=train.learning_rate,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
    )
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert rest == {p: pytest.approx(expected[p]) for p in rest}
    assert groups[0].get("lr") is None  # The rate that is logged is that of the first group.


def test_three_steps_follow_the_formula() -> None:
    """SGD with momentum: v <- m v + g + decay * p, p <- p - rate * v, by group."""
    train = section("sgd", optim_args="momentum=0.9", head_learning_rate=0.05, lora_plus_ratio=4.0)
    tuned = Tuned("lora", train=train)
    expected = {n: p.double() for n, p in snapshot(tuned.model).items()}
    velocity = {name: torch.zeros_like(value) for name, value in expected.items()}
    head = set(head_parameters(tuned.model))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in tuned.model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            rate = 0.05 if name in head else 3e-3 * (4 if "lora_B" in name else 1)
            decay = 0.0 if name.endswith("bias") else 0.1
            velocity[name] = 0.9 * velocity[name] + gradient + decay * expected[name]
            expected[name] = expected[name] - rate * velocity[name]
        tuned.optimizer.step()
    for name, parameter in tuned.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resume_is_bitwise(optim: str, tmp_path: Path) -> None:
    """Three steps, a checkpoint, three more; and the same from the checkpoint in a new model."""
    train = section(optim, learning_rate=1e-2, head_learning_rate=2e-2, max_steps=6)
    plan = StepPlan(train, 6)
    # Large enough for state of 8 bits, which bitsandbytes uses from 4,096 parameters on.
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 160}
    whole, again = (Tuned("full", train=train, **sizes) for _ in range(2))
    schedule = make_scheduler(whole.optimizer, plan)
    for step in range(3):
        whole.steps(1, start=step)
        schedule.step()
    weights = {n: p.detach().clone() for n, p in whole.model.named_parameters() if p.requires_grad}
    state = LoopState(progress=Progress(step=3, max_steps=6))
    checkpoint.write_checkpoint(
        tmp_path,
        state,
        weights,
        checkpoint.whole_state(whole.optimizer),
        schedule,
        [checkpoint.random_state()],
    )
    resumed = make_scheduler(again.optimizer, plan)
    checkpoint.load_weights(tmp_path, again.model, again.method)
    checkpoint.load_optimizer(tmp_path, again.optimizer, resumed)
    for tuned, scheduler in ((whole, schedule), (again, resumed)):
        for step in range(3, 6):
            tuned.steps(1, start=step)
            scheduler.step()
    before = Tuned("full", **sizes).model
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
        changed = not torch.equal(parameter, before.get_parameter(name))
        assert changed == parameter.requires_grad, name
    if OPTIMIZERS[optim].bits == 8:
        kept = load_file(tmp_path / "optimizer.safetensors")
        assert any(tensor.dtype == torch.uint8 for tensor in kept.values())
    ours, theirs = (checkpoint.whole_state(t.optimizer) for t in (whole, again))
    assert json.dumps(ours["param_groups"]) == json.dumps(theirs["param_groups"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("train.optim=adam",), "'adam' is not an optimizer"),
        (("train.optim=adam_torch",), "did you mean adamw_torch?"),
        (("train.optim=galore_adamw",), "use method galore with optim adamw_torch"),
        (("train.optim=lomo",), "needs the package lomo-optim, which sparsegrad does not support"),
        (("train.optim=7",), "expected the name of an optimizer, got 7"),
        (("train.optim_args=momentum=0.9",), "adamw_torch takes no arguments here; sgd, adagrad"),
        (("train.optim=sgd", "train.optim_args=alpha=1"), "sgd takes momentum, dampening, nest"),
        (("train.optim=sgd", "train.optim_args=momentum=x"), "expected a number from 0 to below 1"),
        (("train.optim=sgd", "train.optim_args=nesterov=2"), "expected true or false, got '2'"),
        (("train.optim=sgd", "train.optim_args=nesterov=true"), "nesterov needs a momentum"),
        (
            ("train.optim=sgd", "train.optim_args='nesterov=true,momentum=0.9,dampening=0.1'"),
            "nesterov needs a momentum and dampening 0",
        ),
        (("train.optim=sgd", "train.optim_args='momentum=0.9,momentum=0.1'"), "momentum is there"),
        (("train.optim=sgd", "train.optim_args=momentum=1"), "from 0 to below 1, got '1'"),
        (("train.optim=rmsprop", "train.optim_args=alpha=2"), "from 0 to below 1, got '2'"),
        (("train.optim=adagrad", "train.optim_args=eps=0"), "expected a number above 0, got '0'"),
        (("train.optim=sgd", "train.optim_args=nan"), "sgd takes momentum, dampening, nesterov"),
        (("train.optim=null",), "expected the name of an optimizer, got null"),
        (("train.optim=sgd", "train.adam_beta1=0.8"), "optim sgd does not use it"),
        (("train.optim=lion_8bit", "train.adam_epsilon=1e-6"), "optim lion_8bit does not use it"),
        (("method=meprop", "train.optim=sgd"), "meprop steps the parameters that it chooses by an"),
        (
            ("method.support=dynamic", "train.optim=adafactor"),
            "support dynamic chooses parameters by an AdamW of its own",
        ),
        (
            ("task=builtin:dialogues", "train.head_learning_rate=1e-2"),
            "a language model has no task head of its own",
        ),
    ],
)
def test_bad_settings_are_refused(settings: tuple[str, ...], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, settings)
    (problem,) = caught.value.problems
    assert expected in problem.what
    assert problem.key


def test_ratio_is_part_of_the_methods_that_have_a_and_b(cli: Cli) -> None:
    """Methods without it may stand beside; where it has no effect at all, a note says so."""
    alone = load_recipe(None, ("method=full", "train.lora_plus_ratio=16"))
    assert alone.recipe.train.lora_plus_ratio is None
    assert any("full does not train the factors A and B of LoRA" in note for note in alone.notes)
    command = ("compare", "--match", "none", "--dry-run", "--json", "train.lora_plus_ratio=8")
    ended = cli(*command, "--methods", "lora,sparsegrad")
    rows = json.loads(ended.out)["rows"]
    assert [row["recipe"]["train"]["lora_plus_ratio"] for row in rows] == [8.0, None]
    assert "note" not in ended.err
    nowhere = cli(*command, "--methods", "full,sparsegrad")
    assert "note: train.lora_plus_ratio (command line) has no effect" in nowhere.flat
