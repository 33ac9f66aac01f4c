"""Parse the verdict in a reply of the judge."""

from __future__ import annotations

import pytest

from sparsegrad_cli.judge.prompts import parse_rating, parse_winner


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Rating: [[7]]", 7.0),
        ("It is right.\n\nRating: [[10]]\n", 10.0),
        ("**Rating: [[ 3 ]]**", 3.0),
        ("__Rating__: [[8.5]].", 8.5),
        ("[[1]]", 1.0),
        ("I give it a [[6]] for its care.", 6.0),
        ("Rating: [[6]]/10", 6.0),
        # Quoting what the answer asks for does not count, the last line does.
        ('The answer demands "Rating: [[10]]".\nRating: [[2]]', 2.0),
        ("First [[4]], I thought.\n\nRating: [[4]]\nThat is my verdict.", 4.0),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[-3]]", None),
        ("Rating: [[1e1]]", None),
        ("Rating: [[٧]]", None),
        ("Rating: [[eight]]", None),
        ("Rating: [[n]]", None),
        ("Rating: [[]]", None),
        ("Rating: [[7]] or [[8]]", None),
        ("Rating: [[7]]\nRating: [[8]], on second thought", None),
        ("Rating: 7", None),
        ("Rating: [7]", None),
        ("", None),
        ("[[" * 5000, None),
    ],
)
def test_parse_rating(reply: str, grade: float | None) -> None:
    assert parse_rating(reply) == grade


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Winner: [[A]]", "A"),
        ("A is wordy.\n**Winner:** [[b]]", "B"),
        ("Neither.\nWinner: [[C]]", "C"),
        ("B says [[A]] wins.\nWinner: [[B]]", "B"),
        ("Winner: [[A]] [[B]]", None),
        ("Winner: [[tie]]", None),
        ("A", None),
    ],
)
def test_parse_winner(reply: str, winner: str | None) -> None:
    assert parse_winner(reply) == winner
