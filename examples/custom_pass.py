"""Write a graph pass and run it in a `torch.compile` of your own, through `passes.Pipeline`.

    python examples/custom_pass.py

The pass replaces divisions by a power of two with multiplications by its reciprocal, which give
the same bits. Prints the post-grad graph before and after the pass, what the pass matched, and
whether the result of the compiled model equals eager. A pass that misses a layer is an error.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import Graph

from passes import GraphPass, PassContext, Pipeline

aten = torch.ops.aten
NUM_LAYERS = 2
# The reciprocals of these are exact, also in float16.
POWERS_OF_TWO = {2.0**exponent for exponent in range(-10, 11)}


class Residual(nn.Module):
    """Add a scaled projection to the input, in each of `NUM_LAYERS` layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x) / 8.0)
        return x


def _run(graph: Graph, context: PassContext) -> list[str]:
    """Rewrite the graph in place; return a label for each match, in graph order."""
    labels: list[str] = []
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        x, divisor = node.args
        if divisor in POWERS_OF_TWO:
            with graph.inserting_before(node):
                product = graph.call_function(aten.mul.Tensor, (x, 1 / divisor))
            product.meta.update(node.meta)  # the same shape, dtype and strides
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            labels.append(f"layer {len(labels)}")
    return labels


def _expected(context: PassContext) -> list[str]:
    """Return the labels that `_run` must return; a missing one raises `PassError`."""
    return [f"layer {layer}" for layer in range(NUM_LAYERS)]


DIVISION_TO_PRODUCT = GraphPass(name="division_to_product", run=_run, expected=_expected)


def main() -> None:
    """Compile with the pass, print its graphs and its report, and compare with eager."""
    model, x = Residual(), torch.randn(4, 16)
    context = PassContext(num_tokens=4)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        pipeline = Pipeline([DIVISION_TO_PRODUCT], context, dump_dir=Path(directory))
        # From its cache, Inductor would return a graph that was rewritten before, and run no pass.
        options = {"post_grad_custom_pre_pass": pipeline, "fx_graph_cache": False}
        result = torch.compile(model, fullgraph=True, dynamic=False, options=options)(x)
        expected = model(x)
        for when in ("before", "after"):
            print(f"{when}:")
            print(Path(directory, f"0-{DIVISION_TO_PRODUCT.name}-{when}.txt").read_text())
    (report,) = pipeline.reports
    print(f"{report.name}: {report.matches} matches, {report.expected} expected")
    print(f"ops: {report.ops_before} before, {report.ops_after} after")
    print(f"equal to eager: {torch.allclose(result, expected)}")


if __name__ == "__main__":
    main()
