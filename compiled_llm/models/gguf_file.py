"""Reading a GGUF file once: transformers reads its metadata four times, element by element, which takes seconds each time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np


@contextmanager
def read_once() -> Iterator[None]:
    """While this is open, a file is parsed when it is first asked for, and so are its values and the map of its tensors' names."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    class Reader(gguf.GGUFReader):
        """Slices of a memory map are memory maps, which cost several times as much to make as views of an array do."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    values: dict[
        int, Any
    ] = {}  # by the identity of what they are parsed from, which the reader holds with its types
    parse: Any = vars(loader)["_gguf_parse_value"]

    def parse_once(value: Any, types: Any) -> Any:
        if id(value) not in values:
            values[id(value)] = parse(value, types)
        return values[id(value)]

    with (
        patch.object(gguf, "GGUFReader", cache(Reader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        patch.object(loader, "_gguf_parse_value", parse_once),
    ):
        yield
