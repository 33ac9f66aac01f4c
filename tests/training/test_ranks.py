"""Two processes give the update of one: every labelled token has the same weight."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_paths import adapter_path
from support.chat_models import chat_model_folder
from support.tiny_models import one_thread
from support.warm_python import run_two_ranks
from torch import Tensor

from sparsegrad_cli.data.order import EpochSampler
from sparsegrad_cli.errors import UsageError
from sparsegrad_cli.recipe.load_recipe import load_recipe
from sparsegrad_cli.tasks.objective import Classification, LanguageModelling
from sparsegrad_cli.tasks.task import load_chat_task
from sparsegrad_cli.training.train import train as train_recipe

METHODS = {
    "full": ("method=full",),
    "lora": ("method=lora", "method.dropout=0"),
    "meprop": ("method=meprop", "method.density=0.05"),
    # On a mixture, which calibration and both processes draw from.
    "core": (
        "method.rank=8",
        "method.support=static",
        "method.density=0.02",
        "task.path=null",
        "task.mix=[d.jsonl, {path: e.jsonl, weight: 2}]",
    ),
}
# Only with two processes: the run stays that of one process without sample prompts.
SAMPLES = {"lora": ("train.sample_prompts=['Who?']", "train.sample_max_new_tokens=5")}
STEPS, BATCH, RATE = 2, 8, 0.5
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
TRACKED = {"lora": ("train.report_to=tensorboard",)} if HAS_TENSORBOARD else {}
SETTINGS = (
    "task={name: chat, path: d.jsonl, max_length: 96, eval_limit: 2}",
    "model=base",
    f"train.max_steps={STEPS}",
    "train.eval_strategy=no",
    "train.save_strategy=no",
    "train.logging_steps=1",
    # Far above every gradient: steps are in proportion to gradients, and hide no factor.
    "train.adam_epsilon=1",
    f"train.learning_rate={RATE}",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.use_cpu=true",
    "calibration.steps=4",
    "calibration.batch_size=2",
)


def cut(size: int, micro_batches: int) -> tuple[str, ...]:
    return (
        f"train.per_device_train_batch_size={size}",
        f"train.gradient_accumulation_steps={micro_batches}",
    )


def trained(name: str, folder: str, *more: str) -> dict[str, Any]:
    """Return run.json of a run in the working folder, made by the command."""
    settings = (*SETTINGS, *METHODS[name], *more, f"output_dir={folder}")
    return train_recipe(load_recipe(None, settings)).to_json()


def place(folder: Path) -> Path:
    """Make a model and forty conversations with answers of one or of thirty words."""
    chat_model_folder(folder / "base", positions=128)
    rows = [
        {"prompt": f"{n}. Who?", "completion": "yes " * 17 if n % 5 == 0 else "no" * (1 + n % 3)}
        for n in range(40)
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-2]))
    return folder


def one_of_two(rank: int, folder: str) -> None:
    """Start what `torchrun --nproc-per-node 2` starts: the same command twice, for each method."""
    said = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in said.items()}, HF_HUB_OFFLINE="1")
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    sent = counted_sums()
    for name in METHODS:
        sent.clear()
        more = (*SAMPLES.get(name, ()), *TRACKED.get(name, ()))
        record = trained(name, f"two-{name}", *cut(1, BATCH // 2), *more)
        losses = [entry["loss"] for entry in record["metrics"]["train"]]
        found[name] = {
            "basis": (record.get("calibration") or {}).get("digest"),
            "losses": losses,
            "score": record["metrics"]["final"]["score"],
            "sent": sum(sent) / STEPS,
        }
    try:
        trained("full", "two-full")
    except UsageError:
        found["occupied"] = "refused"
    except SystemExit as ended:
        found["occupied"] = ended.code
    Path(f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # The interpreter's own exit races with gloo's threads; all that is read is on disk by now.
    os._exit(0)


def counted_sums() -> list[int]:
    """Return a list that grows by the bytes of every bucket that DDP sums, seen by its own hook."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    sent: list[int] = []
    plain = DistributedDataParallel.__init__

    def count(state: object, bucket: Any) -> Any:
        sent.append(bucket.buffer().nbytes)
        group = torch.distributed.group.WORLD
        assert group is not None
        return allreduce_hook(group, bucket)

    count.__annotations__.clear()  # torch compares them with types, and these are strings here

    def hooked(self: Any, *args: Any, **more: Any) -> None:
        plain(self, *args, **more)
        self.register_comm_hook(None, count)

    DistributedDataParallel.__init__ = hooked  # type: ignore[method-assign]
    return sent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, warm_client: str) -> Path:
    """Return a folder in which two processes have trained each method, in ``two-<method>``."""
    folder = place(tmp_path_factory.mktemp("two"))
    run_two_ranks(warm_client, one_of_two, folder)
    return folder


