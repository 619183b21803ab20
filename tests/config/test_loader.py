"""Tests of reading configs: files, inheritance, overrides, and messages of errors."""

from pathlib import Path

import pytest

from compiled_llm.config.loader import load_config
from passes import PASSES

CONFIGS = Path(__file__).parents[2] / "configs"


def test_extends_merges_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "limits: {max_num_seqs: 3, max_model_len: 64}\ncache: {memory: 2MiB}\n"
    )
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nlimits: {max_num_seqs: 5}\n")
    config = load_config(
        tmp_path / "child.yaml", ["limits.max_model_len=32", "passes.rotary_outer_product=off"]
    )
    assert (config.limits.max_num_seqs, config.limits.max_model_len) == (5, 32)
    assert config.cache.memory == 2 * 2**20
    assert config.pass_order() == [name for name in PASSES if name != "rotary_outer_product"]


def test_model_paths_are_relative_to_their_file() -> None:
    assert load_config(CONFIGS / "qwen3-0.6b-random.yaml").model.name == str(
        CONFIGS / "architectures" / "qwen3-0.6b.json"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "compile.dispath=torch",
            "config key 'compile.dispath': it is unknown: did you mean 'dispatch'?",
        ),
        ("modell.name=x", "config key 'modell': it is unknown: did you mean 'model'?"),
        (
            "passes.lower_atention_marker=off",
            "config key 'passes': unknown pass 'lower_atention_marker': "
            "did you mean 'lower_attention_marker'?",
        ),
        (
            "limits.max_num_seqs=0",
            "config key 'limits.max_num_seqs': Input should be greater than 0, got 0",
        ),
        (
            "cache.block_size=20",
            "config key 'cache.block_size': expected a power of two from 16 to 1024, got 20",
        ),
        (
            "cache.memory=2x",
            "config key 'cache.memory': expected auto or a size such as 512MiB or 2GiB, got '2x'",
        ),
        (
            "cache.block_size=1048576",
            "config key 'cache.block_size': expected a power of two from 16 to 1024, got 1048576",
        ),
        (
            f"cache.memory={'9' * 400}GiB",
            "config key 'cache.memory': Input should be less than or equal to 1125899906842624, "
            "got",
        ),
        (f"cache.memory={'9' * 5000}", "override 'cache.memory=999"),
        (
            "limits.max_num_seqs=true",
            "config key 'limits.max_num_seqs': expected a whole number, got True",
        ),
        (
            "limits.max_num_seqs='4'",
            "config key 'limits.max_num_seqs': Input should be a valid integer, got '4'",
        ),
        (
            "limits.max_num_seqs=4.5",
            "config key 'limits.max_num_seqs': Input should be a valid integer, got 4.5",
        ),
        (
            "limits.max_model_len=99999999999999999999",
            "config key 'limits.max_model_len': Input should be less than or equal to",
        ),
        (
            "limits.max_waiting=1e99",
            "config key 'limits.max_waiting': Input should be less than 2147483648",
        ),
        (
            "limits.max_waiting_seconds=.inf",
            "config key 'limits.max_waiting_seconds': Input should be a finite number, got inf",
        ),
        (
            "limits.max_waiting_seconds=.nan",
            "config key 'limits.max_waiting_seconds': Input should be a finite number, got nan",
        ),
        (
            "limits.max_waiting_seconds='3'",
            "config key 'limits.max_waiting_seconds': Input should be a valid number, got '3'",
        ),
        (
            "cache.gpu_memory_utilization=true",
            "config key 'cache.gpu_memory_utilization': Input should be a valid number, got",
        ),
        ("cache.memory=true", "config key 'cache.memory': expected a whole number, got True"),
        (
            "buckets.decode=[1, true]",
            "config key 'buckets.decode': expected a whole number, got True",
        ),
        (
            "buckets.growth=1.0000001",
            "config key 'buckets.growth': Input should be greater than or equal to 1.05, "
            "got 1.0000001",
        ),
        ("compile.level=true", "config key 'compile.level': expected a whole number, got True"),
        ("compile.level=[1]", "config key 'compile.level': Input should be 0, 1, 2 or 3, got [1]"),
        (
            "compile.processes=true",
            "config key 'compile.processes': expected a whole number, got True",
        ),
        (
            "compile.artifact=''",
            "config key 'compile.artifact': Input should be 'auto' or 'off', got '' "
            "or expected a path",
        ),
        (
            "compile.options={a: 2026-01-01}",
            "config key 'compile.options': input was not a valid JSON value",
        ),
        (
            "model.seed=-1",
            "config key 'model.seed': Input should be greater than or equal to 0, got -1",
        ),
        (
            "model.name=''",
            "config key 'model.name': String should have at least 1 character, got ''",
        ),
        ("strict=1", "config key 'strict': Input should be a valid boolean, got 1"),
        (
            "passes.lower_attention_marker='on'",
            "config key 'passes': Input should be a valid boolean, got 'on'",
        ),
        ("passes={1: on}", "config key 'passes': Input should be a valid string, got 1"),
        ("limits", "override 'limits' must have the form a.b=c"),
        (
            "buckets.decode=[1,2",
            "override 'buckets.decode=[1,2' is not valid YAML: while parsing a flow sequence",
        ),
        ("model={a: ", "override 'model={a: ' is not valid YAML"),
        (
            "model.name=2026-13-45",
            "override 'model.name=2026-13-45' is not valid YAML: month must be in 1..12",
        ),
        (
            "strict={a: 2, a: 4}",
            "override 'strict={a: 2, a: 4}' is not valid YAML: key 'a' is given twice, "
            "in lines 1 and 1",
        ),
        (f"buckets.decode={'[' * 5000}", "override 'buckets.decode=[[["),
    ],
    ids=lambda text: text[:30],
)
def test_errors_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        load_config(None, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    (tmp_path / "twice.yaml").write_text(
        "limits:\n  max_num_seqs: 2\n  max_model_len: 64\n  max_num_seqs: 4\n"
    )
    (tmp_path / "numbers.yaml").write_text("1: 2\n")
    (tmp_path / "parents.yaml").write_text("extends: [list.yaml]\n")
    (tmp_path / "parent.yaml").write_text("extends: 3\n")
    (tmp_path / "link.yaml").symlink_to("link.yaml")
    (tmp_path / "inner").symlink_to(".")
    (tmp_path / "linked.yaml").write_text("extends: inner/alias.yaml\n")
    (tmp_path / "alias.yaml").symlink_to("linked.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"# \xe4\n")
    (tmp_path / "directory.yaml").mkdir()
    for name, message in [
        ("loop", "extends itself"),
        ("list", "must hold a mapping"),
        ("bad", "is not valid YAML"),
        ("twice", "is not valid YAML: key 'max_num_seqs' is given twice, in lines 2 and 4"),
        ("numbers", "config key '1': Keys should be strings, got 1"),
        ("parents", r"extends must be the path of one other config file, got \['list.yaml'\]"),
        ("parent", "extends must be the path of one other config file, got 3"),
        ("link", "link.yaml cannot be read: Symlink loop"),
        ("linked", "extends itself"),
        ("latin", r"latin.yaml cannot be read: it is not UTF-8 \(byte 0xe4 at offset 2\)"),
        ("directory", "directory.yaml cannot be read: Is a directory"),
        ("none", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_config(tmp_path / f"{name}.yaml")
        assert "\n" not in str(caught.value)


def test_numbers_are_read_as_in_json() -> None:
    config = load_config(
        None,
        [
            "limits.max_num_seqs=1e3",
            "limits.max_num_batched_tokens=2.048E+3",
            "compile.options={a: 1e-3}",
        ],
    )
    assert (config.limits.max_num_seqs, config.limits.max_num_batched_tokens) == (1000, 2048)
    assert isinstance(config.limits.max_num_seqs, int)
    assert config.compile.options == {"a": 0.001}
    assert load_config(None, ["cache.memory=1.5GiB"]).cache.memory == 3 * 2**29


def test_anchors_and_merge_keys_are_no_duplicate_keys(tmp_path: Path) -> None:
    text = "compile:\n  options: {a: &x {<<: &y {c: 1, d: 2}, d: 3}, b: {<<: *x, c: 4}, e: *y}\n"
    (tmp_path / "c.yaml").write_text(text)
    options = load_config(tmp_path / "c.yaml").compile.options
    assert options == {"a": {"c": 1, "d": 3}, "b": {"c": 4, "d": 3}, "e": {"c": 1, "d": 2}}


def test_cyclic_values_are_refused() -> None:
    with pytest.raises(ValueError, match="cyclic reference detected"):
        load_config(None, ["compile.options=&x {a: *x}"])
    with pytest.raises(ValueError, match="nests or extends too deeply"):
        load_config(None, ["compile.options=&x {a: *x}"] * 2)
