"""Post-grad FX passes and the custom ops that they emit. Requires torch and triton only."""

from passes.fuse_skinny_linear import FUSE_SKINNY_LINEAR
from passes.hoist_step_invariants import HOIST_STEP_INVARIANTS
from passes.lower_attention_marker import LOWER_ATTENTION_MARKER, AttentionLayers
from passes.merge_projections import MERGE_PROJECTIONS, PackedWeights
from passes.pipeline import GraphPass, PassContext, PassError, PassReport, Pipeline
from passes.rotary_outer_product import ROTARY_OUTER_PRODUCT, RotaryEmbeddings

# The default order: a config may list some of them in another.
_ORDER = (
    LOWER_ATTENTION_MARKER,
    ROTARY_OUTER_PRODUCT,
    HOIST_STEP_INVARIANTS,
    MERGE_PROJECTIONS,
    FUSE_SKINNY_LINEAR,
)
PASSES: dict[str, GraphPass] = {graph_pass.name: graph_pass for graph_pass in _ORDER}

__all__ = [
    "PASSES",
    "AttentionLayers",
    "GraphPass",
    "PackedWeights",
    "PassContext",
    "PassError",
    "PassReport",
    "Pipeline",
    "RotaryEmbeddings",
]
