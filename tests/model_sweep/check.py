"""Comparison of our engine with transformers' eager generation for one model.

Greedy tokens must be equal, and logits close within a relative tolerance.
"""

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
BUDGET = 24  # tokens per step
# Lengths of the prompts that run together in each case.
CASES: dict[str, list[int]] = {
    "prefill": [5],
    "bucket edge": [24],
    "past the edge": [25],
    "chunked": [61],
    "ragged": [3, 41, 24],
}


@dataclass
class Comparison:
    """Comparison of one model's outputs with transformers'.

    Attributes:
        exercised: features of the model's attention.
        max_difference: largest relative difference of logits.
        mismatches: a description of each mismatch.
    """

    exercised: str = ""
    max_difference: float = 0.0
    mismatches: list[str] = field(default_factory=list)


class MismatchError(AssertionError):
    """Our engine and transformers disagree."""


def engine_config(dispatch: str) -> Config:
    """Return a config with small limits, so that a few tokens reach the edges of buckets."""
    return parse_config(
        {
            "limits": {"max_num_seqs": 3, "max_num_batched_tokens": BUDGET, "max_model_len": 128},
            "buckets": {"decode": [3], "prefill": [BUDGET], "samplers": ["full"]},
            "compile": {"dispatch": dispatch, "artifact": "off"},
            "strict": dispatch != "eager",
        }
    )


def check(model: PreTrainedModel, dispatch: str) -> Comparison:
    """Compare all cases.

    Raises:
        MismatchError: tokens or logits differ, or the model is insensitive to its inputs.
    """
    comparison = Comparison(exercised=_exercised(model))
    reference = Reference(model)
    check_sensitive(reference)
    with CompiledLLM(model, None, engine_config(dispatch), progress=False) as llm:
        for case, lengths in CASES.items():
            prompts = [random_prompt(length) for length in lengths]
            outputs = generate(llm, prompts)
            for prompt, output in zip(prompts, outputs, strict=True):
                _compare(case, reference(prompt), output, comparison)
    if comparison.mismatches:
        raise MismatchError("; ".join(comparison.mismatches[:4]))
    return comparison


def _exercised(model: PreTrainedModel) -> str:
    with attention_routed(model), fixed_frequencies(model):
        served, layers = examine_model(model)
    return ", ".join([f"{len(layers)} calls", *list_features(served, layers)])


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Return a random prompt without special tokens, the same for equal arguments."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(FIRST_TOKEN, VOCAB_SIZE, (length,), generator=generator).tolist()


class Reference:
    """transformers' greedy generation with eager attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("eager")
        # A plain config, because a model's own may force or suppress tokens.
        self._model.generation_config = GenerationConfig(pad_token_id=0)

    def __call__(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> tuple[list[int], Tensor]:
        """Return L generated tokens and their logits [L, V]."""
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        outputs = {"output_logits": True, "return_dict_in_generate": True}
        model: Any = self._model
        output = model.generate(ids, max_new_tokens=num_tokens, **options, **outputs)
        return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits)


class Recorder:
    """Logits processor that records logits and returns them unchanged."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, ids: LongTensor, logits: FloatTensor) -> FloatTensor:
        self.logits.append(logits.clone())
        return logits


def generate(llm: CompiledLLM, prompts: list[list[int]]) -> list[tuple[list[int], Tensor]]:
    """Run prompts together on our engine; return L tokens and their logits [L, V] for each."""
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
    """Return the largest difference relative to a row's largest value, over all rows [L, V]."""
    return float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max())


def check_sensitive(reference: Reference) -> None:
    """Check that logits depend on attention and positions.

    Swapping the first two tokens must change the logits by much more than the tolerance.

    Raises:
        MismatchError: it does not.
    """
    prompt = random_prompt(12)
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    difference = relative_difference(reference(swapped, 1)[1], reference(prompt, 1)[1])
    if not difference > 10 * TOLERANCE:
        raise MismatchError(
            f"the tiny model is insensitive: swapping two tokens changes its logits by "
            f"{difference:.1e}, expected more than {10 * TOLERANCE:.0e}"
        )


def _compare(
    case: str,
    reference: tuple[list[int], Tensor],
    output: tuple[list[int], Tensor],
    comparison: Comparison,
) -> None:
    """Add one prompt's difference and mismatches to the comparison."""
    expected, expected_logits = reference
    tokens, logits = output
    pairs = enumerate(zip(tokens, expected, strict=True))
    num_equal = next((n for n, (ours, theirs) in pairs if ours != theirs), len(tokens))
    # Logits after a different token have different inputs.
    compared = max(num_equal, 1)
    difference = relative_difference(logits[:compared], expected_logits[:compared])
    if num_equal < len(tokens):
        end = num_equal + 1
        at = relative_difference(logits[:end], expected_logits[:end])
        comparison.mismatches.append(f"{case}: token {num_equal} differs, logits by {at:.1e}")
    elif not difference <= TOLERANCE:
        comparison.mismatches.append(f"{case}: logits differ by {difference:.1e}")
    comparison.max_difference = max(comparison.max_difference, difference)
