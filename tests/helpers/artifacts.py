"""Keys and buckets for tests of artifacts."""

from compiled_llm.runtime.artifacts.artifact import SavedBucket
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint

KEY = Fingerprint({"torch": "2.11.0", "model": "a"})
OTHER = Fingerprint({"torch": "2.11.0", "model": "b", "dtype": "float32"})


def saved(content: bytes) -> SavedBucket:
    """Return a bucket whose compiled step is `content`."""
    return SavedBucket(step=content, passes=[])