@pytest.fixture
def alone(two: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``alone("lora", "run")``: by this process, in the same folder."""
    monkeypatch.chdir(two)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str, folder: str, *more: str) -> dict[str, Any]:
        with one_thread():
            return trained(name, folder, *more)

    return run


def change(run: Path) -> Tensor:
    """Return all that training changed as one vector, which does not depend on the basis."""
    tensors = load_file(adapter_path(run))
    before = load_file(run.parent / "base" / "model.safetensors")
    parts = []
    for name, tensor in sorted(tensors.items()):
        target = name.removeprefix("values/").removesuffix(".values")
        if name.startswith("values/"):
            weight = before[f"{target}.weight"]
            positions = tensors[f"positions/{target}"].long()
            moved = torch.zeros(weight.numel())
            moved[positions] = tensor - weight.reshape(-1)[positions]
        elif name.endswith(".values"):
            moved = product(run, target, tensor, tensors[f"{target}.support"])
        elif name in before:
            moved = tensor - before[name]
        else:  # LoRA's; or positions, which are in what they belong to
            moved = tensor if tensor.is_floating_point() else torch.empty(0)
        parts.append(moved.reshape(-1))
    return torch.cat(parts)


def product(run: Path, target: str, values: Tensor, support: Tensor) -> Tensor:
    """Return Q_out S Q_in' of a target."""
    bases = load_file(run / "basis.safetensors")
    q_out, q_in = bases[f"q_out/{target}"], bases[f"q_in/{target}"]
    core = torch.zeros(q_out.shape[1] * q_in.shape[1])
    core[support.long()] = values
    found: Tensor = q_out @ core.view(q_out.shape[1], -1) @ q_in.T
    return found


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_update_of_one(
    two: Path,
    alone: Callable[..., dict[str, Any]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = alone(name, f"one-{name}", *cut(BATCH, 1))
    if name == "core":  # calibration is shared too, and finds what one process finds
        one, both = (load_file(two / f"{k}-core" / "basis.safetensors") for k in ("one", "two"))
        assert one.keys() == both.keys()
        for key in one:
            q, other = one[key].double(), both[key].double()
            if key.startswith("q_"):
                torch.testing.assert_close(other @ other.T, q @ q.T, rtol=1e-3, atol=1e-3)
    # The mean over micro-batches of their means, as it would be without the tokens of the step.
    monkeypatch.setattr(LanguageModelling, "by_token", False)
    monkeypatch.setattr(LanguageModelling, "items", Classification.items)  # Its rows.
    naive = alone(name, f"naive-{name}", *cut(1, BATCH))
    expected, found, mean = (change(two / f"{k}-{name}") for k in ("one", "two", "naive"))
    apart = (mean - expected).norm()
    assert apart > 0.05 * expected.norm()
    assert (found - expected).norm() < 1e-3 * apart
    losses = json.loads((two / "rank0.json").read_text())[name]["losses"]
    logged = [entry["loss"] for entry in record["metrics"]["train"]]
    assert losses == pytest.approx(logged, rel=1e-5)
    # The two means differ even before anything has been learnt.
    assert naive["metrics"]["train"][0]["loss"] != pytest.approx(logged[0], rel=1e-2)


def by_hand(folder: Path, *, by_token: bool) -> Tensor:
    """Return the change of full fine-tuning by transformers, row by row, and torch's AdamW."""
    from transformers import LlamaForCausalLM

    parts = load_chat_task(load_recipe(None, (*SETTINGS, *METHODS["full"])))
    sampler = EpochSampler(parts.train_data, seed=42, strategy="random")
    order = list(sampler)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    weights = {n: p for n, p in model.named_parameters() if ".mlp." in n}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, eps=1.0, weight_decay=0.0)
    for step in range(STEPS):
        rows = [parts.train_data[row] for row in order[step * BATCH : (step + 1) * BATCH]]
        counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
        assert len(set(counts)) > 2 and max(counts) > 5 * min(counts)
        optimizer.zero_grad()
        for row, count in zip(rows, counts, strict=True):
            ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
            share = count / sum(counts) if by_token else 1 / BATCH
            (model(input_ids=ids, labels=labels).loss * share).backward()
        optimizer.step()
    return torch.cat([(weights[n] - before[n]).detach().reshape(-1) for n in sorted(weights)])


def test_loss_is_the_mean_over_all_labelled_tokens_of_the_step(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two)
    with one_thread():
        expected, naive = by_hand(two, by_token=True), by_hand(two, by_token=False)
    found = change(two / "two-full")
    apart = (naive - expected).norm()
    assert apart > 0.05 * expected.norm()
    assert (found - expected).norm() < 1e-3 * apart


def test_rank_zero_writes_and_both_ranks_agree(two: Path) -> None:
    first, second = (json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("occupied") == "refused" and second.pop("occupied") == 2
    assert first == second
    assert first["core"]["basis"] is not None
    for name in METHODS:
        run = two / f"two-{name}"
        record = json.loads((run / "run.json").read_text())
        assert (record["status"], record["processes"]) == ("done", 2)
        lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
        assert [line["step"] for line in lines if "eval" in line] == [0, STEPS]
        assert (run / "report.html").is_file()
        answers = [len(line["eval"].get("samples", ())) for line in lines if "eval" in line]
        assert answers == ([1, 1] if name in SAMPLES else [0, 0])


def test_step_sends_only_the_gradients_of_trained_parameters(two: Path) -> None:
    """A static support sends its values: 2 % here, where MeProp sends all of the targets."""
    first = json.loads((two / "rank0.json").read_text())
    sent = {name: first[name]["sent"] for name in METHODS}
    for name in METHODS:
        record = json.loads((two / f"two-{name}" / "run.json").read_text())
        assert record["sizes"]["gradient_bytes_per_step"] == sent[name]
        if name != "meprop":
            assert sent[name] == 4 * record["counts"]["trainable"]
    assert sent["meprop"] == sent["full"]
    core = load_file(adapter_path(two / "two-core"))
    values = sum(tensor.nbytes for key, tensor in core.items() if key.endswith(".values"))
    assert 0 < sent["core"] == values < 0.03 * sent["full"]


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_two_processes_are_one_run_in_a_tracker(two: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (two / "two-lora" / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    losses = json.loads((two / "rank0.json").read_text())["lora"]["losses"]
    assert logged == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
