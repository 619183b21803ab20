"""The second door into a model: the graph of its forward, for models that compute attention by themselves.

The unmodified forward is exported once, for any number of tokens, with transformers' eager attention; a pass replaces each
attention that it recognises in the graph by a call of ours. What comes of it stands for the model wherever a step calls it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from transformers import PreTrainedModel

from compiled_llm.errors import NeedsWeightsError, UnsupportedModelError
from compiled_llm.models.attention import CURRENT, AttentionCall
from compiled_llm.models.attention_routing import route
from compiled_llm.system.compiler_lock import eager_steps_excluded
from passes.attention_reach import AttentionReach
from passes.export.recognize_attention import replace_attention_subgraphs
from passes.export.score_mod import ScoreMod, UnsupportedScoreModError
from passes.ops.paged_attention import dense_attention

_NUM_TOKENS = 300  # rows on which masks are asked, unless a window is longer
_EXAMPLE = (37, 5)  # tokens and wanted ones while it is traced; any would do but 0 and 1


class Output(NamedTuple):
    """Of a forward."""

    logits: Tensor


class ExportedModel(nn.Module):
    """A model in the form of its forward's graph; all else is the model's own, its parameters too.

    Attributes:
        forward_graph: ids [T], positions [T] and wanted [S], the indices of tokens, -> logits [S, V].
    """

    def __init__(self, model: PreTrainedModel, forward_graph: GraphModule) -> None:
        super().__init__()
        self.model, self.forward_graph = model, forward_graph
        self.config = model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor | None = None,
        use_cache: bool = False,
    ) -> Output:
        """Logits [1, T, V] or [1, S, V] of one row of ids and positions [1, T]."""
        wanted = (
            torch.arange(input_ids.shape[1], device=input_ids.device)
            if logits_to_keep is None
            else logits_to_keep
        )
        return Output(self.forward_graph(input_ids[0], position_ids[0], wanted)[None])


ServedModel = PreTrainedModel | ExportedModel


def underlying_model(served: ServedModel) -> PreTrainedModel:
    """The model, in whatever form it is served."""
    return served.model if isinstance(served, ExportedModel) else served


def trace(model: PreTrainedModel) -> ExportedModel:
    """The graph of an attached model, each attention in it a call of ours.

    Raises:
        UnsupportedModelError: the forward cannot be traced for any number of tokens, or some of it is not like attention.
        UndecidedError: on the meta device, where all else shows, but not which heads share keys.
    """
    with _eager_attention(model):
        call = _Call(model)
        traced, longest = _export(call)
        make = partial(_Attend, device=model.device)
        try:
            replaced = replace_attention_subgraphs(
                traced, make, int(min(_rows_to_ask(model), longest))
            )
        except UnsupportedScoreModError as error:
            raise _refusal(model, str(error)) from error
        except NotImplementedError:
            replaced = None  # what it does depends on values that are not there
        if replaced == []:
            raise _refusal(model, "none is recognised in its graph")
        if model.device.type == "meta":
            raise NeedsWeightsError(
                f"{model.config.model_type}: it computes attention by itself, and what that does is asked when an engine starts"
            )
        traced.graph.eliminate_dead_code(
            lambda node: node.is_impure() and node.target is not torch.ops.aten.detach_.default
        )
        _take_positions(traced.graph)
        traced.recompile()
        _check(call, traced)
    return ExportedModel(model, traced)


class _Attend(nn.Module):
    """What a match becomes: an attention call as the models of transformers' interface make it."""

    slopes: Tensor | None

    def __init__(self, bias: ScoreMod, device: torch.device) -> None:
        super().__init__()
        self._scale, self._reach, self._repeats = bias.scale, AttentionReach.decode(bias.window), 1
        slopes = (
            None if bias.slopes is None else bias.slopes.to(device)
        )  # they were found on the CPU
        self.register_buffer("slopes", slopes, persistent=False)

    def drop_repeats(self, k: Tensor, v: Tensor) -> None:
        """Some models repeat key heads for the query heads that share them: from now on, use only one of those that are equal."""
        H = k.shape[1]
        for repeats in range(2, H + 1):
            groups = (
                [heads.unflatten(1, (-1, repeats)) for heads in (k, v)] if H % repeats == 0 else []
            )
            if groups and all(
                torch.equal(group, group[:, :, :1].expand_as(group)) for group in groups
            ):
                self._repeats = repeats

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert CURRENT.attention is not None
        k, v = (heads[:, :: self._repeats] for heads in (k, v))
        return CURRENT.attention(
            self, q, k, v, AttentionCall(scale=self._scale, reach=self._reach, slopes=self.slopes)
        )


