"""Lengths from files of conversations."""

import json
from pathlib import Path

import pytest

from bench.sharegpt import read_lengths

_TURNS = [
    {"from": "human", "value": "one two three"},
    {"from": "gpt", "value": "four five"},
    {"from": "human", "value": "six"},
]
_LONG = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b " * 50}]


def _count_words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    turns = [_TURNS, _TURNS[:1], _LONG, _TURNS]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": each} for each in turns]))
    return path


def test_first_question_and_answer_give_the_lengths(conversations: Path) -> None:
    lengths = read_lengths(conversations, _count_words, limit=10, max_length=20)
    assert lengths == [(3, 2), (3, 2)]


def test_limit_ends_the_reading(conversations: Path) -> None:
    lengths = read_lengths(conversations, _count_words, limit=2, max_length=100)
    assert lengths == [(3, 2), (1, 50)]


def test_a_file_without_usable_conversations_is_rejected(conversations: Path) -> None:
    with pytest.raises(ValueError, match="at most 2 tokens together, found none"):
        read_lengths(conversations, _count_words, limit=10, max_length=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a list of conversations, got dict"),
        ("[", "is not JSON"),
        ('[{"text": 1}]', 'entry 0: expected an object with a list "conversations"'),
    ],
)
def test_other_formats_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lengths(path, len, limit=1, max_length=10)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_lengths(tmp_path / "missing.json", len, limit=1, max_length=10)
