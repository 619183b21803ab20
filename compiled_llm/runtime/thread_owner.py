"""The thread and the process that may use an engine."""

import os
import threading


class ThreadOwner:
    """Remembers the thread and the process that create it.

    CUDA graph trees are thread-local, and a CUDA context does not survive a fork.

    Attributes:
        thread: identifier of the thread.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._process = os.getpid()

    @property
    def is_current(self) -> bool:
        """Whether this is called in the owning thread of the owning process."""
        return self._process == os.getpid() and self.thread == threading.get_ident()

    def check(self) -> None:
        """Raise a RuntimeError in another thread, and in a process forked from the owning one."""
        if self.is_current:
            return
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this engine belongs to process {self._process}, and this is a fork of it: "
                "make another one here"
            )
        raise RuntimeError(
            "this engine belongs to the thread that made it (CUDA graph trees are thread-local): "
            "call it from there"
        )
