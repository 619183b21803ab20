"""The instruction set depends on the processor's features, in any order."""

from pathlib import Path

import pytest

from compiled_llm.system import cpu
from compiled_llm.system.cpu import instruction_set


def _of(cpuinfo: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path.write_text(cpuinfo)
    monkeypatch.setattr(cpu, "_CPUINFO", path)
    return instruction_set.__wrapped__()


def test_one_more_instruction_is_another_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = "processor\t: {n}\nmodel name\t: A\ncpu MHz\t: {n}000\nflags\t\t: {flags}\n\n"
    sets = {
        name: _of(
            "".join(cpu.format(n=n, flags=flags) for n in range(2)),
            tmp_path / "cpuinfo",
            monkeypatch,
        )
        for name, flags in {
            "a": "fpu avx2 fma",
            "b": "fma fpu avx2",
            "c": "fpu avx2 fma avx512f",
        }.items()
    }
    assert sets["a"] == sets["b"] != sets["c"]


def test_arm_has_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (
        _of(f"Features\t: {names}\n", tmp_path / "cpuinfo", monkeypatch)
        for names in ("fp asimd", "fp asimd sve")
    )
    assert one != other
