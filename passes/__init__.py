"""The compiler's library: FX passes and the ops they emit. It needs torch and triton alone."""

from passes.fuse_skinny_linear import SMALL_LINEAR
from passes.hoist_step_invariants import ONCE_A_STEP
from passes.lower_attention_marker import PAGED_ATTENTION
from passes.merge_projections import MERGE_PROJECTIONS
from passes.pipeline import GraphPass, PassContext, PassError, PassReport, Pipeline
from passes.rotary_outer_product import ROTARY_OUTER_PRODUCT

# In the order in which they run unless a config says otherwise.
_ORDER = (PAGED_ATTENTION, ROTARY_OUTER_PRODUCT, ONCE_A_STEP, MERGE_PROJECTIONS, SMALL_LINEAR)
PASSES: dict[str, GraphPass] = {graph_pass.name: graph_pass for graph_pass in _ORDER}

__all__ = ["PASSES", "GraphPass", "PassContext", "PassError", "PassReport", "Pipeline"]
