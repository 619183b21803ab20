"""Export a model that computes attention without transformers' attention interface.

The unmodified forward is exported once, for any number of tokens, with transformers' eager
attention. A pass replaces each attention that it recognises in the graph by an attention call of
the engine. The resulting `ExportedModel` takes the model's place in a step.
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
from passes.export.recognize_attention import replace_attention_subgraphs
from passes.export.score_mod import ScoreMod, UnsupportedScoreModError
from passes.ops.paged_attention import dense_attention

_NUM_TOKENS = 300  # rows for which masks are evaluated, unless a window is longer
_EXAMPLE = (37, 5)  # tokens and selected tokens of the traced call; 0 and 1 would be specialised


class CausalLMOutput(NamedTuple):
    """The output of a forward."""

    logits: Tensor


class ExportedModel(nn.Module):
    """A model whose forward is an exported graph; parameters and config are the model's own.

    Args:
        model: the model.
        forward_graph: maps ids [T], positions [T] and the indices [S] of selected tokens to their
            logits [S, V].
    """

    def __init__(self, model: PreTrainedModel, forward_graph: GraphModule) -> None:
        super().__init__()
        self.model = model
        self.forward_graph = forward_graph
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
    ) -> CausalLMOutput:
        """Return the logits [1, T, V] or [1, S, V] of ids and positions [1, T].

        Args:
            input_ids: the tokens.
            position_ids: their positions.
            logits_to_keep: indices [S] of the tokens whose logits are returned; None for all.
            use_cache: ignored; attention calls use the engine's cache.
        """
        selected = logits_to_keep
        if selected is None:
            selected = torch.arange(input_ids.shape[1], device=input_ids.device)
        return CausalLMOutput(self.forward_graph(input_ids[0], position_ids[0], selected)[None])


ServedModel = PreTrainedModel | ExportedModel


def underlying_model(served: ServedModel) -> PreTrainedModel:
    """Return the transformers model of either form."""
    return served.model if isinstance(served, ExportedModel) else served


def export_model(model: PreTrainedModel) -> ExportedModel:
    """Export a routed model, with each attention replaced by a call of the engine's.

    Raises:
        UnsupportedModelError: the forward cannot be traced for any number of tokens, or a part of
            it that resembles attention computes something else.
        NeedsWeightsError: the model is on the meta device, where key heads cannot be compared.
    """
    with _eager_attention(model):
        call = _TracedCall(model)
        traced, longest = _export(call)
        make_call = partial(_AttentionCallModule, device=model.device)
        num_tokens = int(min(_num_tokens_to_evaluate(model), longest))
        try:
            replaced = replace_attention_subgraphs(traced, make_call, num_tokens)
        except UnsupportedScoreModError as error:
            raise _unsupported(model, str(error)) from error
        except NotImplementedError:
            replaced = None  # on the meta device, an operator needs values
        if replaced == []:
            raise _unsupported(model, "none is recognised in its graph")
        if model.device.type == "meta":
            raise NeedsWeightsError(
                f"{model.config.model_type}: it computes attention itself, and what its attention "
                "does is determined when an engine starts"
            )
        traced.graph.eliminate_dead_code(
            lambda node: node.is_impure() and node.target is not torch.ops.aten.detach_.default
        )
        _use_positions(traced.graph)
        traced.recompile()
        _verify(call, traced)
    return ExportedModel(model, traced)


class _AttentionCallModule(nn.Module):
    """The replacement of a recognised attention: a call as from transformers' interface."""

    slopes: Tensor | None

    def __init__(self, score_mod: ScoreMod, device: torch.device) -> None:
        super().__init__()
        self._scale = score_mod.scale
        self._reach = score_mod.reach
        self._repeats = 1
        # Scores are evaluated on the CPU.
        slopes = None if score_mod.slopes is None else score_mod.slopes.to(device)
        self.register_buffer("slopes", slopes, persistent=False)

    def drop_repeats(self, k: Tensor, v: Tensor) -> None:
        """Detect key heads that the model repeats for several query heads; use one of each."""
        H = k.shape[1]
        for repeats in range(2, H + 1):
            if H % repeats:
                continue
            groups = [heads.unflatten(1, (-1, repeats)) for heads in (k, v)]
            if all(torch.equal(group, group[:, :, :1].expand_as(group)) for group in groups):
                self._repeats = repeats

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert CURRENT.attention is not None
        k, v = (heads[:, :: self._repeats] for heads in (k, v))
        call = AttentionCall(scale=self._scale, reach=self._reach, slopes=self.slopes)
        return CURRENT.attention(self, q, k, v, call)


