"""Helpers that match and edit graphs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from passes.fx_utils import (
    backward_slice,
    insert_call,
    is_call_to,
    is_unmutated_input,
    is_view,
    strip_reshapes,
    strip_reshapes_and_casts,
)

aten = torch.ops.aten
cast = torch.ops.prims.convert_element_type.default


@pytest.fixture
def x() -> Node:
    """A graph input [4, 6] in float32."""
    node = Graph().placeholder("x")
    node.meta["val"] = FakeTensorMode().from_tensor(torch.empty(4, 6))
    return node


def test_insert_call_computes_the_fake_value(x: Node) -> None:
    node = insert_call(x.graph, aten.permute.default, x, [1, 0])
    assert node.meta["val"].shape == (6, 4)
    assert node.meta["val"].stride() == (1, 6)
    assert is_call_to(node, aten.mm.default, aten.permute.default)
    assert not is_call_to(node, aten.mm.default)
    assert not is_call_to(x, "x")
    assert not is_call_to(None, aten.mm.default)


def test_strip_reshapes_and_casts(x: Node) -> None:
    flat = insert_call(x.graph, aten.reshape.default, x, [24])
    half = insert_call(x.graph, cast, flat, torch.float16)
    last = insert_call(x.graph, aten.view.default, half, [3, 8])
    assert strip_reshapes(last) is half
    assert strip_reshapes_and_casts(last) is x
    assert strip_reshapes(x) is x


def test_backward_slice_ends_at_end_nodes(x: Node) -> None:
    sine = insert_call(x.graph, aten.sin.default, x)
    cosine = insert_call(x.graph, aten.cos.default, sine)
    product = insert_call(x.graph, aten.mul.Tensor, cosine, sine)
    insert_call(x.graph, aten.exp.default, product)
    assert backward_slice(product, lambda node: False) == {product, cosine, sine, x}
    assert backward_slice(product, lambda node: node is sine) == {product, cosine, sine}


def test_views_of_an_unmutated_input(x: Node) -> None:
    transpose = insert_call(x.graph, aten.permute.default, x, [1, 0])
    assert is_view(transpose)
    assert is_unmutated_input(x)
    assert is_unmutated_input(transpose)
    copy = insert_call(x.graph, aten.reshape.default, transpose, [24])
    assert not is_unmutated_input(copy), "a reshape that copies"
    sine = insert_call(x.graph, aten.sin.default, x)
    assert not is_view(sine)
    assert not is_unmutated_input(sine)


def test_a_write_to_a_view_mutates_the_input(x: Node) -> None:
    view = insert_call(x.graph, aten.view.default, x, [24])
    other = insert_call(x.graph, aten.slice.Tensor, x, 0, 0, 2)
    insert_call(x.graph, aten.add_.Tensor, view, 1.0)
    assert not is_unmutated_input(x)
    assert not is_unmutated_input(other)


def test_a_read_by_an_op_that_mutates_another_argument(x: Node) -> None:
    other = x.graph.placeholder("other")
    other.meta["val"] = x.meta["val"].clone()
    insert_call(x.graph, aten.add_.Tensor, other, x)
    assert is_unmutated_input(x)
    assert not is_unmutated_input(other)
