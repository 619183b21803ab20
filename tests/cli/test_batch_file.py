"""Files of prompts: what is read and written, what is refused, and runs that are killed."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.cli import main as cli
from compiled_llm.cli.prompt_file import params_of
from tests.helpers.tiny_models import small_config, tiny_model

OVERRIDES = {
    "compile.dispatch": "eager",
    "model.device": "cpu",
    "model.dtype": "float32",
    "limits.max_num_seqs": "4",
    "limits.max_num_batched_tokens": "48",
    "limits.max_model_len": "128",
}
Run = Callable[..., int]
Lines = list[dict[str, Any]]


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and three special ones."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'fool' %}{{ raise_exception('no fools') }}{% endif %}"
        "<s>{{ message.content }}</s>{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=259).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[CompiledLLM]:
    config = small_config(
        compile={"dispatch": "eager"}, model={"dtype": "float32", "device": "cpu"}
    )
    with CompiledLLM.from_pretrained(model, config=config, progress=False) as engine:
        yield engine


def _command(model: Path | str, *options: str) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in OVERRIDES.items()]
    return ["compiled-llm", "generate", "--model", str(model), "--max-tokens", "6", *options, *sets]


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Answers in.jsonl into out.jsonl, in the test's directory."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str, model: Path | str = model) -> int:
        monkeypatch.setattr(
            sys, "argv", _command(model, "--prompts", "in.jsonl", "--out", "out.jsonl", *options)
        )
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return call


def _write(path: str | Path, *lines: object) -> None:
    Path(path).write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )


def _read(path: str | Path) -> Lines:
    text = Path(path).read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _ids(lines: Lines) -> dict[Any, list[list[int]]]:
    """Each line's tokens, by id; each id stands once."""
    found = {line["id"]: [output["token_ids"] for output in line["outputs"]] for line in lines}
    assert len(found) == len(lines)
    return found


