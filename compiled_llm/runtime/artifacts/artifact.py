"""Artifacts: directories in which compiled buckets are saved for later starts.

An artifact has one file per bucket and a manifest with the key, which says for what the buckets
were compiled. A bucket's file holds the step as torch compiled it ahead of time (no weights, no
addresses) and the reports of its passes. On a CPU, the libraries that the C++ compiler made are in
the directory `libraries`; on a GPU, the kernels are in the bucket's file. Each file begins with its
hash and is written atomically. A damaged file, or one of another key, is compiled again.

Loading an artifact runs code from it. Files and directories that another user owns or can write to
are refused.
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
from compiled_llm.system.torch_patches import CACHE_DIR
from passes import PassReport
from passes.ops.precompile import KernelFiles, restore_kernels

FORMAT = 3
_DIGEST_LENGTH = 64  # hexadecimal digits of a SHA-256
MANIFEST, _TRAFFIC = "manifest.json", "traffic.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBucket:
    """The contents of a bucket's file.

    Attributes:
        step: the compiled step, serialized.
        passes: the reports of the passes from its compilation.
        kernels: the Triton kernels of this library's ops.
        graph_digest: digest of the graph it was compiled from; "" if undetermined (see
            `graph_digest`).
    """

    step: bytes
    passes: list[PassReport]
    kernels: KernelFiles = field(default_factory=dict)
    graph_digest: str = ""


def _ignore(message: str) -> None:
    """Drop a message."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory of compiled buckets.

    Attributes:
        directory: created when the first bucket is saved.
        key: what its buckets must have been compiled for.
        notice: called with a message for each damaged file, which is then compiled again.
        config: digest of the config; `has_likely_artifact` looks for it before the key is known.
        by_graph: whether a bucket may be used only if the model's step still has the graph that it
            was compiled from. The key then identifies the model by the graph of another step.
    """

    directory: Path
    key: Fingerprint
    notice: Callable[[str], None] = _ignore
    config: str = ""
    by_graph: bool = False
    # Relative paths of damaged libraries.
    _damaged: set[Path] = field(default_factory=set, repr=False)

    def incompatibility(self) -> str | None:
        """Return the reason why the contents cannot be used, or None.

        None also stands for an empty directory, and for one in which everything is damaged.
        """
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
                f"{manifest} is damaged or of another version: its buckets are compiled again"
            )
            return None
        different = found.differences(self.key)
        if not different:
            return None
        return f"{self.directory} was compiled for something else: {', '.join(different)}"

    def untrusted_reason(self) -> str | None:
        """Return the reason why other users could change the artifact, or None."""
        manifest = self.directory / MANIFEST
        return untrusted_reason(self.directory) or untrusted_reason(manifest)

    def load(self, bucket: str) -> SavedBucket | None:
        """Return the bucket that was saved for this key; None if missing, damaged or untrusted."""
        path = self._path(bucket)
        if read_key(self.directory) != self.key or not path.exists():
            return None
        content = self._read(path, "the bucket is compiled again")
        if content is None:
            return None
        self._restore_libraries()
        saved: SavedBucket = pickle.loads(content)
        restore_kernels(saved.kernels)
        return saved

    def has(self, bucket: str) -> bool:
        """Return whether the bucket has a file for this key."""
        return self._path(bucket).exists() and read_key(self.directory) == self.key

    def repair(self) -> None:
        """Replace damaged libraries that the compiler has made again; raises OSError."""
        if not self._damaged:
            return
        loaded = {path.relative_to(Path(CACHE_DIR.get()())): path for path in _loaded_libraries()}
        for name in self._damaged & loaded.keys():
            with locked(self.directory):
                _write(self._libraries / name, loaded[name].read_bytes())
            self._damaged.remove(name)

    def save(self, bucket: str, saved: SavedBucket) -> None:
        """Write a bucket; the first one replaces an artifact of another key. Raises OSError."""
        with locked(self.directory):
            remove_unfinished([*self.directory.glob(".*"), *self._libraries.rglob(".*")])
            if read_key(self.directory) != self.key:
                self._begin()
            _write(self._path(bucket), pickle.dumps(saved))
            for library in _loaded_libraries():
                target = self._libraries / library.relative_to(Path(CACHE_DIR.get()()))
                if not target.exists():
                    _write(target, library.read_bytes())

    def drop(self, bucket: str) -> None:
        """Remove a bucket; raises OSError."""
        if read_key(self.directory) == self.key:
            self._path(bucket).unlink(missing_ok=True)

    def add_traffic(self, traffic: Mapping[str, Traffic]) -> None:
        """Add counts of step sizes, by kind, to earlier counts of the same limits.

        Raises:
            OSError: they cannot be written.
        """
        if read_key(self.directory) != self.key:
            return
        with locked(self.directory):
            total = read_traffic(self.directory)
            for kind, new in traffic.items():
                same_limit = kind in total and total[kind].limit == new.limit
                total[kind] = replace(new, seen=new.seen + total[kind].seen) if same_limit else new
            values = {kind: each.to_dict() for kind, each in total.items()}
            write_atomic(self.directory / _TRAFFIC, json.dumps(values, indent=1).encode())

    def _restore_libraries(self) -> None:
        """Copy libraries that are missing in the compiler's cache to it."""
        for path in self._libraries.rglob("*.so"):
            name = path.relative_to(self._libraries)
            if (Path(CACHE_DIR.get()()) / name).exists() or name in self._damaged:
                continue
            content = self._read(path, "the library is compiled again")
            if content is not None:
                write_atomic(Path(CACHE_DIR.get()()) / name, content)
            else:
                self._damaged.add(name)

    def _read(self, path: Path, consequence: str) -> bytes | None:
        """Return what `_write` wrote; None, after a notice, if it is damaged or untrusted."""
        try:
            digest, _, content = read_trusted(path).partition(b"\n")
        except UntrustedFileError as error:
            self.notice(f"{error}: {consequence}")
            return None
        except OSError:
            digest = content = b""
        if digest.decode(errors="replace") == hash_of(content):
            return content
        self.notice(f"{path} is damaged: {consequence}")
        return None

    def _begin(self) -> None:
        """Begin an empty artifact of this key; files that no artifact wrote stay."""
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for path in [*self.directory.glob("*.bucket"), *self._libraries.rglob("*.so")]:
            if _begins_with_digest(path):
                path.unlink(missing_ok=True)
        manifest = {
            "format": FORMAT,
            "digest": self.key.digest,
            "config": self.config,
            "key": self.key.parts,
            "settings": self.key.settings,
        }
        write_atomic(self.directory / MANIFEST, json.dumps(manifest, indent=1).encode())

    @property
    def _libraries(self) -> Path:
        return self.directory / "libraries"

    def _path(self, bucket: str) -> Path:
        return self.directory / f"{bucket}.bucket"