class _TracedCall(nn.Module):
    """The call that is traced.

    It passes no cache, so that a model which infers positions has only the token's index to use.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._accepted = frozenset(inspect.signature(model.forward).parameters)

    def forward(self, ids: Tensor, positions: Tensor, selected: Tensor) -> Tensor:
        """Return the logits [S, V] of the selected of a row of tokens [T]."""
        offered: dict[str, Any] = {
            "position_ids": positions[None],
            "attention_mask": torch.ones_like(ids[None]),
            "logits_to_keep": selected,
            "use_cache": False,
        }
        options = {name: value for name, value in offered.items() if name in self._accepted}
        logits: Tensor = self.model(input_ids=ids[None], **options).logits[0]
        return logits if "logits_to_keep" in options else logits[selected]


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    # An export replaces parameters temporarily, so no eager step may run at the same time.
    with eager_steps_excluded(), torch.no_grad():
        attention = model.config._attn_implementation
        try:
            route(model, "eager")
            yield
        finally:
            route(model, attention)


def _export(call: _TracedCall) -> tuple[GraphModule, Any]:
    """Return the call's graph for any number of tokens, and the most tokens it is valid for.

    The graph uses the parameters of the model itself.
    """
    tokens, selected = (torch.arange(count, device=call.model.device) for count in _EXAMPLE)
    any_size = {0: torch.export.Dim.AUTO}
    try:
        exported = torch.export.export(
            call, (tokens, tokens.clone(), selected), dynamic_shapes=(any_size,) * 3, strict=False
        )
    except Exception as error:  # of any class, from the model's code or from the tracer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _unsupported(call.model, f"its forward cannot be traced ({reason})") from error
    module = exported.module(check_guards=False)
    graph = module.graph
    length = next(node for node in graph.nodes if node.op == "placeholder").meta["val"].shape[0]
    sizes = exported.range_constraints.get(length.node.expr)
    if sizes is None:
        raise _unsupported(call.model, "its graph depends on the number of tokens")
    # Copy the graph without the export's input and output trees, which cannot be pickled.
    plain = Graph()
    (logits,) = cast(tuple[Node], plain.graph_copy(graph, {}))
    plain.output(logits)
    return GraphModule(module, plain), sizes.upper


def _use_positions(graph: Graph) -> None:
    """Replace `arange` over the row's tokens, which models use as positions, by the positions."""
    ids, positions = [node for node in graph.nodes if node.op == "placeholder"][:2]
    length = ids.meta["val"].shape[0]
    for node in graph.nodes:
        is_arange = (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target.overloadpacket is torch.ops.aten.arange
        )
        if is_arange and node.meta["val"].shape[0] == length and node.args[:-1] in ((), (0,)):
            node.replace_all_uses_with(positions)
            graph.erase_node(node)


def _num_tokens_to_evaluate(model: PreTrainedModel) -> int:
    """Return a number of tokens beyond every window of the config, within its positions."""
    numbers = {
        name: value for name, value in model.config.to_dict().items() if isinstance(value, int)
    }
    windows = [2 * value for name, value in numbers.items() if "window" in name]
    limits = [
        numbers[name] for name in ("max_position_embeddings", "max_seq_len") if name in numbers
    ]
    return min([max([_NUM_TOKENS, *windows]), *limits])


@torch.no_grad()
def _verify(call: _TracedCall, traced: GraphModule) -> None:
    """Check that the graph gives the model's logits; also let its calls detect repeated heads."""
    tokens = torch.arange(12, device=call.model.device)
    CURRENT.attention = _attend_within_row
    try:
        traced(tokens, tokens, tokens)  # detects repeated heads, which the next call leaves out
        ours, theirs = traced(tokens, tokens, tokens).float(), call(tokens, tokens, tokens).float()
    finally:
        CURRENT.attention = None
    tolerance = 1e-3 if call.model.dtype == torch.float32 else 0.05
    if not (ours - theirs).abs().max() <= tolerance * theirs.abs().max():
        raise _unsupported(call.model, "a part of its graph that resembles attention is not")


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.config.model_type}: its attention does not go through transformers' attention "
        f"interface, and {reason}"
    )


def _attend_within_row(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> Tensor:
    """Compute causal attention of a row's tokens to each other, without a cache."""
    assert isinstance(module, _AttentionCallModule)
    module.drop_repeats(k, v)
    positions = torch.arange(q.shape[2], device=q.device)[None]
    lengths = positions[:, -1] + 1
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    options = (None, call.slopes, call.scale, call.reach.encode(), call.softcap)
    return dense_attention(q, k, v, positions, lengths, *options)
