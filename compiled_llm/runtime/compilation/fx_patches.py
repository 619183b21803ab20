"""Confine the patches of torch.fx tracing to the thread that traces.

`Tracer.trace` replaces `nn.Module.__call__` and `nn.Module.__getattr__` in the whole process while
it runs, and one compilation traces many times. A model that runs eagerly in another thread would
call into the tracer.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from compiled_llm.system.torch_patches import PATCH_METHOD


@contextmanager
def thread_local_fx_patches() -> Iterator[None]:
    """Make the patches of every trace in the body apply to the tracing thread only."""
    patch_method = PATCH_METHOD.get()

    def patch_in_this_thread(
        patcher: Any, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        original, thread = getattr(cls, name), threading.get_ident()

        @functools.wraps(new)
        def choose(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else original)(*args, **kwargs)

        patch_method(patcher, cls, name, choose, deduplicate)

    with PATCH_METHOD.patch(patch_in_this_thread):
        yield
