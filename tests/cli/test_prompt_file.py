"""Tests of files of prompts: which lines are refused."""

from pathlib import Path

import pytest

from tests.cli.batch_helpers import Run, write_lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected JSON in UTF-8, got '{'"),
        ('"\\ud800"', "expected JSON in UTF-8"),
        ("[" * 100_000, "expected JSON in UTF-8"),
        ("3", 'the line must be a JSON string, or an object with "prompt" or "messages", got 3'),
        ('{"id": 1}', 'expected exactly one of "prompt" and "messages", got neither'),
        (
            '{"prompt": "a", "messages": []}',
            'expected exactly one of "prompt" and "messages", got both',
        ),
        (
            '{"prompt": "a", "pramas": {}}',
            "unknown key 'pramas': expected id, prompt, messages, params",
        ),
        ('""', "prompt must be text or a list of token ids, not empty, got ''"),
        (
            '{"prompt": [1, true]}',
            "prompt must be text or a list of token ids, not empty, got [1, True]",
        ),
        (
            '{"messages": [{"role": "user"}]}',
            "messages must be a list of objects with role and content",
        ),
        ('{"prompt": "a", "id": null}', "id must be a string or a whole number, got None"),
        ('{"prompt": "a", "id": 0}', "id 0 must be unique, but line 1 has it too"),
        ('{"prompt": "a", "params": []}', "params must be an object, got []"),
        (
            '{"prompt": "a", "params": {"temprature": 1}}',
            "params: unknown field 'temprature': did you mean 'temperature'?",
        ),
        (
            '{"prompt": "a", "params": {"logits_processors": []}}',
            "params: unknown field 'logits_processors'",
        ),
        (
            '{"prompt": "a", "params": {"top_p": 2}}',
            "params: top_p must be a number above 0 and at most 1, got 2",
        ),
        (
            '{"prompt": "a", "params": {"logit_bias": {"x": 1}}}',
            "params: logit_bias must be a dict of token ids",
        ),
    ],
)
def test_a_bad_line_is_refused_before_the_model_is_loaded(
    run: Run, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    write_lines("in.jsonl", '"fine"\n\n', line + "\n")
    assert run(model="/no/such/model") == 2
    (err,) = capsys.readouterr().err.strip().splitlines()
    assert err.startswith(f"error: in.jsonl:3: {message}")
    assert not Path("out.jsonl").exists()


def test_bytes_that_are_not_utf8_and_files_without_prompts_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model="/no/such/model") == 2
    assert "error: in.jsonl cannot be read: No such file or directory" in capsys.readouterr().err
    write_lines("in.jsonl", "\n \n")
    assert run(model="/no/such/model") == 2
    assert (
        "error: in.jsonl holds no prompts: expected one on each line, as JSON"
        in capsys.readouterr().err
    )
    Path("in.jsonl").write_bytes(b'"\xff"\n')
    assert run(model="/no/such/model") == 2
    assert "error: in.jsonl:1: expected JSON in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "x" * 200},
            "the prompt has 202 tokens, and limits.max_model_len=128 leaves no room for output",
        ),
        ({"prompt": [259]}, "token id 259 is out of range"),
        (
            {"messages": [{"role": "fool", "content": "hi"}]},
            "the chat template refuses the messages: no fools",
        ),
    ],
)
def test_an_invalid_prompt_is_refused_before_any_is_run(
    run: Run, capsys: pytest.CaptureFixture[str], line: object, message: str
) -> None:
    write_lines("in.jsonl", '"fine"\n', line)
    assert run() == 2
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: in.jsonl:2: {message}")
    )
    assert Path("out.jsonl").read_bytes() == b""
