"""Graph passes and the pipeline that runs them on the post-grad graph.

A pass is a function `(graph, context) -> labels` that rewrites a functionalized ATen graph in
place and returns a label for each match. Inductor calls the pipeline as its
`post_grad_custom_pre_pass`, before its own post-grad patterns.

A pass also declares the labels that it must return (`GraphPass.expected`). A missing label raises
`PassError`: a layer that was not rewritten would compute wrong values or run slowly unnoticed.

Example::

    pipeline = Pipeline([MERGE_PROJECTIONS], PassContext(num_tokens=4))
    torch.compile(model, options={"post_grad_custom_pre_pass": pipeline})(x)
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from passes.ops.precompile import KernelCall, kernel_calls

FactsT = TypeVar("FactsT")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """Facts about the step and the model that the graph does not show.

    A pass that needs facts about the model defines a type for them, whose fields have defaults,
    and reads them with `get`.

    Attributes:
        num_tokens: number of tokens that the step processes.
        facts: at most one instance of each type. Their `repr` is part of Inductor's cache key, so
            each is a frozen dataclass of plain values.
    """

    num_tokens: int
    facts: tuple[object, ...] = ()

    def get(self, kind: type[FactsT]) -> FactsT:
        """Return the facts of type `kind`, or `kind()` if the context has none."""
        found = [facts for facts in self.facts if isinstance(facts, kind)]
        return found[0] if found else kind()


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPass:
    """A named graph pass.

    Attributes:
        name: the key of the pass in a config's `passes` and the name in reports and dumps.
        run: rewrites the graph in place and returns a label for each match.
        expected: returns the labels that `run` must return; `run` may return more.
    """

    name: str
    run: Callable[[Graph, PassContext], list[str]]
    expected: Callable[[PassContext], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """The effect of one pass on one graph.

    Attributes:
        name: name of the pass.
        matches: number of labels that it returned.
        expected: number of labels that it had to return.
        seconds: wall time of the pass.
        ops_before: number of `call_function` nodes before the pass.
        ops_after: number of `call_function` nodes after the pass.
    """

    name: str
    matches: int
    expected: int
    seconds: float
    ops_before: int
    ops_after: int


@cache
def source_digest(folder: Path) -> str:
    """Return the SHA-256 of all Python and C++ sources below a folder, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class PassError(RuntimeError):
    """Raised when a pass finds fewer matches than it expects for the model."""


@dataclass
class Pipeline(CustomGraphPass):
    """Run passes in order and report on each; an instance serves one compilation.

    On a hit in its cache, Inductor does not call the pipeline and `reports` stays empty. The
    cached graph was rewritten and checked before by a pipeline of equal `uuid`.

    Attributes:
        passes: the passes, in the order in which they run.
        context: the facts that are passed to each of them.
        dump_dir: folder to which the graph is written before and after each pass, if any.
        reports: one report for each pass, filled by the call.
        kernel_calls: calls of this package's ops in the final graph, filled by the call.
    """

    passes: Sequence[GraphPass]
    context: PassContext
    dump_dir: Path | None = None
    reports: list[PassReport] = field(default_factory=list)
    kernel_calls: list[KernelCall] = field(default_factory=list)

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place.

        Raises:
            PassError: a pass did not return all the labels that it expects.
        """
        for number, graph_pass in enumerate(self.passes):
            self._dump(graph, f"{number}-{graph_pass.name}-before")
            self.reports.append(_run(graph_pass, graph, self.context))
            self._dump(graph, f"{number}-{graph_pass.name}-after")
        graph.eliminate_dead_code()
        graph.lint()
        self.kernel_calls = kernel_calls(graph)

    def uuid(self) -> bytes:
        """Return a digest of the passes' names and order, the context and this package's source.

        Inductor adds it to its cache key. The source of a pass defined outside of this package is
        not part of it.
        """
        names = ",".join(graph_pass.name for graph_pass in self.passes)
        digest = hashlib.sha256(f"{names}|{self.context}".encode())
        digest.update(source_digest(Path(__file__).parent).encode())
        return digest.digest()

    def _dump(self, graph: Graph, stem: str) -> None:
        if self.dump_dir is not None:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            (self.dump_dir / f"{stem}.txt").write_text(f"{graph}\n")


def _run(graph_pass: GraphPass, graph: Graph, context: PassContext) -> PassReport:
    ops_before = _num_ops(graph)
    begin = time.perf_counter()
    matches = graph_pass.run(graph, context)
    expected = graph_pass.expected(context)
    missing = [label for label in expected if label not in matches]
    if missing:
        raise PassError(
            f"pass {graph_pass.name!r} expected {len(expected)} matches and made {len(matches)}; "
            f"it missed {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. The graph "
            f"differs from what the model's config implies: set compile.dump to a directory and "
            f"read the graph that is written there before the pass."
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
