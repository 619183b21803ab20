"""The key of an artifact changes with the code that a model runs, and only with it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.mutation_guard import GenerationTracker, install_generation_tagging_init
from transformers import PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama import modeling_llama

from compiled_llm import CompiledLLM
from compiled_llm.runtime.artifacts.model_source import identify, library_source, snapshot
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.compilation.compiler import trace_digest
from compiled_llm.runtime.compilation.graph_digest import UndeterminedGraphError
from tests.helpers.tiny_models import small_config, tiny_model

STEP = Bucket("decode", 4, "greedy")


def digest(model: PreTrainedModel, bucket: Bucket = STEP) -> str:
    """Return the digest of the graph of an engine's step."""
    with CompiledLLM(
        model, None, small_config(compile={"dispatch": "eager"}), progress=False
    ) as llm:
        return trace_digest(llm.model_runner.memory.step(llm.model_runner.model, bucket))


@pytest.fixture(scope="module")
def plain() -> str:
    return digest(tiny_model("llama"))


def other_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def a_hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)


def a_hook_for_one_token(model: PreTrainedModel) -> None:
    """Change decode steps of 4 rows and no prefill steps."""
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: out * 2 if out.shape[1] == 4 else out
    )


def a_patched_instance(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = partial(lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)), mlp)


def a_scalar(model: PreTrainedModel) -> None:
    model.model.norm.variance_epsilon = 0.01


def a_notebooks_class(model: PreTrainedModel) -> None:
    scope: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec("class Norm(nn.Module):\n    def forward(self, x):\n        return x / 2\n", scope)
    model.model.norm = scope["Norm"]()


def two_weights_exchanged(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))


CHANGES = [
    other_activation,
    a_hook,
    a_hook_for_one_token,
    a_patched_instance,
    a_scalar,
    a_notebooks_class,
    two_weights_exchanged,
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_computation_is_another_graph(
    change: Callable[[PreTrainedModel], None], plain: str
) -> None:
    model = tiny_model("llama")
    change(model)
    assert digest(model) != plain


def test_the_same_computation_is_the_same_graph(plain: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.config._name_or_path = "/elsewhere"
    assert digest(model) == plain, "other weights in the same places"
    a_hook_for_one_token(model)
    bucket = Bucket("prefill", 16, "greedy")
    assert digest(model, bucket) == digest(tiny_model("llama"), bucket)


def test_code_outside_the_graph_cannot_be_identified() -> None:
    def hidden(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    torch._dynamo.allow_in_graph(hidden)
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: hidden(output))
    with pytest.raises(UndeterminedGraphError, match="hidden, whose code it does not contain"):
        digest(model)
    with pytest.raises(
        ValueError,
        match=r"the code that the model runs cannot be identified: .*hidden, whose code",
    ):
        identify(model, lambda: digest(model), just_loaded=False)


def test_a_loaded_model_is_identified_by_its_source() -> None:
    code = identify(tiny_model("llama"), lambda: pytest.fail("it was traced"), just_loaded=True)
    assert code == identify(tiny_model("llama"), str, just_loaded=True)
    assert code != identify(tiny_model("qwen3"), str, just_loaded=True)
    assert not code.by_graph
    given = identify(tiny_model("llama"), lambda: "0123" * 16, just_loaded=False)
    assert (given.by_graph, given.words) == (True, f"graph {'0123' * 4}")


def _doubled(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (modeling_llama.LlamaMLP, "forward", _doubled),
        (modeling_llama, "apply_rotary_pos_emb", _doubled),
        (nn.functional, "silu", _doubled),
        (nn.Linear, "forward", _doubled),
        (modeling_llama.LlamaMLP, "forward", GemmaMLP.forward),
    ],
)
def test_patched_libraries_are_detected(
    owner: Any, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = library_source(tiny_model("llama"))
    monkeypatch.setattr(owner, name, other)
    assert library_source(tiny_model("llama")) != before
    assert (library_source(tiny_model("llama")) is None) == (other is _doubled)


def test_functions_that_dynamo_replaces_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has used torch.compile can load the artifacts of other processes."""
    model = tiny_model("llama")
    for name in ("__init__", "__setstate__"):  # restored after the test
        monkeypatch.setattr(nn.Module, name, getattr(nn.Module, name))
    before = library_source(model)
    monkeypatch.setattr(nn.Module, "___needs_generation_tag_patch", True, raising=False)
    monkeypatch.setattr(GenerationTracker, "generation", 0)
    install_generation_tagging_init()
    assert nn.Module.__init__.__code__.co_filename.endswith("mutation_guard.py")
    assert library_source(model) == before


def test_other_code_is_identified_by_its_graph() -> None:
    model = tiny_model("llama")
    a_notebooks_class(model)
    assert library_source(model) is None
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert library_source(tiny_model("llama")) is None
    finally:
        hook.remove()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_loading_is_detected(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    assert snapshot(model) == before
    change(model)
    assert snapshot(model) != before