class _Call(nn.Module):
    """The forward that is traced; it is without a cache, so what a model is not told of positions, it cannot know."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def forward(self, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Logits [S, V] of the wanted of a row of tokens [T]."""
        offered: dict[str, Any] = {
            "position_ids": positions[None],
            "attention_mask": torch.ones_like(ids[None]),
            "logits_to_keep": wanted,
            "use_cache": False,
        }
        options = {name: value for name, value in offered.items() if name in self._accepted}
        logits: Tensor = self.model(input_ids=ids[None], **options).logits[0]
        return logits if "logits_to_keep" in options else logits[wanted]


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    with (
        eager_steps_excluded(),
        torch.no_grad(),
    ):  # an export also puts other tensors in the place of parameters
        attention = model.config._attn_implementation
        try:
            route(model, "eager")
            yield
        finally:
            route(model, attention)


def _export(call: _Call) -> tuple[GraphModule, Any]:
    """Its graph for any number of tokens, with the parameters of the model itself, and the most tokens it is good for."""
    tokens, wanted = (torch.arange(count, device=call.model.device) for count in _EXAMPLE)
    any_size = {0: torch.export.Dim.AUTO}
    try:
        exported = torch.export.export(
            call, (tokens, tokens.clone(), wanted), dynamic_shapes=(any_size,) * 3, strict=False
        )
    except Exception as error:  # of any kind, from the model's code or from the tracer's
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refusal(call.model, f"its forward cannot be traced ({said})") from error
    module = exported.module(check_guards=False)
    graph = module.graph
    length = next(node for node in graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    sizes = exported.range_constraints.get(length.node.expr)
    if sizes is None:
        raise _refusal(call.model, "its forward is another one for each number of tokens")
    plain = Graph()  # of plain arguments and one result, and one that pickles
    (logits,) = cast(tuple[Node], plain.graph_copy(graph, {}))
    plain.output(logits)
    return GraphModule(module, plain), sizes.upper


def _take_positions(graph: Graph) -> None:
    """Where a model counts a row's tokens from 0, which are their positions where a row is a sequence, let it take those."""
    ids, positions = [node for node in graph.nodes if node.op == "placeholder"][:2]
    length = ids.meta["val"].shape[0]
    for node in graph.nodes:
        counts = (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target.overloadpacket is torch.ops.aten.arange
        )
        if counts and node.meta["val"].shape[0] == length and node.args[:-1] in ((), (0,)):
            node.replace_all_uses_with(positions)
            graph.erase_node(node)


def _rows_to_ask(model: PreTrainedModel) -> int:
    """Enough for every window that the config speaks of to end within, but no more than it has positions."""
    numbers = {
        name: value for name, value in model.config.to_dict().items() if isinstance(value, int)
    }
    rows = max([_NUM_TOKENS, *(2 * value for name, value in numbers.items() if "window" in name)])
    return min(
        [
            rows,
            *(
                numbers[name]
                for name in ("max_position_embeddings", "max_seq_len")
                if name in numbers
            ),
        ]
    )


@torch.no_grad()
def _check(call: _Call, traced: GraphModule) -> None:
    """The graph with plain attention in it gives what the model gives; and on the way each attention learns what it repeats."""
    tokens = torch.arange(12, device=call.model.device)
    CURRENT.attention = _attend_in_row
    try:
        traced(tokens, tokens, tokens)
        ours, theirs = traced(tokens, tokens, tokens).float(), call(tokens, tokens, tokens).float()
    finally:
        CURRENT.attention = None
    tolerance = 1e-3 if call.model.dtype == torch.float32 else 0.05
    if not (ours - theirs).abs().max() <= tolerance * theirs.abs().max():
        raise _refusal(call.model, "what was taken for attention in its graph is something else")


def _refusal(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    outside = f"{model.config.model_type}: its attention does not go through transformers' attention interface"
    return UnsupportedModelError(f"{outside}, and {why}")


def _attend_in_row(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> Tensor:
    """Plain attention of a row's tokens to each other."""
    assert isinstance(module, _Attend)
    module.drop_repeats(k, v)
    positions = torch.arange(q.shape[2], device=q.device)[None]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    return dense_attention(
        q,
        k,
        v,
        positions,
        positions[:, -1] + 1,
        None,
        call.slopes,
        call.scale,
        call.reach.encode(),
        call.softcap,
    )
