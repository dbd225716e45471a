"""Files, opened without following links and replaced whole.

Read: only regular files, and size and contents are of the one file that was opened. Written: beside the name,
flushed to disk, renamed, the folder flushed; a crash leaves the old file or the new one, and at worst a part
under a name that begins with a dot.
"""

import errno
import os
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

NEVER_READ = {
    b"\x80": "a pickle",  # protocols 2 to 5; older ones have no mark
    b"PK": "a zip archive",  # what torch.save writes, with a pickle in it
    b"\x1f\x8b": "a gzip archive",
}
TAR = slice(257, 262)


def open_file(path, hint: str = "") -> BinaryIO:
    """A regular file for reading; `hint` says what to do where it is missing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # or a pipe waits for its writer
    except FileNotFoundError:
        raise ValueError(f"{path} is missing" + (f"; {hint}" if hint else "")) from None
    except OSError as error:
        if os.path.islink(path):
            raise ValueError(
                f"{path} is a link, and links are not followed within the folder of a model or an adapter; "
                "copy the folder with the files in their place (cp -rL)"
            ) from None
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no regular file")
    return os.fdopen(handle, "rb")


def never_read(path, start: bytes) -> str:
    """The refusal of a file that begins so, if it is a pickle or an archive; call it where reading failed.

    A header of safetensors may begin with the same bytes.
    """
    kind = next((kind for mark, kind in NEVER_READ.items() if start.startswith(mark)), "")
    kind = "a tar archive" if start[TAR] == b"ustar" else kind
    return kind and (
        f"{path} is {kind}, whatever its name says; pickles and archives are never read: convert it to "
        "safetensors with the program that wrote it"
    )


@contextmanager
def replacing(*paths: Path, removing: tuple[Path, ...] = ()):
    """New files for `paths`, open for writing. They take their names in that order when all are on disk.

    `removing` goes before the first takes its name. An error in the block changes nothing.
    """
    parts = []
    try:
        for path in paths:
            handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            parts.append((os.fdopen(handle, "wb"), part, path))
        yield [file for file, _, _ in parts]
        mode = 0o666 & ~_umask()
        for file, _, _ in parts:
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            file.close()
        for path in removing:
            path.unlink(missing_ok=True)
        for _, part, path in parts:
            os.replace(part, path)
        for folder in {path.parent for path in paths}:
            _flush_folder(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {paths[0]}: {error.strerror or error}") from None
    finally:
        for file, part, _ in parts:
            Path(part).unlink(missing_ok=True)
            with suppress(OSError):  # of what could not be written before either
                file.close()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as [file]:
        file.write(text.encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)
