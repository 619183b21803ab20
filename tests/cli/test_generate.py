"""Tests of the options of `compiled-llm generate`."""

import sys

import pytest

from compiled_llm.cli import main as cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either a prompt or --prompts, got neither"),
        (("--report",), "expected either a prompt or --prompts, got neither"),
        (
            ("hi", "--prompts", "in.jsonl", "--out", "out.jsonl"),
            "expected either a prompt or --prompts, got both",
        ),
        (("--prompts", "in.jsonl"), "expected --prompts and --out together, got only --prompts"),
        (("hi", "--out", "out.jsonl"), "expected --prompts and --out together, got only --out"),
        (
            ("hi", "--n", "2", "--temperature", "1"),
            "expected --n 1 with a single prompt, got --n 2: use --prompts",
        ),
        (
            ("--prompts", "in.jsonl", "--out", "out.jsonl", "--n", "2"),
            "n must be 1 when temperature is 0, got 2",
        ),
        (("hi", "--top-p", "0"), "top_p must be a number above 0 and at most 1, got 0.0"),
    ],
)
def test_options_that_cannot_be_combined_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["compiled-llm", "generate", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == [f"error: {message}"]
