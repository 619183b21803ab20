"""Tests of files of results: which files are refused."""

import fcntl
from pathlib import Path

import pytest

from tests.cli.batch_helpers import Run, write_lines

RESULT = '{"id": 0, "prompt": "fine", "outputs": [{"token_ids": [1]}]}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RESULT.replace("0", "5"),
            "out.jsonl:1: id 5 is not in in.jsonl: expected results of its prompts alone; "
            "choose another --out",
        ),
        (
            RESULT.replace("fine", "good"),
            "out.jsonl:1: id 0 is the result of another prompt than in.jsonl:1",
        ),
        (
            RESULT.replace("prompt", "messages"),
            "out.jsonl:1: id 0 is the result of another prompt than in.jsonl:1",
        ),
        (RESULT + RESULT, "out.jsonl:2: id 0 has two results: delete one of the lines"),
        (
            RESULT + "{}\n",
            "out.jsonl:2: the line must be a result that an earlier run wrote, got {}",
        ),
        ('{"id": 0, "outp\n' + RESULT, "out.jsonl:1: expected JSON in UTF-8"),
        ("my diary, unfinished", "out.jsonl:1: expected JSON in UTF-8, got 'my diary, unfinished'"),
        ('{"my": "settings"}', "out.jsonl:1: the line must be a result that an earlier run wrote"),
    ],
)
def test_a_file_of_other_results_is_refused_and_unchanged(
    run: Run, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    write_lines("in.jsonl", '"fine"\n', '"more"\n')
    write_lines("out.jsonl", text)
    assert run(model="/no/such/model") == 2
    (err,) = capsys.readouterr().err.strip().splitlines()
    assert err.startswith(f"error: {message}")
    assert Path("out.jsonl").read_text() == text


def test_paths_that_cannot_be_written_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines("in.jsonl", '"fine"\n')
    for place, message in (
        (
            "no/such/directory/out.jsonl",
            "no/such/directory/out.jsonl cannot be written: No such file or directory",
        ),
        (".", ". is not a regular file"),
        ("./in.jsonl", "--prompts and --out are the same file, in.jsonl"),
    ):
        assert run("--out", place, model="/no/such/model") == 2
        assert f"error: {message}" in capsys.readouterr().err
    with Path("out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(model="/no/such/model") == 2
    assert "error: out.jsonl is being written by another run" in capsys.readouterr().err
    assert Path("in.jsonl").read_text() == '"fine"\n'
