"""The pipeline: order, reports, dumps, missing matches, and the key of Inductor's cache."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Graph

from passes import PASSES, GraphPass, PassContext, PassError, Pipeline
from passes.fx_utils import insert_call
from passes.pipeline import source_digest

aten = torch.ops.aten


@dataclass(frozen=True)
class Divisions:
    """Facts of the test's pass."""

    labels: tuple[str, ...] = ()


def _multiply(graph: Graph, context: PassContext) -> list[str]:
    nodes = graph.find_nodes(op="call_function", target=aten.div.Tensor)
    for node in nodes:
        with graph.inserting_before(node):
            product = insert_call(graph, aten.mul.Tensor, node.args[0], 1 / node.args[1])
        node.replace_all_uses_with(product)
    return [f"division {number}" for number in range(len(nodes))]


def _expected(context: PassContext) -> list[str]:
    return list(context.get(Divisions).labels)


MULTIPLY = GraphPass(name="multiply", run=_multiply, expected=_expected)
NOTHING = GraphPass(name="nothing", run=lambda *_: [], expected=lambda context: [])


def make_graph() -> Graph:
    """Return a graph of two divisions."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch._subclasses.FakeTensorMode().from_tensor(torch.empty(3))
    once = graph.call_function(aten.div.Tensor, (x, 2.0))
    once.meta["val"] = x.meta["val"]
    graph.output(graph.call_function(aten.div.Tensor, (once, 4.0)))
    return graph


def test_passes_run_in_order_and_report() -> None:
    graph = make_graph()
    context = PassContext(num_tokens=1, facts=(Divisions(("division 0", "division 1")),))
    pipeline = Pipeline([NOTHING, MULTIPLY], context)
    pipeline(graph)
    nothing, multiply = pipeline.reports
    assert (nothing.name, nothing.matches, nothing.expected) == ("nothing", 0, 0)
    assert (multiply.name, multiply.matches, multiply.expected) == ("multiply", 2, 2)
    assert (multiply.ops_before, multiply.ops_after) == (2, 4)
    assert multiply.seconds >= 0
    # Unused nodes are eliminated after all passes.
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [aten.mul.Tensor, aten.mul.Tensor]
    assert pipeline.kernel_calls == []


def test_missing_matches_are_named() -> None:
    labels = tuple(f"division {number}" for number in range(9))
    context = PassContext(num_tokens=1, facts=(Divisions(labels),))
    with pytest.raises(PassError) as raised:
        Pipeline([MULTIPLY], context)(make_graph())
    assert str(raised.value).startswith(
        "pass 'multiply' expected 9 matches and made 2; it missed division 2, division 3, "
        "division 4, division 5, division 6, ...."
    )


def test_graphs_are_dumped_before_and_after(tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    Pipeline([NOTHING, MULTIPLY], PassContext(num_tokens=1), dump_dir=folder)(make_graph())
    assert sorted(path.name for path in folder.iterdir()) == [
        "0-nothing-after.txt",
        "0-nothing-before.txt",
        "1-multiply-after.txt",
        "1-multiply-before.txt",
    ]
    assert "aten.mul.Tensor" not in (folder / "1-multiply-before.txt").read_text()
    assert "aten.mul.Tensor" in (folder / "1-multiply-after.txt").read_text()


def test_uuid_depends_on_passes_order_and_context() -> None:
    context = PassContext(num_tokens=1)
    facts = replace(context, facts=(Divisions(("a",)),))
    pipelines = [
        Pipeline([NOTHING, MULTIPLY], context),
        Pipeline([MULTIPLY, NOTHING], context),
        Pipeline([MULTIPLY], context),
        Pipeline([MULTIPLY], replace(context, num_tokens=2)),
        Pipeline([MULTIPLY], facts),
    ]
    assert len({pipeline.uuid() for pipeline in pipelines}) == len(pipelines)
    assert pipelines[-1].uuid() == Pipeline([MULTIPLY], facts).uuid()


def test_source_digest_depends_on_names_and_contents(tmp_path: Path) -> None:
    digests = set()
    for number, (name, content) in enumerate([("a.py", "x"), ("a.py", "y"), ("b.cpp", "y")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_text(content)
        (folder / "notes.txt").write_text(str(number))
        digests.add(source_digest(folder))
    assert len(digests) == 3


def test_context_returns_facts_by_type() -> None:
    facts = Divisions(("a",))
    assert PassContext(num_tokens=1, facts=("other", facts)).get(Divisions) is facts
    assert PassContext(num_tokens=1).get(Divisions) == Divisions()


def test_passes_are_registered_by_name() -> None:
    assert list(PASSES) == [
        "lower_attention_marker",
        "rotary_outer_product",
        "hoist_step_invariants",
        "merge_projections",
        "fuse_skinny_linear",
    ]
    assert all(name == graph_pass.name for name, graph_pass in PASSES.items())


def test_inductor_runs_the_pipeline() -> None:
    def halve(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 8.0)

    context = PassContext(num_tokens=1, facts=(Divisions(("division 0",)),))
    pipeline = Pipeline([MULTIPLY], context)
    options: dict[str, Any] = {"post_grad_custom_pre_pass": pipeline, "fx_graph_cache": False}
    x = torch.randn(4)
    actual = torch.compile(halve, fullgraph=True, options=options)(x)
    torch.testing.assert_close(actual, halve(x))
    assert [report.matches for report in pipeline.reports] == [1]
