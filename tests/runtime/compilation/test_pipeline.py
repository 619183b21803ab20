"""The pipeline of a bucket: the passes of the config, in its order, and the model's facts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compiled_llm import CompiledLLM
from compiled_llm.config.schema import Config
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.compilation.pipeline import make_pipeline
from passes import AttentionLayers, Pipeline
from tests.helpers.tiny_models import small_config, tiny_model

BUCKET = Bucket("decode", 4, "greedy")
LAYERS: Any = [SimpleNamespace(name=f"model.layers.{n}.self_attn") for n in range(2)]


def _pipeline(config: Config) -> Pipeline:
    eager = small_config(compile={"dispatch": "eager"})
    with CompiledLLM(tiny_model("llama"), None, eager, progress=False) as llm:
        runner = llm.model_runner
        return make_pipeline(config, BUCKET, runner.model, LAYERS)


def test_the_passes_are_those_of_the_config_in_order() -> None:
    config = small_config()
    assert [each.name for each in _pipeline(config).passes] == config.pass_order()
    first, *others = config.pass_order()
    names = [each.name for each in _pipeline(small_config(passes={first: False})).passes]
    assert names == others


def test_the_context_describes_the_model_and_the_bucket() -> None:
    context = _pipeline(small_config()).context
    names = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert context.get(AttentionLayers).names == names
    assert context.num_tokens == BUCKET.size


def test_graphs_are_dumped_to_a_directory_of_the_bucket(tmp_path: Path) -> None:
    assert _pipeline(small_config()).dump_dir is None
    dumped = _pipeline(small_config(compile={"dump": tmp_path}))
    assert dumped.dump_dir == tmp_path / "decode-4-greedy"


def test_equal_buckets_have_equal_keys_of_inductors_cache() -> None:
    one, other = _pipeline(small_config()), _pipeline(small_config())
    first = small_config().pass_order()[0]
    assert one.uuid() == other.uuid()
    assert one.uuid() != _pipeline(small_config(passes={first: False})).uuid()
