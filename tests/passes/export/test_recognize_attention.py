"""Recognition of attention in exported graphs: matches, replacements and rejected functions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from passes.attention_reach import AttentionReach
from passes.export.recognize_attention import replace_attention_subgraphs
from passes.export.score_mod import ScoreMod, UnsupportedScoreModError

HEADS, DIM, ROWS = 2, 8, 40
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Attention between two projections; `core` takes q, k and v [1, H, T, D]."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.qkv, self.out, self.core = nn.Linear(16, 48), nn.Linear(16, 16), core

    def forward(self, x_TK: Tensor) -> Tensor:
        q, k, v = self.qkv(x_TK)[None].view(1, -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(self.core(q, k, v).transpose(1, 2).reshape(x_TK.shape[0], -1))
        return out


class Attend(nn.Module):
    """The replacement of a match: attention with the inferred parameters."""

    def __init__(self, score_mod: ScoreMod) -> None:
        super().__init__()
        self.score_mod = score_mod

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[2]
        distance = torch.arange(T)[:, None] - torch.arange(T)
        score_mod = self.score_mod
        slopes = torch.zeros(HEADS) if score_mod.slopes is None else score_mod.slopes
        scores = q @ k.transpose(-1, -2) * score_mod.scale - slopes[:, None, None] * distance
        visible = (distance >= 0) & (distance < (score_mod.reach.size or T))
        return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def _distance(scores: Tensor) -> Tensor:
    T = scores.shape[-1]
    return torch.arange(T)[:, None] - torch.arange(T)


def _softmax(scores: Tensor, v: Tensor, window: int = 10**6) -> Tensor:
    hidden = (_distance(scores) < 0) | (_distance(scores) >= window)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _softmax(q @ k.transpose(-1, -2) / 3, v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _softmax(q @ k.transpose(-1, -2), v, window=7)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores /= 2
    scores += torch.where(_distance(scores) < 0, -1e4, 0.0)
    return scores.softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without a batch dim; `baddbmm` adds the bias, which grows from the first key on."""
    bias = torch.tensor([0.5, 0.25])[:, None, None] * torch.arange(q.shape[2])
    q, k, v = (x[0] for x in (q, k, v))
    return _softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.25), v)[None]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=_distance(q @ q.transpose(-1, -2)) >= 0, scale=0.1
    )


MATCHES: dict[Core, tuple[float, int, list[float]]] = {
    plain: (1 / 3, 0, []),
    window: (1.0, 7, []),
    in_place: (0.5, 0, []),
    alibi: (0.25, 0, [0.5, 0.25]),
    sdpa: (DIM**-0.5, 0, []),
    sdpa_masked: (0.1, 0, []),
}


def _replaced(core: Core) -> tuple[nn.Module, torch.fx.GraphModule, list[ScoreMod]]:
    torch.manual_seed(0)
    layer = Layer(core).eval()
    with torch.no_grad():
        exported = torch.export.export(
            layer,
            (torch.randn(37, 16),),
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            strict=False,
        )
    module = exported.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    found = list[ScoreMod]()

    def make(score_mod: ScoreMod) -> nn.Module:
        found.append(score_mod)
        return Attend(score_mod)

    replace_attention_subgraphs(module, make, ROWS)
    return layer, module, found


@pytest.mark.parametrize("core", MATCHES, ids=lambda core: core.__name__)
@torch.no_grad()
def test_attention_is_replaced(core: Core) -> None:
    layer, module, (score_mod,) = _replaced(core)
    scale, window, slopes = MATCHES[core]
    assert score_mod.scale == pytest.approx(scale, rel=1e-6)
    assert score_mod.reach == AttentionReach.decode(window)
    assert ([] if score_mod.slopes is None else score_mod.slopes.tolist()) == slopes
    assert not any("softmax" in str(node.target) for node in module.graph.nodes)
    for num_tokens in (1, 2, 50):
        x = torch.randn(num_tokens, 16)
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _softmax(torch.tanh(q @ k.transpose(-1, -2)), v)


def bucketed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return _softmax(scores + (_distance(scores) > 5) * 2.0, v)


def keys_scaled_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    return _softmax(scores * torch.arange(1, scores.shape[-1] + 1), v)


UNSUPPORTED: dict[Core, str] = {
    bidirectional: "its mask is neither causal",
    capped: "its scores are not all scaled by one constant",
    bucketed: "a bias to scores that is not linear",
    keys_scaled_apart: "its scores are not all scaled by one constant",
}


@pytest.mark.parametrize("core", UNSUPPORTED, ids=lambda core: core.__name__)
def test_unsupported_functions_are_named(core: Core) -> None:
    with pytest.raises(UnsupportedScoreModError, match=UNSUPPORTED[core]):
        _replaced(core)


def test_modified_weights_do_not_match() -> None:
    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        return (scores.masked_fill(_distance(scores) < 0, float("-inf")).softmax(-1) * 2) @ v

    assert _replaced(gated)[2] == []
