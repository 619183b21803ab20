"""Tests of parsing GGUF files once."""

from pathlib import Path

import gguf
import numpy as np
from transformers import modeling_gguf_pytorch_utils as loader

from compiled_llm.models.gguf_file import gguf_parsed_once


def _write(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_tensor("output_norm.weight", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_is_parsed_once_until_exit(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf")
    original = gguf.GGUFReader
    with gguf_parsed_once():
        reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
        assert gguf.GGUFReader(tmp_path / "tiny.gguf") is reader
    assert gguf.GGUFReader is original


def test_values_and_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    _write(tmp_path / "tiny.gguf")
    with gguf_parsed_once():
        reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
        field = reader.get_field("llama.block_count")
        assert field is not None
        for _ in range(2):
            assert loader._gguf_parse_value(field.parts[field.data[0]], field.types) == 3
        (tensor,) = reader.tensors
        assert type(tensor.data) is np.ndarray
        assert tensor.data.tolist() == list(range(8))