def test_each_kind_of_line_is_answered_as_the_api_would(
    run: Run, llm: CompiledLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = [{"role": "user", "content": "é\u2028?"}]
    _write(
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
    lines = {line["id"]: line for line in _read("out.jsonl")}
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
    assert _ids([lines[4]])[4] == [output.token_ids for output in sampled.outputs]
    assert lines[5]["outputs"][0]["token_ids"] == [9] * 6
    assert all("9" in at for at in lines[5]["outputs"][0]["logprobs"])
    assert lines[5]["prompt_logprobs"][0] is None
    err = capsys.readouterr().err
    tokens = sum(line["usage"]["completion_tokens"] for line in lines.values())
    assert f"5 prompts, {tokens} output tokens, " in err
    assert "load weights" in err


def test_raw_and_the_sampling_options_reach_the_model(run: Run, llm: CompiledLLM) -> None:
    _write("in.jsonl", '"abc"\n')
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
    (line,) = _read("out.jsonl")
    params = SamplingParams(
        temperature=1.2, top_p=0.9, top_k=40, min_p=0.01, n=2, stop=["!"], seed=3, max_tokens=6
    )
    (expected,) = llm.generate("abc", params_of(params, 0, {}))
    assert [output["text"] for output in line["outputs"]] == [
        output.text for output in expected.outputs
    ]
    assert line["usage"]["prompt_tokens"] == 3


def test_a_seed_is_made_of_the_command_lines_and_the_id(run: Run) -> None:
    names = ["a", "b", 1, "1"]
    _write("in.jsonl", *({"prompt": "same", "id": name} for name in names))
    assert run("--temperature", "1", "--seed", "3") == 0
    first = _ids(_read("out.jsonl"))
    assert len({str(tokens) for tokens in first.values()}) == 4
    _write("in.jsonl", *({"prompt": "same", "id": name} for name in reversed(names)))
    Path("out.jsonl").unlink()
    assert run("--temperature", "1", "--seed", "3", "--set", "limits.max_num_seqs=1") == 0
    assert _ids(_read("out.jsonl")) == first
    Path("out.jsonl").unlink()
    assert run("--temperature", "1", "--seed", "4") == 0
    assert _ids(_read("out.jsonl")) != first


def test_a_run_goes_on_where_it_was(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _write("in.jsonl", *(f'"prompt {number}"\n' for number in range(9)))
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
        assert _ids(_read("out.jsonl")) == _ids([json.loads(line) for line in lines])
    complete = Path("out.jsonl").read_bytes()
    assert run(model="/no/such/model") == 0  # nothing is left: no engine is started
    assert "resuming: 9 of 9 done" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == complete


def test_a_failed_prompt_is_written_and_the_run_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("in.jsonl", *(f'"prompt {number}"\n' for number in range(12)))
    assert (
        run("--set", "limits.max_waiting_seconds=0.000001", "--set", "limits.max_num_seqs=1") == 1
    )
    lines = _read("out.jsonl")
    failed = [line["outputs"][0] for line in lines if "error" in line["outputs"][0]]
    assert sorted(_ids(lines)) == list(range(12))
    assert failed
    assert {output["finish_reason"] for output in failed} == {"abort"}
    assert (
        f'{len(failed)} of 12 prompts failed: see their "error" in out.jsonl'
        in capsys.readouterr().err
    )
    assert run() == 1
    assert _read("out.jsonl") == lines


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
        ('{"prompt": "a", "id": 0}', "id 0 must be unique, and line 1 has it too"),
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
    _write("in.jsonl", '"fine"\n\n', line + "\n")
    assert run(model="/no/such/model") == 2
    (err,) = capsys.readouterr().err.strip().splitlines()
    assert err.startswith(f"error: in.jsonl:3: {message}")
    assert not Path("out.jsonl").exists()


def test_bytes_that_are_not_utf8_and_files_without_prompts_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model="/no/such/model") == 2
    assert "error: in.jsonl cannot be read: No such file or directory" in capsys.readouterr().err
    _write("in.jsonl", "\n \n")
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
def test_a_prompt_that_cannot_be_served_is_refused_before_any_is_run(
    run: Run, capsys: pytest.CaptureFixture[str], line: object, message: str
) -> None:
    _write("in.jsonl", '"fine"\n', line)
    assert run() == 2
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: in.jsonl:2: {message}")
    )
    assert Path("out.jsonl").read_bytes() == b""


ANSWER = '{"id": 0, "prompt": "fine", "outputs": [{"token_ids": [1]}]}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ANSWER.replace("0", "5"),
            "out.jsonl:1: id 5 is not in in.jsonl: it answers another file's prompts",
        ),
        (
            ANSWER.replace("fine", "good"),
            "out.jsonl:1: id 0 answers another prompt than in.jsonl:1 asks now",
        ),
        (
            ANSWER.replace("prompt", "messages"),
            "out.jsonl:1: id 0 answers another prompt than in.jsonl:1 asks now",
        ),
        (ANSWER + ANSWER, "out.jsonl:2: id 0 is answered twice: delete one of the lines"),
        (
            ANSWER + "{}\n",
            "out.jsonl:2: the line must be an answer that an earlier run wrote, got {}",
        ),
        ('{"id": 0, "outp\n' + ANSWER, "out.jsonl:1: expected JSON in UTF-8"),
        ("my diary, unfinished", "out.jsonl:1: expected JSON in UTF-8, got 'my diary, unfinished'"),
        ('{"my": "settings"}', "out.jsonl:1: the line must be an answer that an earlier run wrote"),
    ],
)
def test_a_file_of_other_answers_is_refused_and_left_alone(
    run: Run, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    _write("in.jsonl", '"fine"\n', '"more"\n')
    _write("out.jsonl", text)
    assert run(model="/no/such/model") == 2
    (err,) = capsys.readouterr().err.strip().splitlines()
    assert err.startswith(f"error: {message}")
    assert Path("out.jsonl").read_text() == text


def test_places_that_cannot_be_written_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("in.jsonl", '"fine"\n')
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either a prompt or --prompts, got neither"),
        (("--report",), "expected either a prompt or --prompts, got neither"),
        (
            ("hi", "--prompts", "in.jsonl", "--out", "out.jsonl"),
            "expected either a prompt or --prompts, got both",
        ),
        (("--prompts", "in.jsonl"), "--prompts and --out go together, got only --prompts"),
        (("hi", "--out", "out.jsonl"), "--prompts and --out go together, got only --out"),
        (
            ("hi", "--n", "2", "--temperature", "1"),
            "a single prompt has one completion, got --n 2: use --prompts",
        ),
        (
            ("--prompts", "in.jsonl", "--out", "out.jsonl", "--n", "2"),
            "n must be 1 when temperature is 0, got 2",
        ),
        (("hi", "--top-p", "0"), "top_p must be a number above 0 and at most 1, got 0.0"),
    ],
)
def test_the_command_line_refuses_what_does_not_go_together(
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


def test_outputs_come_as_they_are_completed_and_prompts_are_read_as_there_is_room(
    llm: CompiledLLM,
) -> None:
    read: list[int] = []

    def prompts() -> Iterator[tuple[str, SamplingParams]]:
        for number in range(40):
            read.append(number)
            yield (
                f"prompt {number}",
                SamplingParams(temperature=0, max_tokens=24 if number == 0 else 3, ignore_eos=True),
            )

    outputs = llm.as_completed(prompts())
    first, _ = next(outputs)
    assert 0 < first < 4
    assert len(read) < 16  # four run, four wait
    order = [first, *(number for number, _ in outputs)]
    assert sorted(order) == list(range(40))
    assert order.index(0) > 12
    abandoned = llm.as_completed(prompts())
    next(abandoned)
    abandoned.close()
    while llm.engine.has_work:
        assert all(request.finish_reason == "abort" for request in llm.engine.step())
    with pytest.raises(ValueError, match="the prompt is empty"):
        list(llm.as_completed([("fine", None), ([], None)]))
    llm.engine.cache.check()


def test_another_iterators_steps_lose_nothing(llm: CompiledLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = "".join(llm.stream("abc", params))
    stream = llm.stream("abc", params)
    outputs = llm.as_completed(
        [("one", SamplingParams(temperature=0, max_tokens=2)), ("abc", params), ("abc", params)]
    )
    text, numbers = next(stream), [next(outputs)[0]]
    llm.generate("hello", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert text + "".join(stream) == expected
    assert sorted([*numbers, *(number for number, _ in outputs)]) == [0, 1, 2]


def _kill_after(num_lines: int, command: list[str], out: Path) -> None:
    """Start a run, and kill it once the file has so many lines."""
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


def test_a_run_that_is_killed_twice_loses_and_repeats_nothing(
    model: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the prompts greedy, half seeded; each run batches them in another way."""
    total, options = 300, ("--temperature", "1", "--seed", "11", "--set", "limits.max_num_seqs=2")
    changes: tuple[dict[str, Any], ...] = ({"temperature": 0, "max_tokens": 24}, {"max_tokens": 8})
    _write(
        "in.jsonl",
        *(
            {"prompt": f"question {at}", "id": f"q{at}", "params": changes[at % 2]}
            for at in range(total)
        ),
    )
    assert run("--temperature", "1", "--seed", "11", "--out", "whole.jsonl") == 0
    _, *arguments = _command(model, "--prompts", "in.jsonl", "--out", "out.jsonl", *options)
    command = [sys.executable, "-m", "compiled_llm.cli.main", *arguments]
    for num_lines in (30, 130):
        _kill_after(num_lines, command, Path("out.jsonl"))
        assert num_lines <= len(Path("out.jsonl").read_bytes().splitlines()) < total
    with Path("out.jsonl").open("ab") as file:
        file.write(b'{"id": "q2')
    capsys.readouterr()
    assert run(*options) == 0
    assert f" of {total} done" in capsys.readouterr().err
    whole, pieces = _ids(_read("whole.jsonl")), _ids(_read("out.jsonl"))
    assert set(whole) == {f"q{at}" for at in range(total)}
    assert pieces == whole
