"""Ordered graph passes, run by Inductor on the functional ATen graph just before its own post-grad patterns.

A pass is a function `(graph, context) -> matches`, where matches are the labels of the places it rewrote. It says what
it must find through `expected`; finding less is an error, because a layer left behind is a layer that runs wrong.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from passes.ops.precompile import KernelCall, kernel_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What the passes may know of the model and the step without the graph.

    Attributes:
        layers: the qualified name of the module behind each attention call, in call order.
        rotary_embeddings: how many rotary embeddings the model computes a step.
        merged_projections: the names of the weights in each storage that several of them fill, in their order there.
        num_tokens: how many tokens the step takes.
    """

    layers: tuple[str, ...]
    rotary_embeddings: int
    merged_projections: tuple[tuple[str, ...], ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPass:
    """A named pass: `run` rewrites the graph in place and returns a label for each match; `expected` lists them all."""

    name: str
    run: Callable[[Graph, PassContext], list[str]]
    expected: Callable[[PassContext], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass did to one graph. `seconds` is wall time; ops are the graph's calls."""

    name: str
    matches: int
    expected: int
    seconds: float
    ops_before: int
    ops_after: int


@cache
def source_digest(folder: Path) -> str:
    """Changes with any of the folder's source files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class PassError(RuntimeError):
    """A pass found less than the model's config says is there."""


@dataclass
class Pipeline(CustomGraphPass):
    """Runs passes in order and reports on each; an instance serves one compilation.

    Inductor's cache may answer in the passes' stead: `reports` is then empty, and the graph it serves is one that the same
    passes, by `uuid`, have rewritten and checked before.

    Args:
        passes: in the order in which they run.
        context: see `PassContext`.
        dump_dir: where to write the graph before and after each pass; nowhere when None.
        kernel_calls: of the graph that the passes left.
    """

    passes: Sequence[GraphPass]
    context: PassContext
    dump_dir: Path | None = None
    reports: list[PassReport] = field(default_factory=list)
    kernel_calls: list[KernelCall] = field(default_factory=list)

    def __call__(self, graph: Graph) -> None:
        for number, graph_pass in enumerate(self.passes):
            self._dump(graph, f"{number}-{graph_pass.name}-before")
            self.reports.append(_run(graph_pass, graph, self.context))
            self._dump(graph, f"{number}-{graph_pass.name}-after")
        graph.eliminate_dead_code()
        graph.lint()
        self.kernel_calls = kernel_calls(graph)

    def uuid(self) -> bytes:
        """Everything the rewritten graph depends on: the passes, their order, the context, and all of this package's source."""
        names = ",".join(graph_pass.name for graph_pass in self.passes)
        digest = hashlib.sha256(f"{names}|{self.context}".encode())
        digest.update(source_digest(Path(__file__).parent).encode())
        return digest.digest()

    def _dump(self, graph: Graph, stem: str) -> None:
        if self.dump_dir is not None:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            (self.dump_dir / f"{stem}.txt").write_text(f"{graph}\n")


def _run(graph_pass: GraphPass, graph: Graph, context: PassContext) -> PassReport:
    ops_before, begin = _num_ops(graph), time.perf_counter()
    matches, expected = graph_pass.run(graph, context), graph_pass.expected(context)
    missing = [label for label in expected if label not in matches]
    if missing:
        raise PassError(
            f"pass {graph_pass.name!r} expected {len(expected)} matches and made {len(matches)}; it missed "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. The graph is not what the model's config says: "
            f"compile with compile.dump set to a directory and read the graph before the pass."
        )
    return PassReport(
        name=graph_pass.name,
        matches=len(matches),
        expected=len(expected),
        seconds=time.perf_counter() - begin,
        ops_before=ops_before,
        ops_after=_num_ops(graph),
    )


def _num_ops(graph: Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)