def discard(directory: Path) -> None:
    """Remove the manifest, so that the next save begins an empty artifact."""
    (directory / MANIFEST).unlink(missing_ok=True)


def read_traffic(directory: Path) -> dict[str, Traffic]:
    """Return the counts of step sizes, by kind; empty if there are none that can be read."""
    try:
        return {
            kind: Traffic.from_dict(values)
            for kind, values in json.loads((directory / _TRAFFIC).read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_key(directory: Path) -> Fingerprint | None:
    """Return the key in a directory's manifest; None if it is missing or damaged."""
    manifest = read_manifest(directory)
    try:
        key = Fingerprint(dict(manifest["key"]), dict(manifest["settings"]))
    except (ValueError, KeyError, TypeError):
        return None
    complete = manifest.get("format") == FORMAT and manifest.get("digest") == key.digest
    return key if complete else None


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the contents of a directory's manifest; empty if it cannot be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _begins_with_digest(path: Path) -> bool:
    """Return whether `_write` may have written the file."""
    try:
        with path.open("rb") as file:
            begin = file.read(_DIGEST_LENGTH + 1)
    except OSError:
        return False
    return re.fullmatch(rb"[0-9a-f]{64}\n", begin) is not None


def _write(path: Path, content: bytes) -> None:
    write_atomic(path, hash_of(content).encode() + b"\n" + content)


def _loaded_libraries() -> list[Path]:
    """Return the libraries in the compiler's cache that this process has loaded.

    There are none on a GPU, or where there is no /proc.
    """
    maps = Path("/proc/self/maps")
    if torch.cuda.is_available() or not maps.exists():
        return []
    lines = (line for line in maps.read_text().splitlines() if line.endswith(".so"))
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines}
    directory = Path(CACHE_DIR.get()())
    return sorted(path for path in paths if path.is_relative_to(directory) and path.exists())
