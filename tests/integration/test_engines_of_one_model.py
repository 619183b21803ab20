"""Several engines on one model, successive or simultaneous, and changes of that model."""

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from compiled_llm import CompiledLLM, startup
from compiled_llm.models.attention import ATTENTION_NAME
from tests.helpers.tiny_models import Reference, greedy, prompt_of, small_config, tiny_model

EAGER = {"dispatch": "eager"}
LAZY = {"capture": "lazy"}  # nothing is compiled until steps have asked for it


def _engine(model: PreTrainedModel, **compiling: str) -> CompiledLLM:
    return CompiledLLM(model, None, small_config(compile=compiling or EAGER), progress=False)


def _is_given_back(model: PreTrainedModel) -> bool:
    ids = torch.tensor([prompt_of(5)], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    return model.config._attn_implementation != ATTENTION_NAME and all(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize("first_to_close", [0, 1])
def test_an_engine_closes_and_the_other_goes_on(first_to_close: int) -> None:
    model = tiny_model("llama")
    reference, prompts = Reference(model), [prompt_of(40), prompt_of(20)]
    engines = [_engine(model), _engine(model)]
    engines.pop(first_to_close).close()
    (other,) = engines
    assert greedy(other, prompts, 8) == [reference(prompt, 8) for prompt in prompts]
    other.close()
    assert _is_given_back(model)


@pytest.mark.parametrize("in_thread", [False, True])
def test_an_engine_that_is_made_again_and_collected(in_thread: bool) -> None:
    """A notebook cell that runs twice replaces its engine; any thread may collect the old one."""
    model = tiny_model("llama")
    reference, prompt = Reference(model), prompt_of(20)
    llm = _engine(model)
    greedy(llm, [prompt], 4)
    llm = _engine(model)
    if in_thread:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    gc.collect()
    assert greedy(llm, [prompt], 8) == [reference(prompt, 8)]
    del llm
    gc.collect()
    assert _is_given_back(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("phase", ["examine", "merged", "ModelRunner", "_facts"])
def test_a_start_that_fails_gives_the_model_back(
    phase: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")

    def fail(*_: object, **__: object) -> None:
        raise error("here")

    monkeypatch.setattr(startup, phase, fail)
    with pytest.raises(error, match="here"):
        _engine(model)
    assert _is_given_back(model)


def _moved(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data.clone()


def _replaced(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False, device=model.device)


def _new_parameter(model: PreTrainedModel) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


def _converted(model: PreTrainedModel) -> None:
    model.to(torch.float64)


def _other_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")


def _training(model: PreTrainedModel) -> None:
    model.train()


CHANGES: dict[Callable[[PreTrainedModel], None], str] = {
    _moved: "the model's weight model.layers.0.self_attn.k_proj.weight was moved",
    _new_parameter: "the model's weight lm_head.weight was moved",
    _converted: "was moved while an engine works on it: close this engine and make a new one",
    _replaced: "the model's module model.layers.1.mlp.up_proj was replaced",
    _other_attention: "the model's attention was changed",
    _training: "the model was put into training mode",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_under_its_engine_is_refused(
    change: Callable[[PreTrainedModel], None],
) -> None:
    """Recorded graphs contain the addresses of weights, so a changed model is refused."""
    model, prompt = tiny_model("llama"), prompt_of(20)
    with _engine(model, **LAZY) as llm:
        change(model)
        with pytest.raises(RuntimeError, match=CHANGES[change]):
            llm.generate([prompt])
        with pytest.raises(RuntimeError, match=CHANGES[change]):
            llm.model_runner.capture_next()


def test_weights_that_get_other_values_in_place_are_served() -> None:
    model, prompt = tiny_model("llama"), prompt_of(20)
    with _engine(model, **LAZY) as llm:
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        assert greedy(llm, [prompt], 4) == [Reference(model)(prompt, 4)]


def test_an_eager_engine_follows_weights_wherever_they_are() -> None:
    model, prompt = tiny_model("llama"), prompt_of(20)
    with _engine(model) as llm:
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight, requires_grad=False)
        assert greedy(llm, [prompt], 4) == [Reference(model)(prompt, 4)]
