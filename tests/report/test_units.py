"""Numbers in the format of reports."""

from __future__ import annotations

import pytest

from sparsegrad_cli.report import units


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (None, "not recorded"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1024**2 * 1.25, "1.2 MiB"),
        (1024**3 * 5, "5.0 GiB"),
    ],
)
def test_format_bytes_chooses_the_unit(count: float | None, words: str) -> None:
    assert units.format_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.0123, "12.3 ms"),
        (0.25, "0.25 s"),
        (9.96, "10 s"),
        (59.7, "1 min"),
        (72, "1 min 12 s"),
        (3599.6, "1 h"),
        (3600 * 25, "1 d 1 h"),
    ],
)
def test_format_seconds_chooses_the_unit(seconds: float, words: str) -> None:
    assert units.format_seconds(seconds) == words


def test_format_of_scores_shares_and_p_values() -> None:
    assert units.format_score(0.6123) == "61.2"
    assert units.format_score(-0.0004) == "0.0"
    assert units.format_score(1e308) == "1.0e+310"  # 100 times it exceeds a float
    assert units.format_score(-1e308) == "\N{MINUS SIGN}1.0e+310"
    assert units.format_score(-0.05, sign=True) == "\N{MINUS SIGN}5.0"
    assert units.format_spread(0.5, 0.012) == "50.0 ± 1.2"
    assert units.format_share(0.01) == "1.00 %"
    assert units.format_share(0.311) == "31.1 %"
    assert units.format_p(0.0) == "< 0.001"
    assert units.format_number(3.05e-5) == "3.05e-05"
    assert units.format_number(12345.6) == "12,346"
