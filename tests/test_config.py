"""Configs: files, inheritance, overrides, and errors that say what was meant."""

from pathlib import Path

import pytest

from compiled_llm.config_file import load_config, parse_config
from passes import PASSES

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).pass_order() == list(PASSES)


def test_the_default_is_smollm2_on_a_cpu() -> None:
    default, written = load_config(), load_config(CONFIGS / "smollm2-cpu.yaml")
    assert written.model.name is default.model.name is None
    assert written.compile == default.compile
    assert written.cache == default.cache


def test_extends_merges_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("limits: {max_num_seqs: 3, max_model_len: 64}\ncache: {memory: 2MiB}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nlimits: {max_num_seqs: 5}\n")
    config = load_config(tmp_path / "child.yaml", ["limits.max_model_len=32", "passes.rotary_outer_product=off"])
    assert (config.limits.max_num_seqs, config.limits.max_model_len) == (5, 32)
    assert config.cache.memory == 2 * 2**20
    assert config.pass_order() == [name for name in PASSES if name != "rotary_outer_product"]


def test_model_paths_are_relative_to_their_file() -> None:
    assert load_config(CONFIGS / "qwen3-0.6b-random.yaml").model.name == str(CONFIGS / "architectures" / "qwen3-0.6b.json")


def test_named_passes_run_first_in_their_order() -> None:
    first, *others = parse_config({"passes": {"rotary_outer_product": True}}).pass_order()
    assert first == "rotary_outer_product"
    assert others == [name for name in PASSES if name != first]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compile.dispath=torch", "config key 'compile.dispath': it is unknown: did you mean 'dispatch'?"),
        ("modell.name=x", "config key 'modell': it is unknown: did you mean 'model'?"),
        ("passes.paged_atention=off", "config key 'passes': unknown pass 'paged_atention': did you mean 'paged_attention'?"),
        ("limits.max_num_seqs=0", "config key 'limits.max_num_seqs': Input should be greater than 0, got 0"),
        ("cache.block_size=20", "config key 'cache.block_size': expected a power of two from 16, got 20"),
        ("cache.memory=2x", "config key 'cache.memory': expected auto or a size such as 512MiB or 2GiB, got '2x'"),
        ("limits", "override 'limits' must have the form a.b=c"),
    ],
)
def test_errors_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        load_config(None, [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_strict_and_eager_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="strict forbids eager steps"):
        parse_config({"strict": True, "compile": {"dispatch": "eager"}})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    for name, message in [
        ("loop", "extends itself"),
        ("list", "must hold a mapping"),
        ("bad", "is not YAML"),
        ("none", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / f"{name}.yaml")


def test_a_level_is_a_preset_and_what_is_given_wins() -> None:
    eager, fast, usual, most = (parse_config({"compile": {"level": level}}).compile for level in range(4))
    assert (eager.dispatch, eager.capture) == ("eager", "start")
    assert (fast.dispatch, fast.capture) == ("direct", "lazy")
    assert usual == parse_config({}).compile
    assert most.options == {"max_autotune": True, "coordinate_descent_tuning": True}
    given = {"level": 3, "capture": "lazy", "options": {"max_autotune": False, "epilogue_fusion": False}}
    compiling = parse_config({"compile": given}).compile
    assert compiling.capture == "lazy"
    assert compiling.options == {"max_autotune": False, "coordinate_descent_tuning": True, "epilogue_fusion": False}
    assert parse_config({"compile": compiling.model_dump()}).compile == compiling
    with pytest.raises(ValueError, match=r"'compile.level'"):
        parse_config({"compile": {"level": 4}})
    for level in (0, 1):
        with pytest.raises(ValueError, match="strict forbids eager steps"):
            parse_config({"strict": True, "compile": {"level": level}})
    assert parse_config({"strict": True, "compile": {"level": 1, "capture": "start"}}).strict
