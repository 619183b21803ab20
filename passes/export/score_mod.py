"""Infer the function that a model applies to attention scores before their softmax.

The function is evaluated on a CPU for a few constant scores, and its parameters are read from the
results: a causal mask hides the keys after a query, and the scale is the slope in the score. This
works for any ops that a model uses, and a function of another form is detected rather than
misread.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.attention_reach import FULL, AttentionReach
from passes.fx_utils import backward_slice

# Scores up to this are masked: exp underflows next to any score that is not.
_MASKED = -9000.0
# A score next to which the rounding of biases is negligible.
_LARGE = 1024.0


class UnsupportedScoreModError(ValueError):
    """The function is not of the form of `ScoreMod`; the message says how it differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMod:
    """The function `scale * score - slopes[h] * (i - j)`, and a causal mask.

    It applies to the score of head h, a query at position i and a key at position j <= i.

    Attributes:
        scale: factor of the score.
        reach: the keys that the mask leaves to a query; full or a sliding window.
        slopes: [H] float32 ALiBi slopes, or None if they are all 0.
    """

    scale: float
    reach: AttentionReach
    slopes: Tensor | None


def infer_score_mod(module: GraphModule, scores: Node, result: object, num_tokens: int) -> ScoreMod:
    """Return the function by which `result` is computed from `scores`.

    Args:
        module: the module that holds the graph and its attributes.
        scores: node [1, H, T, T] or [H, T, T], the products of queries and keys.
        result: node of the same shape, the argument of the softmax.
        num_tokens: T of the evaluation. A window of at least that many tokens is not detected.

    Raises:
        UnsupportedScoreModError: the function is of another form.
        NotImplementedError: it depends on weights on the meta device.
    """
    assert isinstance(result, Node)
    evaluate = _Evaluation(module, scores, result, num_tokens)
    at_zero, at_one, at_large = (evaluate(score) for score in (0.0, 1.0, _LARGE))
    visible = at_zero > _MASKED
    reach = _infer_reach(visible)
    tolerance = torch.finfo(evaluate.dtype).eps * 4
    factors = ((at_large - at_zero) / _LARGE)[visible]
    scale = float(factors.median())
    constant = torch.full_like(factors, scale)
    bias_error = tolerance * float(at_zero[visible].abs().max())
    is_constant = torch.allclose(factors, constant, rtol=tolerance, atol=0)
    factors_at_one = (at_one - at_zero)[visible]
    if not is_constant or not torch.allclose(factors_at_one, factors, rtol=1e-3, atol=bias_error):
        raise UnsupportedScoreModError("its scores are not all scaled by one constant")
    slopes = _infer_slopes(at_zero, visible, reach, tolerance)
    return ScoreMod(scale=scale, reach=reach, slopes=slopes)


def _infer_reach(visible_HTT: Tensor) -> AttentionReach:
    num_tokens = visible_HTT.shape[-1]
    positions = torch.arange(num_tokens)
    distance = positions[:, None] - positions[None, :]
    size = int(visible_HTT[0, -1].sum()) or num_tokens
    expected = (distance >= 0) & (distance < size)
    if not torch.equal(visible_HTT, expected.expand_as(visible_HTT)):
        raise UnsupportedScoreModError("its mask is neither causal nor a causal window")
    return FULL if size == num_tokens else AttentionReach.sliding(size)


def _infer_slopes(
    bias_HTT: Tensor, visible_HTT: Tensor, reach: AttentionReach, tolerance: float
) -> Tensor | None:
    """Return ALiBi slopes [H] float32 from the function's values at score 0, or None for zeros."""
    num_tokens = bias_HTT.shape[-1]
    bias = bias_HTT[visible_HTT]
    if not reach.is_full:
        if bool(bias.any()):
            raise UnsupportedScoreModError("it adds a bias to scores in a window")
        return None
    # Measure at the largest power of two, whose products low precision rounds least.
    exponent = (num_tokens - 1).bit_length() - 1
    far = 1 << exponent
    slopes = (bias_HTT[:, far, far] - bias_HTT[:, far, 0]) / far
    expected_HTT = bias_HTT[:, :, :1] + slopes[:, None, None] * torch.arange(num_tokens)
    bound = max(tolerance * float(bias.abs().max()), 1e-6)
    if not torch.allclose(bias, expected_HTT[visible_HTT], rtol=0, atol=bound):
        raise UnsupportedScoreModError(
            "it adds a bias to scores that is not linear in a key's position"
        )
    return slopes.float() if slopes.any() else None


class _Evaluation:
    """Evaluate the function for constant scores, as [H, T, T] float64.

    H is 1 if the function does not depend on the head. `dtype` is that of the model's scores.
    """

    def __init__(self, module: GraphModule, scores: Node, result: Node, num_tokens: int) -> None:
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        length = inputs[0].meta["val"].shape[0]
        sizes = scores.meta["val"].shape
        self.dtype: torch.dtype = scores.meta["val"].dtype
        self._module = module
        self._scores = scores
        self._result = result
        # The first input holds token ids, all others positions.
        self._given: dict[Node, object] = {node: torch.arange(num_tokens) for node in inputs}
        self._given[inputs[0]] = torch.zeros(num_tokens, dtype=torch.int64)
        self._shape = [num_tokens if size == length else int(size) for size in sizes]
        given = {scores, *inputs}
        self._needed = backward_slice(result, given.__contains__) - given

    def __call__(self, score: float) -> Tensor:
        values = {**self._given, self._scores: torch.full(self._shape, score, dtype=torch.float64)}
        for node in self._module.graph.nodes:
            if node in self._needed:
                values[node] = self._run(node, values)
        result = values[self._result]
        assert isinstance(result, Tensor)
        return result.double().reshape(-1, *result.shape[-2:])

    def _run(self, node: Node, values: dict[Node, object]) -> object:
        if node.op == "get_attr":
            return self._attribute(str(node.target)).cpu()
        args, kwargs = map_aggregate(
            (node.args, dict(node.kwargs)), lambda argument: _on_cpu(argument, values)
        )
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _attribute(self, path: str) -> Tensor:
        value: Any = self._module
        for name in path.split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value


def _on_cpu(argument: Any, values: dict[Node, object]) -> Any:
    """Return a node's value, the CPU in place of another device, and other arguments unchanged."""
    if isinstance(argument, Node):
        return values[argument]
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
