"""The artifacts that the cache directory keeps by itself, one for each key: no more of them than the config allows."""

import hashlib
import os
import shutil
import warnings
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
class _Found:
    directory: Path
    used: float
    bytes: int


def open_artifact(
    config: Config, key: Fingerprint, report: Report, *, by_graph: bool
) -> Artifact | None:
    """Open the artifact that the config names, if it fits or is empty, else the one in the cache directory.

    Args:
        key: of the engine.
        report: gets the reason where one of them is not used, which is also a warning on standard error.
        by_graph: see `Artifact`.

    Returns:
        None where nothing can be kept.
    """
    wanted, notice = config.compile.artifact, report.warnings.append
    named = [wanted] if isinstance(wanted, Path) else []
    for directory in [*named, cached_artifacts() / key.digest[:16]]:
        artifact = Artifact(directory, key, notice, _digest(config), by_graph)
        incompatibility = artifact.incompatibility()  # which also says so where it is damaged
        if directory is not wanted:
            incompatibility = artifact.untrusted_reason()
        if incompatibility is None:
            report.facts["artifact"] = str(directory)
            return artifact
        refuse_artifact(report, f"the artifact was not used: {incompatibility}")
    return None


def refuse_artifact(report: Report, reason: str) -> None:
    """Say that an artifact is not used, in the report and on standard error."""
    report.warnings.append(reason)
    report.artifact_refusal = report.artifact_refusal or reason
    warnings.warn(reason, stacklevel=2)


def saves_compilations(config: Config) -> bool:
    """Whether what is compiled for the config is kept at all."""
    settings = config.compile
    return settings.artifact != "off" and settings.dispatch == "direct" and settings.dump is None


def has_likely_artifact(config: Config) -> bool:
    """Whether there seems to be an artifact for the config, before its key can be known."""
    wanted = config.compile.artifact
    directories = [wanted] if isinstance(wanted, Path) else cached_artifacts().glob("*")
    return any(
        read_manifest(directory).get("config") == _digest(config) for directory in directories
    )


def _digest(config: Config) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def evict_lru(used: Artifact, limit: int, report: Report) -> None:
    """Take note that an artifact is in use, and keep the others in the cache directory within the limit."""
    mark_used(used.directory)
    removed = remove_lru(limit, used=used.directory)
    if removed:
        report.facts["removed, unused for the longest"] = (
            f"{', '.join(removed)}, beyond compile.cache_limit"
        )


def cached_artifacts() -> Path:
    """The directory that holds them."""
    return cache_dir() / "artifacts"


def mark_used(artifact: Path) -> None:
    """Take note that an engine uses it now."""
    with suppress(OSError):  # nothing is kept there, or it is not ours to write to
        os.utime(artifact / MANIFEST)


def remove_lru(limit: int, *, used: Path) -> list[str]:
    """Remove the artifacts that were not used for the longest time, until the rest takes `limit` bytes at most.

    Args:
        limit: bytes.
        used: an artifact that stays, however large it is; so do those that another process writes to just now.

    Returns:
        The names of those removed.
    """
    found = sorted(map(_look_at, _directories(used)), key=lambda artifact: artifact.used)
    excess, removed = sum(artifact.bytes for artifact in found) - limit, []
    for artifact in found:
        if excess > 0 and artifact.directory != used and _remove(artifact.directory):
            excess -= artifact.bytes
            removed.append(artifact.directory.name)
    return removed


def _directories(used: Path) -> list[Path]:
    """The cached artifacts; symbolic links lead to what is not the cache's own."""
    root = cached_artifacts()
    if used.parent != root or not root.exists():
        return []
    return [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]


def _look_at(directory: Path) -> _Found:
    used, size = 0.0, 0
    for path in [directory, *directory.rglob("*")]:
        with suppress(OSError):  # another process may remove it meanwhile
            status = path.lstat()
            size += status.st_size if path.is_file() else 0
            used = max(used, status.st_mtime) if path.name == MANIFEST else used
    return _Found(directory, used, size)


def _remove(directory: Path) -> bool:
    try:
        with locked(directory, patience=0):
            (directory / MANIFEST).unlink(
                missing_ok=True
            )  # first: without it, nothing there is used
            shutil.rmtree(directory)
    except OSError:
        return False
    return True
