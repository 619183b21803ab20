"""The fingerprint of an engine, and the artifact that its compiled buckets are saved in."""

from dataclasses import replace

from compiled_llm.models.exported_model import underlying_model
from compiled_llm.runtime.artifacts.artifact import Artifact
from compiled_llm.runtime.artifacts.cache import open_artifact, refuse_artifact, saves_compilations
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint, make_key
from compiled_llm.runtime.artifacts.model_source import ModelCode, identify
from compiled_llm.runtime.buckets import Bucket
from compiled_llm.runtime.build_context import BuildContext
from compiled_llm.runtime.compilation.compiler import trace_digest


def with_artifact(context: BuildContext) -> BuildContext:
    """Return the context with the artifact for its engine, or as it is where nothing is saved."""
    if not saves_compilations(context.config):
        return context
    return replace(context, artifact=_open_artifact(context))


def engine_fingerprint(context: BuildContext) -> Fingerprint:
    """Return the fingerprint of everything a compiled step depends on, except its bucket.

    Raises:
        ValueError: the model's code cannot be identified.
    """
    return _fingerprint(context, _identify_code(context))


def _open_artifact(context: BuildContext) -> Artifact | None:
    report = context.report
    with report.phase("identify the model", context.device):
        try:
            code = _identify_code(context)
        except ValueError as error:
            refuse_artifact(report, f"compiled buckets are not saved: {error}")
            return None
    fingerprint = _fingerprint(context, code)
    return open_artifact(context.config, fingerprint, report, by_graph=code.by_graph)


def _identify_code(context: BuildContext) -> ModelCode:
    # The graph of any step identifies the model; this bucket need not be one of the config's.
    bucket = Bucket("decode", context.limits.max_num_seqs, "greedy")
    step = context.memory.step(context.model, bucket)
    model = underlying_model(context.model)
    return identify(model, lambda: trace_digest(step), just_loaded=context.just_loaded)


def _fingerprint(context: BuildContext, code: ModelCode) -> Fingerprint:
    memory = context.memory
    buffers = [memory.state, memory.caches, *([memory.states] if memory.states else [])]
    return make_key(
        context.model, code.words, buffers, memory.groups, context.config, context.limits
    )
