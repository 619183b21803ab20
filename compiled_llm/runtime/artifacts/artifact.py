"""What one start compiled, kept in a directory for the next: a file for each bucket, and a manifest that says for what they are.

A bucket's file holds the step as torch compiled it ahead of time (no weights, no addresses) and what the passes reported of it.
On a CPU, the libraries that the C++ compiler made lie beside them; on a GPU, the kernels are inside. Files are checked by hash and
written under another name first, so that what is there is whole; what is not, or was made for something else, is compiled anew.

An artifact is code, and loading it runs that code: files and directories that another user owns or may write are refused.
"""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compiled_llm.errors import UntrustedFileError
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint, hash_of
from compiled_llm.runtime.bucket_tuning import Traffic
from compiled_llm.system.atomic_file import locked, remove_unfinished, write_atomic
from compiled_llm.system.file_trust import read_trusted, untrusted_reason
from passes import PassReport
from passes.ops.precompile import KernelFiles, restore_kernels

FORMAT = 3
_DIGEST_LENGTH = 64  # of SHA-256, in hexadecimal digits
MANIFEST, _TRAFFIC = "manifest.json", "traffic.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBucket:
    """One bucket: the compiled step, serialised, what the passes reported when it was compiled, and our own kernels.

    Attributes:
        graph_digest: of the graph that the step was compiled from; "" where that is not determined (see `graph_digest`).
    """

    step: bytes
    passes: list[PassReport]
    kernels: KernelFiles = field(default_factory=dict)
    graph_digest: str = ""


def _ignore(words: str) -> None:
    """Takes a notice that nobody wants."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory of compiled buckets.

    Attributes:
        directory: where; made when the first bucket is saved.
        key: what its buckets must have been compiled for.
        notice: told, in words, of what was found damaged, which is then made anew.
        config: the digest of a config that asks for it, by which a later start may guess that it is there.
        by_graph: whether a bucket may only be used if the model's step still has the graph that it was compiled from; the key
            then identifies the model by the graph of another step.
    """

    directory: Path
    key: Fingerprint
    notice: Callable[[str], None] = _ignore
    config: str = ""
    by_graph: bool = False
    _damaged: set[Path] = field(
        default_factory=set, repr=False
    )  # libraries, relative to where they are

    def incompatibility(self) -> str | None:
        """Why what is there cannot be used; None where it can, or where nothing is there, or nothing but what is damaged."""
        untrusted = self.untrusted_reason()
        if untrusted is not None:
            return untrusted
        manifest = self.directory / MANIFEST
        if not manifest.exists():
            return None
        found = read_key(self.directory)
        if found is None:
            if not any(self.directory.glob("*.bucket")):
                return f"{manifest} is no manifest of an artifact"
            self.notice(
                f"{manifest} is damaged, or of another version: all that it was of is compiled anew"
            )
            return None
        different = found.differences(self.key)
        return (
            f"{self.directory} was compiled for something else: {', '.join(different)}"
            if different
            else None
        )

    def untrusted_reason(self) -> str | None:
        """Why the directory is not to be trusted: other users own or may write it, its manifest or a directory above it."""
        return untrusted_reason(self.directory) or untrusted_reason(self.directory / MANIFEST)

    def load(self, bucket: str) -> SavedBucket | None:
        """The bucket as it was saved for this key, or None; a damaged or untrusted file is as good as none."""
        path = self._path(bucket)
        if read_key(self.directory) != self.key or not path.exists():
            return None
        content = self._read(path, "the bucket is compiled anew")
        if content is None:
            return None
        self._restore_libraries()
        kept: SavedBucket = pickle.loads(content)
        restore_kernels(kept.kernels)
        return kept

    def has(self, bucket: str) -> bool:
        """Whether a file is there for the bucket and this key."""
        return self._path(bucket).exists() and read_key(self.directory) == self.key

    def repair(self) -> None:
        """Put libraries that were damaged in order, where the compiler has made them again; raises OSError."""
        made = (
            {path.relative_to(_cache_dir()): path for path in _loaded_libraries()}
            if self._damaged
            else {}
        )
        for name in self._damaged & made.keys():
            with locked(self.directory):
                _write(self._libraries / name, made[name].read_bytes())
            self._damaged.remove(name)

    def save(self, bucket: str, kept: SavedBucket) -> None:
        """Keep the bucket, in place of what was there, also of another key; raises OSError."""
        with locked(self.directory):
            remove_unfinished([*self.directory.glob(".*"), *self._libraries.rglob(".*")])
            if read_key(self.directory) != self.key:
                self._begin()
            _write(self._path(bucket), pickle.dumps(kept))
            for library in _loaded_libraries():
                target = self._libraries / library.relative_to(_cache_dir())
                if not target.exists():
                    _write(target, library.read_bytes())

    def drop(self, bucket: str) -> None:
        """Forget a bucket; raises OSError."""
        if read_key(self.directory) == self.key:
            self._path(bucket).unlink(missing_ok=True)

    def add_traffic(self, traffic: Mapping[str, Traffic]) -> None:
        """Add what was seen, by kind, to what was seen before with the same limits; raises OSError."""
        if read_key(self.directory) != self.key:
            return
        with locked(self.directory):
            before = read_traffic(self.directory)
            for kind, seen in traffic.items():
                if kind in before and before[kind].limit == seen.limit:
                    seen = replace(seen, seen=seen.seen + before[kind].seen)
                before[kind] = seen
            write_atomic(
                self.directory / _TRAFFIC,
                json.dumps({k: t.to_dict() for k, t in before.items()}, indent=1).encode(),
            )

    def _restore_libraries(self) -> None:
        """Put the libraries that buckets need where the compiler looks for them; what is there already stays."""
        for path in self._libraries.rglob("*.so"):
            name = path.relative_to(self._libraries)
            if (_cache_dir() / name).exists() or name in self._damaged:
                continue
            content = self._read(path, "the library is compiled anew")
            if content is not None:
                write_atomic(_cache_dir() / name, content)
            else:
                self._damaged.add(name)

    def _read(self, path: Path, then: str) -> bytes | None:
        """What `_write` wrote; None, and a notice, where it is not whole or another user could have written it."""
        try:
            digest, _, content = read_trusted(path).partition(b"\n")
        except UntrustedFileError as error:
            self.notice(f"{error}: {then}")
            return None
        except OSError:
            digest = content = b""
        if digest.decode(errors="replace") == hash_of(content):
            return content
        self.notice(f"{path} is damaged: {then}")
        return None

    def _begin(self) -> None:
        """An empty artifact of this key."""
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for path in [*self.directory.glob("*.bucket"), *self._libraries.rglob("*.so")]:
            if _begins_with_digest(path):  # other files than an artifact's stay
                path.unlink(missing_ok=True)
        key = {"key": self.key.parts, "settings": self.key.settings}
        manifest = {"format": FORMAT, "digest": self.key.digest, "config": self.config, **key}
        write_atomic(self.directory / MANIFEST, json.dumps(manifest, indent=1).encode())

    @property
    def _libraries(self) -> Path:
        return self.directory / "libraries"

    def _path(self, bucket: str) -> Path:
        return self.directory / f"{bucket}.bucket"


