"""Tests of batch runs: results, seeds, and runs that are interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.cli import main as cli
from compiled_llm.cli.prompt_file import merge_sampling_params
from tests.cli.batch_helpers import Run, generate_command, read_lines, token_ids_by_id, write_lines


def test_each_kind_of_line_matches_the_api(
    run: Run, llm: CompiledLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = [{"role": "user", "content": "é\u2028?"}]
    write_lines(
        "in.jsonl",
        '"héllo"\n',
        "  \n",
        {"prompt": [5, 6, 7], "id": "ids"},
        {"messages": conversation, "id": 7, "params": {"max_tokens": 3}},
        {"prompt": "two", "params": {"n": 2, "temperature": 1.0, "seed": 5}},
        {
            "prompt": "bias",
            "params": {"logit_bias": {"9": 100}, "logprobs": 1, "prompt_logprobs": 0},
        },
    )
    assert run("--report") == 0
    assert '"héllo"' in Path("out.jsonl").read_text()
    lines = {line["id"]: line for line in read_lines("out.jsonl")}
    assert set(lines) == {0, "ids", 7, 4, 5}
    greedy = SamplingParams(temperature=0, max_tokens=6)
    (expected,) = llm.chat([{"role": "user", "content": "héllo"}], greedy)
    assert lines[0]["prompt"] == "héllo"
    assert lines[0]["outputs"] == [
        {
            "text": expected.text,
            "token_ids": expected.outputs[0].token_ids,
            "finish_reason": expected.outputs[0].finish_reason,
        }
    ]
    assert lines[0]["usage"] == expected.usage
    assert lines[0]["metrics"]["total"] >= lines[0]["metrics"]["time_to_first_token"] > 0
    assert (
        lines["ids"]["outputs"][0]["token_ids"]
        == llm.generate([5, 6, 7], greedy)[0].outputs[0].token_ids
    )
    assert lines[7]["messages"] == conversation
    assert lines[7]["usage"]["completion_tokens"] <= 3
    (sampled,) = llm.chat(
        [{"role": "user", "content": "two"}], SamplingParams(n=2, seed=5, max_tokens=6)
    )
    assert token_ids_by_id([lines[4]])[4] == [output.token_ids for output in sampled.outputs]
    assert lines[5]["outputs"][0]["token_ids"] == [9] * 6
    assert all("9" in at for at in lines[5]["outputs"][0]["logprobs"])
    assert lines[5]["prompt_logprobs"][0] is None
    err = capsys.readouterr().err
    tokens = sum(line["usage"]["completion_tokens"] for line in lines.values())
    assert f"5 prompts, {tokens} output tokens, " in err
    assert "load weights" in err


def test_raw_and_the_sampling_options_reach_the_model(run: Run, llm: CompiledLLM) -> None:
    write_lines("in.jsonl", '"abc"\n')
    options = (
        "--temperature",
        "1.2",
        "--top-p",
        "0.9",
        "--top-k",
        "40",
        "--min-p",
        "0.01",
        "--n",
        "2",
        "--stop",
        "!",
        "--raw",
    )
    assert run(*options, "--seed", "3") == 0
    (line,) = read_lines("out.jsonl")
    params = SamplingParams(
        temperature=1.2, top_p=0.9, top_k=40, min_p=0.01, n=2, stop=["!"], seed=3, max_tokens=6
    )
    (expected,) = llm.generate("abc", merge_sampling_params(params, 0, {}))
    assert [output["text"] for output in line["outputs"]] == [
        output.text for output in expected.outputs
    ]
    assert line["usage"]["prompt_tokens"] == 3


def test_a_seed_is_derived_from_the_command_line_and_the_id(run: Run) -> None:
    names = ["a", "b", 1, "1"]
    write_lines("in.jsonl", *({"prompt": "same", "id": name} for name in names))
    assert run("--temperature", "1", "--seed", "3") == 0
    first = token_ids_by_id(read_lines("out.jsonl"))
    assert len({str(tokens) for tokens in first.values()}) == 4
    write_lines("in.jsonl", *({"prompt": "same", "id": name} for name in reversed(names)))
    Path("out.jsonl").unlink()
    assert run("--temperature", "1", "--seed", "3", "--set", "limits.max_num_seqs=1") == 0
    assert token_ids_by_id(read_lines("out.jsonl")) == first
    Path("out.jsonl").unlink()
    assert run("--temperature", "1", "--seed", "4") == 0
    assert token_ids_by_id(read_lines("out.jsonl")) != first


def test_a_run_is_resumed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines("in.jsonl", *(f'"prompt {number}"\n' for number in range(9)))
    assert run() == 0
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in (0, 1, 7, 40, len(lines[3]) - 1):
        Path("out.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:size])
        capsys.readouterr()
        assert run() == 0
        err = capsys.readouterr().err
        assert "resuming: 3 of 9 done" in err
        assert "6 prompts, " in err
        assert Path("out.jsonl").read_bytes().startswith(b"".join(lines[:3]))
        assert token_ids_by_id(read_lines("out.jsonl")) == token_ids_by_id(
            [json.loads(line) for line in lines]
        )
    complete = Path("out.jsonl").read_bytes()
    assert run(model="/no/such/model") == 0  # no prompt remains, so no engine is started
    assert "resuming: 9 of 9 done" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == complete


def test_a_failed_prompt_is_written_and_the_run_continues(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines("in.jsonl", *(f'"prompt {number}"\n' for number in range(12)))
    assert (
        run("--set", "limits.max_waiting_seconds=0.000001", "--set", "limits.max_num_seqs=1") == 1
    )
    lines = read_lines("out.jsonl")
    failed = [line["outputs"][0] for line in lines if "error" in line["outputs"][0]]
    assert sorted(token_ids_by_id(lines)) == list(range(12))
    assert failed
    assert {output["finish_reason"] for output in failed} == {"abort"}
    assert (
        f'{len(failed)} of 12 prompts failed: see their "error" in out.jsonl'
        in capsys.readouterr().err
    )
    assert run() == 1
    assert read_lines("out.jsonl") == lines


def _kill_after(num_lines: int, command: list[str], out: Path) -> None:
    """Start a run and kill it when the file has `num_lines` lines."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
    }
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        while process.poll() is None and not (
            out.exists() and out.read_bytes().count(b"\n") >= num_lines
        ):
            time.sleep(0.005)
        process.kill()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, err


