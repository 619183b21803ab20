"""One model on our engine against transformers' eager generation: tokens equal, logits within a relative tolerance."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import GenerationConfig, PreTrainedModel

from compiled_llm import CompiledLLM, SamplingParams
from compiled_llm.config.loader import parse_config
from compiled_llm.config.schema import Config
from compiled_llm.models.attention_routing import attention_routed
from compiled_llm.models.discovery import examine_model
from compiled_llm.models.model_features import list_features
from compiled_llm.models.rotary import fixed_frequencies
from tests.model_sweep.tiny_configs import FIRST_TOKEN, VOCAB_SIZE

TOLERANCE = 1e-4
NUM_TOKENS = 13  # one by prefill, twelve by decode
BUDGET = 24  # tokens a step
# Each case's prompts run at once: a plain prefill, the edges of the buckets, a prompt in chunks, a ragged batch.
CASES: dict[str, list[int]] = {
    "prefill": [5],
    "bucket edge": [24],
    "past the edge": [25],
    "chunked": [61],
    "ragged": [3, 41, 24],
}


@dataclass
class Found:
    """What was found of one model: what its attention has, the largest relative difference of logits, and what is wrong."""

    exercised: str = ""
    largest: float = 0.0
    wrong: list[str] = field(default_factory=list)


class MismatchError(AssertionError):
    """Our engine and transformers disagree."""


def engine_config(dispatch: str) -> Config:
    """Small limits, so that a few tokens reach every edge."""
    return parse_config(
        {
            "limits": {"max_num_seqs": 3, "max_num_batched_tokens": BUDGET, "max_model_len": 128},
            "buckets": {"decode": [3], "prefill": [BUDGET], "samplers": ["full"]},
            "compile": {"dispatch": dispatch, "artifact": "off"},
            "strict": dispatch != "eager",
        }
    )


def check(model: PreTrainedModel, dispatch: str) -> Found:
    """What was found over all cases.

    Raises:
        MismatchError: tokens or logits differ, or the model would not show it if they did.
    """
    found = Found(exercised=_exercised(model))
    reference = Reference(model)
    check_sensitive(reference)
    with CompiledLLM(model, None, engine_config(dispatch), progress=False) as llm:
        for case, lengths in CASES.items():
            prompts = [random_prompt(length) for length in lengths]
            outputs = generate(llm, prompts)
            for prompt, (tokens, logits) in zip(prompts, outputs, strict=True):
                _compare(case, reference(prompt), tokens, logits, found)
    if found.wrong:
        raise MismatchError("; ".join(found.wrong[:4]))
    return found


def _exercised(model: PreTrainedModel) -> str:
    with attention_routed(model), fixed_frequencies(model):
        served, layers = examine_model(model)
    return ", ".join([f"{len(layers)} calls", *list_features(served, layers)])


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(FIRST_TOKEN, VOCAB_SIZE, (length,), generator=generator).tolist()


class Reference:
    """transformers' own greedy generation with eager attention: tokens, and the logits [L, V] that they came from."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("eager")
        self._model.generation_config = GenerationConfig(
            pad_token_id=0
        )  # no tokens forced or suppressed

    def __call__(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> tuple[list[int], Tensor]:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        outputs = {"output_logits": True, "return_dict_in_generate": True}
        model: Any = self._model
        output = model.generate(ids, max_new_tokens=num_tokens, **options, **outputs)
        return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits)


class Recorder:
    """A logits processor that keeps what it is given and changes nothing."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, ids: LongTensor, logits: FloatTensor) -> FloatTensor:
        self.logits.append(logits.clone())
        return logits


def generate(llm: CompiledLLM, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Tokens and logits of prompts that run at once on our engine."""
    recorders = [Recorder() for _ in prompts]
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    outputs = llm.generate(
        prompts,
        [SamplingParams(logits_processors=[recorder], **options) for recorder in recorders],
        progress=False,
    )
    return [
        (output.outputs[0].token_ids, torch.cat(recorder.logits))
        for output, recorder in zip(outputs, recorders, strict=True)
    ]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value, row by row."""
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


def check_sensitive(reference: Reference) -> None:
    """Two early tokens swapped show in the logits well above the tolerance: attention and positions have a say."""
    prompt = random_prompt(12)
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    difference = relative_difference(reference(swapped, 1)[1], reference(prompt, 1)[1])
    if not difference > 10 * TOLERANCE:
        raise MismatchError(
            f"the tiny model tells nothing: swapped tokens change its logits by {difference:.1e} only"
        )


def _compare(
    case: str, theirs: tuple[list[int], Tensor], tokens: list[int], logits: Tensor, found: Found
) -> None:
    expected, expected_logits = theirs
    same = next(
        (n for n, (ours, right) in enumerate(zip(tokens, expected, strict=True)) if ours != right),
        len(tokens),
    )
    shown = max(same, 1)  # after a token that differs, nothing can be compared
    difference = relative_difference(logits[:shown], expected_logits[:shown])
    if same < len(tokens):
        at = relative_difference(logits[: same + 1], expected_logits[: same + 1])
        found.wrong.append(f"{case}: token {same} differs, logits by {at:.1e}")
    elif not difference <= TOLERANCE:
        found.wrong.append(f"{case}: logits differ by {difference:.1e}")
    found.largest = max(found.largest, difference)
