"""Check rows and fairness checks against worked examples."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.record_samples import study_of
from support.study_cells import cell, checks_of, rows_of, study_cells

from sparsegrad_cli.report.conclusions import check_lines, parity_table
from sparsegrad_cli.study.rows import paired_difference


def test_rows_equal_a_worked_example() -> None:
    cells = [cell("lora", 0, 0.5), cell("full", 0, 0.6), cell("lora", 1, 0.7), cell("full", 1, 0.9)]
    lora, full = rows_of(cells)
    assert lora["method"] == "lora" and lora["difference"] is None
    assert math.isclose(lora["score_mean"], 0.6)
    assert math.isclose(lora["score_std"], math.sqrt(0.02))
    half = 12.706204736174698 * math.sqrt(0.02) / math.sqrt(2)  # t(0.975, 1)
    assert lora["score_interval"] == pytest.approx([0.6 - half, 0.6 + half])
    assert lora["steps_per_s"] == 4.5 and lora["train_s"] == 30.0
    assert math.isclose(full["difference"]["mean"], 0.15)
    half = 12.706204736174698 * math.sqrt(0.005) / math.sqrt(2)
    assert full["difference"]["interval"] == pytest.approx([0.15 - half, 0.15 + half])
    assert full["difference"]["against"] == "lora" and full["difference"]["n"] == 2
    assert "+2 parameters" in lora["note"]


def test_counts_equal_a_worked_example() -> None:
    (row,) = rows_of([cell("full", 0, 0.5), cell("full", 1, 0.5)])
    assert (row["trainable"], row["trainable_targets"]) == (12, 10)
    assert (row["touched"], row["touched_targets"]) == (32.5, 30.5)  # means of 32 and 33
    assert row["peak_bytes"] == 150 and row["beyond_weights_bytes"] == 50
    assert row["memory_categories"]["saved_activations"] == 15  # of backward, the highest phase
    assert row["saved_activation_bytes"] == 25  # the most of any phase: forward's
    assert row["optimizer_state_bytes"] == 8 and row["adapter_bytes"] == 5
    assert row["calibrate_s"] == 0.0 and row["peak_charged_bytes"] == 150


def test_calibration_is_charged_in_full_and_per_use() -> None:
    def made(digest: str, seconds: float, tokens: int) -> dict[str, Any]:
        return {"digest": digest, "seconds": seconds, "tokens": tokens, "peak_bytes": 400}

    cells = [
        cell("a-1e-3", 0, 0.5, calibration=made("x", 6.0, 100)),
        cell("a-2e-3", 0, 0.6, calibration=made("x", 8.0, 100)),
        cell("b", 0, 0.6, calibration=made("y", 9.0, 50)),
        cell("b", 1, 0.6, calibration=made("z", 5.0, 70)),
        cell("a-4e-3", 0, 0.0, calibration=made("x", 1.0, 1), status="failed"),
        cell("lora", 0, 0.5),
    ]
    first, second, other, failed, lora = rows_of(cells)
    assert (first["calibrate_s"], first["basis_uses"], first["calibrate_s_per_use"]) == (6.0, 2, 3)
    assert (second["calibrate_s"], second["calibrate_s_per_use"]) == (8.0, 4.0)
    assert (other["calibrate_s"], other["calibrate_tokens"], other["basis_uses"]) == (7.0, 60, 1)
    assert other["calibrate_s_per_use"] == 7.0
    assert failed["calibrate_s"] is None and failed["peak_charged_bytes"] is None
    assert first["peak_bytes"] == 150
    assert first["calibrate_peak_bytes"] == first["peak_charged_bytes"] == 400
    assert lora["calibrate_peak_bytes"] == 0 and lora["peak_charged_bytes"] == 150


def test_failed_and_missing_runs_in_a_row() -> None:
    error = {"title": "x", "what": "memory ran out: 9 GiB\nmore", "where": None, "fix": None}
    cells = [
        cell("full", 0, 0.5, status="out_of_memory", error=error, run=None),
        cell("lora", 0, 0.5),
        cell("lora", 1, 0.5, status="pending", run=None),
    ]
    full, lora = rows_of(cells)
    assert full["status"] == "out_of_memory" and full["score_mean"] is None
    assert full["note"] == "memory ran out: 9 GiB"
    assert lora["status"] == "pending" and lora["seeds_done"] == 1 and lora["score_std"] is None
    assert lora["score_interval"] is None


def test_differences_of_few_seeds() -> None:
    assert paired_difference({1: 0.5}, {2: 0.5}, "x") is None
    single = paired_difference({1: 0.6}, {1: 0.5}, "x")
    assert single is not None and single.interval is None and single.n == 1


def test_rows_with_other_target_modules_may_have_the_same_model() -> None:
    cells = [cell("a", 0, 0.5), cell("a", 0, 0.5)]
    cells[1]["run"]["model"]["fingerprint"] = "of other targets"
    assert checks_of(cells)[0]["same_model"] is False  # records of older versions
    for each in cells:
        each["run"]["hashes"]["body"] = "b"
    assert checks_of(cells)[0]["same_model"] is True
    cells[1]["run"]["hashes"]["body"] = "c"
    assert checks_of(cells)[0]["same_model"] is False


def test_rows_of_other_heads_may_have_the_same_precision() -> None:
    cells = [cell("a", 0, 0.5), cell("a", 0, 0.5)]
    for each, count in zip(cells, (770, 1155), strict=True):
        each["run"]["hashes"]["precision"] = f"digest of {count}"
        each["run"]["precision"] = {"weights": {"float32": count}, "matmul": "highest"}
    assert checks_of(cells)[0]["same_precision"] is True
    cells[1]["run"]["precision"]["matmul"] = "medium"
    assert checks_of(cells)[0]["same_precision"] is False


def test_checks_compare_at_the_last_common_step() -> None:
    same = checks_of([cell("a", 0, 0.5), cell("a", 0, 0.5)])
    assert same[0]["same_order"] is True and same[0]["steps_compared"] == 20
    differ = checks_of([cell("a", 0, 0.5), cell("b", 0, 0.5)])
    assert differ[0]["same_order"] is False and differ[0]["same_head_init"] is True
    one = checks_of([cell("a", 0, 0.5)])
    assert one[0]["same_order"] is None


@pytest.mark.parametrize(
    ("keys", "check", "word"),
    [
        (("hashes", "data"), "same_data", "data"),
        (("hashes", "head_init"), "same_head_init", "head"),
        (("hashes", "precision"), "same_precision", "precision"),
        (("model", "fingerprint"), "same_model", "model"),
    ],
)
def test_a_different_hash_fails_a_check_and_a_missing_one_leaves_it_unknown(
    keys: tuple[str, str], check: str, word: str
) -> None:
    cells = [cell("a", 0, 0.5), cell("a", 0, 0.5), cell("a", 0, 0.5)]
    (fair,) = checks_of(cells)
    assert fair[check] is True
    lines = check_lines(study_of({"checks": [fair], "parity": {"compared": 48}}))
    assert [held for held, _ in lines] == [True, True]
    cells[1]["run"][keys[0]][keys[1]] = "other"
    (broken,) = checks_of(cells)
    assert broken[check] is False
    lines = check_lines(study_of({"checks": [broken]}))
    assert (False, f"t, seed 0: methods did NOT have the same {word}.") in lines
    del cells[1]["run"][keys[0]][keys[1]]
    (unknown,) = checks_of(cells)
    assert unknown[check] is None
    pair = "1 of 1 pairs of task and seed"
    assert (None, f"{pair}: same {word}: not recorded.") in check_lines(
        study_of({"checks": [unknown]})
    )


def test_runs_of_two_code_versions_are_reported() -> None:
    cells = [cell("a", 0, 0.5), cell("a", 0, 0.5)]
    cells[1]["run"]["git"]["commit"] = "later"
    (check,) = checks_of(cells)
    assert check["same_code"] is False
    assert any(
        "not all runs used the same code" in line.lower()
        for _, line in check_lines(study_of({"checks": [check]}))
    )


def test_a_flagged_difference_is_in_text_and_table() -> None:
    values = {"full": 0.0, "lora": 0.1}
    found = {"task": "t", "key": "train.weight_decay", "values": values}
    rates = {"task": "t", "key": "train.learning_rate", "values": {"full": 1e-4, "lora": 2e-3}}
    compare = {"parity": {"compared": 48, "flagged": [found], "declared": [rates]}, "tasks": ["t"]}
    said = "t: methods differ in train.weight_decay (full 0.0, lora 0.1), which the study allows."
    assert (False, said) in check_lines(study_of(compare))
    table = parity_table(study_of(compare))
    assert table is not None
    assert list(table.rows) == [
        ("train.weight_decay", "t", "allowed by the study", "full 0.0, lora 0.1"),
        ("train.learning_rate", "t", "tuned by method", "full 0.0001, lora 0.002"),
    ]


def test_a_record_with_a_done_cell_without_run_can_be_read() -> None:
    cells = study_cells({"t": {"a": [0.5, 0.6], "b": [0.7, 0.8]}})
    cells[0]["run"] = None
    assert [row["seeds_done"] for row in rows_of(cells)] == [1, 2]
    assert [check["methods"] for check in checks_of(cells)] == [1, 2]
