"""The graph passes of one bucket."""

from compiled_llm.config.schema import Config
from compiled_llm.models.discovery import AttentionLayer, count_rotary_embeddings
from compiled_llm.models.exported_model import ServedModel
from compiled_llm.models.weight_packing import find_packed_groups
from compiled_llm.runtime.buckets import Bucket
from passes import PASSES, AttentionLayers, PackedWeights, PassContext, Pipeline, RotaryEmbeddings


def make_pipeline(
    config: Config, bucket: Bucket, model: ServedModel, layers: list[AttentionLayer]
) -> Pipeline:
    """Build the pipeline of the passes that the config lists, for one bucket.

    With `compile.dump`, the graphs before and after each pass are written to a directory named
    after the bucket.
    """
    context = PassContext(
        num_tokens=bucket.size,
        facts=(
            AttentionLayers(tuple(layer.name for layer in layers)),
            RotaryEmbeddings(count_rotary_embeddings(model)),
            PackedWeights(find_packed_groups(model)),
        ),
    )
    return Pipeline(
        passes=[PASSES[name] for name in config.pass_order()],
        context=context,
        dump_dir=config.compile.dump / str(bucket) if config.compile.dump else None,
    )
