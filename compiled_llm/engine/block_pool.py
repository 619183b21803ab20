"""The pages of one group of layers: reference counts, and the full pages that later requests may share.

A full page is known by a key that stands for all tokens up to its end (see `kv_cache.chain`). A page that nobody holds any
more keeps its key until it is handed out again, least recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Hands out pages 1 to `num_pages - 1`; page 0 is the runtime's trash page."""

    def __init__(self, num_pages: int) -> None:
        self.capacity = num_pages - 1
        self._holders = [0] * num_pages
        self._blank = list(range(num_pages - 1, 0, -1))
        self._kept: OrderedDict[int, None] = (
            OrderedDict()
        )  # held by nobody, but with a key; oldest first
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._kept)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages that are free; the caller has checked that there are so many."""
        assert num_pages <= self.num_free, f"{num_pages} pages asked, {self.num_free} free"
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(num_pages)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def find(self, key: bytes) -> int | None:
        """The page with this key."""
        return self._pages.get(key)

    def num_found(self, keys: Sequence[bytes]) -> int:
        """How many of these keys can be found, up to the first that cannot."""
        return next(
            (number for number, key in enumerate(keys) if key not in self._pages), len(keys)
        )

    def num_idle(self, keys: Sequence[bytes]) -> int:
        """How many pages with these keys, all of which can be found, nobody holds: to share them takes free pages."""
        return sum(self._pages[key] in self._kept for key in keys)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Hand out the pages with these keys only after all others that nobody holds."""
        for key in reversed(keys):
            page = self._pages.get(key)
            if page is not None and page in self._kept:
                self._kept.move_to_end(page)

    def share(self, page: int) -> None:
        """One more holder for a page that was found."""
        self._kept.pop(page, None)
        self._holders[page] += 1

    def register(self, page: int, key: bytes) -> None:
        """From now on the page, which is full, can be found; unless another one with the same tokens already can."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def unregister(self, pages: Iterable[int]) -> None:
        """From now on these pages, which somebody holds, cannot be found."""
        for page in pages:
            key = self._keys.pop(page, None)
            if key is not None:
                del self._pages[key]

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. The last pages of a sequence are the first to be handed out again."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was given back twice"
            if self._holders[page] == 0:
                if page in self._keys:
                    self._kept[page] = None
                else:
                    self._blank.append(page)

    def forget(self) -> None:
        """Find no page any more."""
        self._blank.extend(self._kept)
        self._kept.clear()
        self._keys.clear()
        self._pages.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the holders are these sequences' pages, and that every other page is free once."""
        held: dict[int, int] = {}
        for table in tables:
            for page in table:
                held[page] = held.get(page, 0) + 1
        assert {page: count for page, count in enumerate(self._holders) if count} == held
        free = [*self._blank, *self._kept]
        assert sorted([*free, *held]) == list(range(1, self.capacity + 1))
        assert self._pages == {key: page for page, key in self._keys.items()}
        assert self._kept.keys() <= self._keys.keys() <= {*free, *held}

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._pages[self._keys.pop(page)]
        return page
