"""What happens to attention's scores before their softmax, found by asking: the function is evaluated, on a CPU, at a few scores.

Whatever ops a model uses, a causal mask is one that hides the keys after a query, and a scale is what a score is multiplied by. So
nothing needs to be known of the ops, and nothing is believed of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.fx_utils import backward_slice

_HIDDEN = -9000.0  # and less: weights of no key that others outdo by as much
_LARGE = 1024.0  # a score before which rounding of biases vanishes


class UnsupportedScoreModError(ValueError):
    """It is no scaled and causally masked softmax; the message says what it does instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMod:
    """What becomes of the score of head h between a query at position i and a key at j <= i: scale * score - slopes[h] * (i - j).

    Attributes:
        window: how many tokens back a query sees, itself included; 0 for all.
        slopes: [H] float32, or None where all are 0.
    """

    scale: float
    window: int
    slopes: Tensor | None


def infer_score_mod(module: GraphModule, scores: Node, result: object, num_tokens: int) -> ScoreMod:
    """What a graph makes of these scores [1, H, T, T] or [H, T, T] until they are the result.

    Raises:
        UnlikeAttentionError: something else.
        NotImplementedError: it depends on weights that are on the meta device.
    """
    assert isinstance(result, Node)
    evaluate = _Evaluation(module, scores, result, num_tokens)
    at_zero, at_one, at_large = (evaluate(value) for value in (0.0, 1.0, _LARGE))
    seen = at_zero > _HIDDEN
    window = _window(seen)
    factors = ((at_large - at_zero) / _LARGE)[seen]
    scale = float(factors.median())
    exact = torch.finfo(evaluate.dtype).eps * 4
    if not torch.allclose(
        factors, torch.full_like(factors, scale), rtol=exact, atol=0
    ) or not torch.allclose(
        (at_one - at_zero)[seen], factors, rtol=1e-3, atol=exact * float(at_zero[seen].abs().max())
    ):
        raise UnsupportedScoreModError("its scores are not scaled alike before the softmax")
    return ScoreMod(scale=scale, window=window, slopes=_slopes(at_zero, seen, window, exact))


def _window(seen_HTT: Tensor) -> int:
    num_tokens = seen_HTT.shape[-1]
    positions = torch.arange(num_tokens)
    distance = positions[:, None] - positions[None, :]
    count = int(seen_HTT[0, -1].sum())
    window = 0 if count == num_tokens else count
    expected = (distance >= 0) & (distance < (window or num_tokens))
    if not torch.equal(seen_HTT, expected.expand_as(seen_HTT)):
        raise UnsupportedScoreModError("its mask is neither causal nor a causal window")
    return window


def _slopes(bias_HTT: Tensor, seen_HTT: Tensor, window: int, exact: float) -> Tensor | None:
    far = (
        1 << (bias_HTT.shape[-1] - 1).bit_length() - 1
    )  # a power of two, so that low precision rounds it least
    if window and bool(bias_HTT[seen_HTT].any()):
        raise UnsupportedScoreModError("it adds a bias to scores in a window")
    if window:
        return None
    slopes = (bias_HTT[:, far, far] - bias_HTT[:, far, 0]) / far
    positions = torch.arange(bias_HTT.shape[-1])
    expected = bias_HTT[:, :, :1] + slopes[:, None, None] * positions
    largest = float(bias_HTT[seen_HTT].abs().max())
    if not torch.allclose(
        bias_HTT[seen_HTT], expected[seen_HTT], rtol=0, atol=max(exact * largest, 1e-6)
    ):
        raise UnsupportedScoreModError(
            "it adds a bias to scores that does not grow evenly with a key's position"
        )
    return slopes.float() if slopes.any() else None


class _Evaluation:
    """The result for scores that are all alike, as [H, T, T] float64; H is 1 where heads are treated alike."""

    def __init__(self, module: GraphModule, scores: Node, result: Node, num_tokens: int) -> None:
        self._module, self._scores, self._result = module, scores, result
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._given: dict[Node, object] = {node: torch.arange(num_tokens) for node in inputs}
        self._given[inputs[0]] = torch.zeros(num_tokens, dtype=torch.int64)
        length = inputs[0].meta["val"].shape[0]
        self._shape = [
            num_tokens if size == length else int(size) for size in scores.meta["val"].shape
        ]
        given = {scores, *inputs}
        self._needed = backward_slice(result, given.__contains__) - given
        self.dtype: torch.dtype = scores.meta["val"].dtype

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
            (node.args, dict(node.kwargs)), lambda part: _on_cpu(part, values)
        )
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _attribute(self, path: str) -> Tensor:
        value: Any = self._module
        for name in path.split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value


def _on_cpu(part: Any, values: dict[Node, object]) -> Any:
    if isinstance(part, Node):
        return values[part]
    return torch.device("cpu") if isinstance(part, torch.device) else part
