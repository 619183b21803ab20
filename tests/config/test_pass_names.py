"""Tests of the former names of passes in configs."""

import warnings

import pytest

from compiled_llm.config.loader import load_config, parse_config
from compiled_llm.config.pass_names import RENAMED_PASSES
from passes import PASSES


@pytest.mark.parametrize(("former", "current"), list(RENAMED_PASSES.items()))
def test_a_former_name_is_accepted_with_a_warning(former: str, current: str) -> None:
    with pytest.warns(FutureWarning, match=f"pass '{former}' is now called '{current}'"):
        config = load_config(None, [f"passes.{former}=off"])
    assert config.passes == {current: False}
    assert config.pass_order() == [name for name in PASSES if name != current]


def test_a_former_name_keeps_its_place_in_the_order() -> None:
    with pytest.warns(FutureWarning):
        config = parse_config({"passes": {"small_linear": True, "rotary_outer_product": True}})
    assert config.pass_order()[:2] == ["fuse_skinny_linear", "rotary_outer_product"]


def test_both_names_of_a_pass_are_refused() -> None:
    switches = {"hoist_step_invariants": True, "once_a_step": False}
    with pytest.raises(ValueError, match="'hoist_step_invariants' is given under its former name"):
        parse_config({"passes": switches})


def test_current_names_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_config({"passes": dict.fromkeys(PASSES, True)})
    assert set(RENAMED_PASSES.values()) <= set(PASSES)
