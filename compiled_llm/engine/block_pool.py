"""The pages of the KV cache that are free."""

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Hands out pages 1 to `num_pages - 1`; page 0 is the runtime's trash page. Freed pages are reused last."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.block_size = block_size
        self.capacity = num_pages - 1
        self._free = deque(range(1, num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold so many tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages; the caller has checked that they are free."""
        assert num_pages <= len(self._free), f"{num_pages} pages asked, {len(self._free)} free"
        return [self._free.popleft() for _ in range(num_pages)]

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)
