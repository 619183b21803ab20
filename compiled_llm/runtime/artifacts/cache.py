"""The artifacts in the cache directory, one for each key, within `compile.cache_limit`."""

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compiled_llm.config.schema import Config
from compiled_llm.report.report import Report
from compiled_llm.runtime.artifacts.artifact import MANIFEST, Artifact, read_manifest
from compiled_llm.runtime.artifacts.fingerprint import Fingerprint
from compiled_llm.system.atomic_file import locked
from compiled_llm.system.paths import cache_dir


@dataclass(frozen=True, slots=True)
class _CachedArtifact:
    """An artifact, the time of its last use and its size in bytes."""

    directory: Path
    last_used: float
    bytes: int


def open_artifact(
    config: Config, key: Fingerprint, report: Report, *, by_graph: bool
) -> Artifact | None:
    """Open the artifact that the config names, if it is compatible, else the one in the cache.

    Args:
        config: `compile.artifact` names a directory.
        key: of the engine.
        report: gets a warning with the reason for each artifact that is not used.
        by_graph: see `Artifact`.

    Returns:
        None if nothing can be saved.
    """
    named = config.compile.artifact
    directories = [named] if isinstance(named, Path) else []
    for directory in [*directories, cached_artifacts() / key.digest[:16]]:
        artifact = Artifact(directory, key, report.warn, _digest(config), by_graph)
        reason = artifact.incompatibility()  # also reports damage
        if directory is not named:  # the name of a cached artifact is its key
            reason = artifact.untrusted_reason()
        if reason is None:
            report.facts["artifact"] = str(directory)
            return artifact
        refuse_artifact(report, f"the artifact was not used: {reason}")
    return None


def refuse_artifact(report: Report, reason: str) -> None:
    """Report that an artifact is not used."""
    report.warn(reason)
    report.startup.artifact_refusal = report.startup.artifact_refusal or reason


def saves_compilations(config: Config) -> bool:
    """Return whether buckets compiled for the config are saved in an artifact."""
    settings = config.compile
    return settings.artifact != "off" and settings.dispatch == "direct" and settings.dump is None


def has_likely_artifact(config: Config) -> bool:
    """Return whether an artifact of this config exists; its key cannot be checked yet."""
    named = config.compile.artifact
    directories = [named] if isinstance(named, Path) else cached_artifacts().glob("*")
    digest = _digest(config)
    return any(read_manifest(directory).get("config") == digest for directory in directories)


def _digest(config: Config) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def evict_lru(used: Artifact, limit: int, report: Report) -> None:
    """Mark an artifact as used, and remove others from the cache beyond `limit` bytes."""
    mark_used(used.directory)
    removed = remove_lru(limit, used=used.directory)
    if removed:
        names = ", ".join(removed)
        report.facts["removed, least recently used"] = f"{names}, beyond compile.cache_limit"


def cached_artifacts() -> Path:
    """Return the directory that holds the artifacts of the cache."""
    return cache_dir() / "artifacts"


def mark_used(artifact: Path) -> None:
    """Set the time of an artifact's last use to now."""
    with suppress(OSError):  # it is empty, or this user cannot write to it
        os.utime(artifact / MANIFEST)


def remove_lru(limit: int, *, used: Path) -> list[str]:
    """Remove the least recently used artifacts until the others take at most `limit` bytes.

    Args:
        limit: bytes.
        used: an artifact that stays, whatever its size; so do artifacts that another process is
            writing to.

    Returns:
        The names of the removed artifacts.
    """
    found = sorted(map(_inspect, _directories(used)), key=lambda artifact: artifact.last_used)
    excess, removed = sum(artifact.bytes for artifact in found) - limit, []
    for artifact in found:
        if excess > 0 and artifact.directory != used and _remove(artifact.directory):
            excess -= artifact.bytes
            removed.append(artifact.directory.name)
    return removed


def _directories(used: Path) -> list[Path]:
    """Return the cached artifacts without symbolic links, which lead out of the cache."""
    root = cached_artifacts()
    if used.parent != root or not root.exists():
        return []
    return [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]


def _inspect(directory: Path) -> _CachedArtifact:
    last_used, size = 0.0, 0
    for path in [directory, *directory.rglob("*")]:
        with suppress(OSError):  # another process may remove it meanwhile
            status = path.lstat()
            size += status.st_size if path.is_file() else 0
            if path.name == MANIFEST:
                last_used = max(last_used, status.st_mtime)
    return _CachedArtifact(directory, last_used, size)


def _remove(directory: Path) -> bool:
    try:
        with locked(directory, timeout=0):
            # The manifest goes first: without it, no other file is used.
            (directory / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(directory)
    except OSError:
        return False
    return True
