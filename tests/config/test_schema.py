"""Tests of the config's schema: shipped configs, presets and contradictions."""

from pathlib import Path

import pytest

from compiled_llm.config.loader import load_config, parse_config
from passes import PASSES

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).pass_order() == list(PASSES)


def test_the_default_is_smollm2_on_a_cpu() -> None:
    default, written = load_config(), load_config(CONFIGS / "smollm2-cpu.yaml")
    assert written.model.name is default.model.name is None
    assert written.compile == default.compile
    assert written.cache == default.cache


def test_named_passes_run_first_in_their_order() -> None:
    first, *others = parse_config({"passes": {"rotary_outer_product": True}}).pass_order()
    assert first == "rotary_outer_product"
    assert others == [name for name in PASSES if name != first]


def test_strict_and_eager_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="strict forbids eager steps"):
        parse_config({"strict": True, "compile": {"dispatch": "eager"}})


def test_a_level_is_a_preset_that_given_keys_override() -> None:
    eager, fast, usual, most = (
        parse_config({"compile": {"level": level}}).compile for level in range(4)
    )
    assert (eager.dispatch, eager.capture) == ("eager", "start")
    assert (fast.dispatch, fast.capture) == ("direct", "lazy")
    assert usual == parse_config({}).compile
    assert most.options == {"max_autotune": True, "coordinate_descent_tuning": True}
    given = {
        "level": 3,
        "capture": "lazy",
        "options": {"max_autotune": False, "epilogue_fusion": False},
    }
    compiling = parse_config({"compile": given}).compile
    assert compiling.capture == "lazy"
    assert compiling.options == {
        "max_autotune": False,
        "coordinate_descent_tuning": True,
        "epilogue_fusion": False,
    }
    assert parse_config({"compile": compiling.model_dump()}).compile == compiling
    with pytest.raises(ValueError, match=r"'compile.level'"):
        parse_config({"compile": {"level": 4}})
    for level in (0, 1):
        with pytest.raises(ValueError, match="strict forbids eager steps"):
            parse_config({"strict": True, "compile": {"level": level}})
    assert parse_config({"strict": True, "compile": {"level": 1, "capture": "start"}}).strict
