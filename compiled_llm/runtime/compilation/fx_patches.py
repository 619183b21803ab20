"""What torch.fx replaces while it traces, replaced in the tracing thread alone.

A trace, of which a compilation makes many, replaces `nn.Module.__call__` and `__getattr__` for the process (`Tracer.trace` in
torch/fx/_symbolic_trace.py, torch 2.11). A model that runs eagerly in another thread would call the tracer.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def thread_local_fx_patches() -> Iterator[None]:
    """While this is open, a trace in any thread leaves the modules of the other threads as they are."""
    from torch.fx._symbolic_trace import _Patcher

    patch_method = _Patcher.patch_method

    def patch_in_this_thread(
        patcher: Any, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        original, thread = getattr(cls, name), threading.get_ident()

        @functools.wraps(new)
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else original)(*args, **kwargs)

        patch_method(patcher, cls, name, choose, deduplicate)

    with patch.object(_Patcher, "patch_method", patch_in_this_thread):
        yield