def discard(directory: Path) -> None:
    """Let the next save begin anew; other files than an artifact's stay."""
    (directory / MANIFEST).unlink(missing_ok=True)


def read_traffic(directory: Path) -> dict[str, Traffic]:
    """What engines on this artifact saw, by kind; nothing where that is not known."""
    try:
        return {
            kind: Traffic.from_dict(values)
            for kind, values in json.loads((directory / _TRAFFIC).read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_key(directory: Path) -> Fingerprint | None:
    """The key in a directory's manifest; None where there is none, or none that is whole."""
    manifest = read_manifest(directory)
    try:
        key = Fingerprint(dict(manifest["key"]), dict(manifest["settings"]))
    except (ValueError, KeyError, TypeError):
        return None
    return (
        key if manifest.get("format") == FORMAT and manifest.get("digest") == key.digest else None
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """What it says; nothing where there is none, or none that can be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _begins_with_digest(path: Path) -> bool:
    """Whether `_write` may have written it."""
    try:
        with path.open("rb") as file:
            begin = file.read(_DIGEST_LENGTH + 1)
    except OSError:
        return False
    return re.fullmatch(rb"[0-9a-f]{64}\n", begin) is not None


def _write(path: Path, content: bytes) -> None:
    write_atomic(path, hash_of(content).encode() + b"\n" + content)


def _cache_dir() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _loaded_libraries() -> list[Path]:
    """Those in the compiler's cache that this process has loaded; none where there is no /proc."""
    maps = Path("/proc/self/maps")
    if torch.cuda.is_available() or not maps.exists():
        return []
    paths = {
        line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.endswith(".so")
    }
    return sorted(
        Path(path)
        for path in paths
        if Path(path).is_relative_to(_cache_dir()) and Path(path).exists()
    )
