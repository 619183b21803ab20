"""Exceptions that the library raises; every one derives from `CompiledLLMError`."""


class CompiledLLMError(Exception):
    """Base class of the library's own exceptions."""


class UnsupportedModelError(CompiledLLMError, ValueError):
    """The model needs a feature that is not supported; the message names the feature."""


class NeedsWeightsError(CompiledLLMError, ValueError):
    """The model cannot be examined without weights: its forward depends on their values."""


class QueueFullError(CompiledLLMError, RuntimeError):
    """The queue already holds `limits.max_waiting` requests; retry later."""


class RequestFailedError(CompiledLLMError, RuntimeError):
    """A request ended with an error; the message gives the reason."""


class EngineBrokenError(CompiledLLMError, RuntimeError):
    """An error left the engine in an unknown state, so that it refuses further calls."""


class StrictError(CompiledLLMError, RuntimeError):
    """A fallback, graph skip, recompile or re-record happened while `strict` is set."""


class CaptureError(CompiledLLMError, RuntimeError):
    """A compiled step was not recorded as one CUDA graph."""


class UntrustedFileError(CompiledLLMError, OSError):
    """Another user owns a file or directory, or may write to it."""
