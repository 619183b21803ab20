"""The compiler's library: FX passes and the ops they emit. It needs torch and triton alone."""

from passes.fuse_skinny_linear import FUSE_SKINNY_LINEAR
from passes.hoist_step_invariants import HOIST_STEP_INVARIANTS
from passes.lower_attention_marker import LOWER_ATTENTION_MARKER
from passes.merge_projections import MERGE_PROJECTIONS
from passes.pipeline import GraphPass, PassContext, PassError, PassReport, Pipeline
from passes.rotary_outer_product import ROTARY_OUTER_PRODUCT

# In the order in which they run unless a config says otherwise.
_ORDER = (
    LOWER_ATTENTION_MARKER,
    ROTARY_OUTER_PRODUCT,
    HOIST_STEP_INVARIANTS,
    MERGE_PROJECTIONS,
    FUSE_SKINNY_LINEAR,
)
PASSES: dict[str, GraphPass] = {graph_pass.name: graph_pass for graph_pass in _ORDER}

__all__ = ["PASSES", "GraphPass", "PassContext", "PassError", "PassReport", "Pipeline"]
