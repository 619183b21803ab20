"""What the import of the package leaves behind."""

import subprocess
import sys

import pytest

_AFTER = "import compiled_llm, gc; print(gc.isenabled(), gc.get_freeze_count() > 100_000)"


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "True True"), ("import torch; ", "True False"), ("import gc; gc.disable(); ", "False False")],
    ids=["alone", "after torch", "without collections"],
)
def test_garbage_is_collected_as_before(before: str, after: str) -> None:
    """What was imported is left out of collections, but not where a user's models may be among what is there."""
    done = subprocess.run([sys.executable, "-c", before + _AFTER], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[-2] == after