def test_a_run_that_is_killed_twice_loses_and_repeats_no_prompt(
    model: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the prompts are greedy, half seeded; each run batches them differently."""
    total, options = 300, ("--temperature", "1", "--seed", "11", "--set", "limits.max_num_seqs=2")
    changes: tuple[dict[str, Any], ...] = ({"temperature": 0, "max_tokens": 24}, {"max_tokens": 8})
    write_lines(
        "in.jsonl",
        *(
            {"prompt": f"question {at}", "id": f"q{at}", "params": changes[at % 2]}
            for at in range(total)
        ),
    )
    assert run("--temperature", "1", "--seed", "11", "--out", "whole.jsonl") == 0
    _, *arguments = generate_command(model, "--prompts", "in.jsonl", "--out", "out.jsonl", *options)
    command = [sys.executable, "-m", "compiled_llm.cli.main", *arguments]
    for num_lines in (30, 130):
        _kill_after(num_lines, command, Path("out.jsonl"))
        assert num_lines <= len(Path("out.jsonl").read_bytes().splitlines()) < total
    with Path("out.jsonl").open("ab") as file:
        file.write(b'{"id": "q2')
    capsys.readouterr()
    assert run(*options) == 0
    assert f" of {total} done" in capsys.readouterr().err
    whole, pieces = (
        token_ids_by_id(read_lines("whole.jsonl")),
        token_ids_by_id(read_lines("out.jsonl")),
    )
    assert set(whole) == {f"q{at}" for at in range(total)}
    assert pieces == whole
