"""The registry of torch's private APIs: complete, as installed, and loud when one has changed."""

import ast
import dataclasses
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch._inductor.cpu_vec_isa as cpu_vec_isa

from compiled_llm.system import torch_patches
from compiled_llm.system.torch_patches import CHECK_BUILD, INTERNALS, TREE_MANAGER
from passes import torch_internals
from passes.torch_internals import TorchInternal

ROOT = Path(__file__).parents[2]


def _needs_cuda_build(internal: TorchInternal) -> bool:
    return internal.target.startswith("torch._C:_cuda")


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.target)
def test_each_api_is_as_recorded(internal: TorchInternal) -> None:
    if _needs_cuda_build(internal) and not torch.backends.cuda.is_built():
        pytest.skip("torch was built without CUDA")
    internal.check()
    assert internal.reason
    assert internal.versions


def test_all_records_are_listed() -> None:
    records = {
        value
        for module in (torch_patches, torch_internals)
        for value in vars(module).values()
        if isinstance(value, TorchInternal)
    }
    assert set(INTERNALS) == records
    assert len({internal.target for internal in INTERNALS}) == len(INTERNALS)


def test_a_changed_signature_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code, flags: True)
    with pytest.raises(RuntimeError) as caught:
        CHECK_BUILD.check()
    message = str(caught.value)
    assert CHECK_BUILD.target in message
    assert f"torch {version('torch')}" in message
    assert "expected parameters (self, code), found (self, code, flags)" in message
    assert CHECK_BUILD.reason in message
    assert "Install torch==2.11.0" in message


def test_a_missing_api_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu_vec_isa.VecISA, "check_build")
    with pytest.raises(RuntimeError, match=r"expected the API to exist, found .*check_build"):
        CHECK_BUILD.check()
    gone = TorchInternal(target="torch._no_such_module:name", reason="test")
    with pytest.raises(RuntimeError, match="_no_such_module"), gone.patch(None):
        pass


def test_a_missing_member_fails_loudly() -> None:
    changed = dataclasses.replace(TREE_MANAGER, members=("roots", "no_such_member"))
    with pytest.raises(RuntimeError, match="found no no_such_member"):
        changed.get()


def test_a_patch_is_undone_after_an_error() -> None:
    before = CHECK_BUILD.get()

    def fail() -> None:
        with CHECK_BUILD.patch(lambda self, code: True):
            assert CHECK_BUILD.get() is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert CHECK_BUILD.get() is before


def test_patches_may_be_nested() -> None:
    """The record is checked before the first patch, not against another patch."""
    with CHECK_BUILD.patch(lambda isa, text: True), CHECK_BUILD.patch(lambda isa, text: False):
        assert CHECK_BUILD.get()(None, "") is False


def test_nothing_of_torch_is_patched_outside_the_registry() -> None:
    """Only `TorchInternal.patch`, and the patches of gguf and transformers, call `mock.patch`."""
    allowed = {
        "passes/torch_internals.py",
        "compiled_llm/models/gguf_file.py",
        "compiled_llm/models/loading.py",
    }
    patching = {
        str(path.relative_to(ROOT))
        for package in ("compiled_llm", "passes")
        for path in (ROOT / package).rglob("*.py")
        if any(
            isinstance(node, ast.ImportFrom) and node.module in ("unittest", "unittest.mock")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert patching == allowed
