"""Parse a GGUF file once.

transformers parses a file's metadata four times, element by element, which takes seconds each time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Cache parsed files, their values and the maps of tensor names until exit."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    class Reader(gguf.GGUFReader):
        """A reader that slices an array instead of a memory map.

        A slice of a memory map is a memory map, which takes several times as long to create as a
        view of an array.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    # Parsed values by the id of their source, which the cached reader keeps alive.
    values: dict[int, Any] = {}
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
