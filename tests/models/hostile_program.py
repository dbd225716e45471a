"""Load every case of a corpus in a process of its own, watched by an audit hook; print what happened as JSON.

python hostile_program.py ROOT: ROOT/cases.json, ROOT/valid/<kind>/, ROOT/cases/<number>/
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

import minift

WATCHED = (
    "import",
    "exec",
    "compile",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.",
)
WATCHED += ("pickle.", "marshal.", "ctypes.", "os.remove", "os.rename", "os.link", "os.symlink", "shutil.")
LOADERS = {
    "model": lambda path: minift.load_model(path),
    "gguf": lambda path: minift.load_model(path),
    "adapter": lambda path: minift.load_adapter(base(), path),
    "tokenizer": lambda path: minift.load_tokenizer(path),
    "gguf_tokenizer": lambda path: minift.load_tokenizer(path),
}
root = Path(sys.argv[1]).resolve()
valid = {kind: root / "valid" / kind / ("m.gguf" if "gguf" in kind else "") for kind in LOADERS}
folder, events, watching = root, [], False


def misbehave(path):
    """What the hook is there to notice."""
    for reach in (path / "inside", root / "outside" / "secret"):
        open(reach, "w" if reach.name == "inside" else "r").close()
    eval("1 + 1")
    __import__("this_module_is_not_there")


def base():
    model = minift.load_model(valid["model"]) if base.model is None else base.model
    base.model = model
    return model


base.model = None


def watch(event, arguments):
    if not watching:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2]
        # a link that is not followed stays where it is
        path = path if flags & os.O_NOFOLLOW else os.path.realpath(path)
        if not path.startswith(f"{folder}/") or flags & (os.O_WRONLY | os.O_RDWR):
            events.append(f"open {path}")
    elif event.startswith(WATCHED):
        events.append(f"{event} {arguments!r:.200}")


def load(kind, path):
    """(what came of it, seconds)."""
    global watching
    start = time.process_time()
    watching = True
    try:
        LOADERS[kind](path)
        outcome = "loaded"
    except (ValueError, OSError) as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"escaped: {error!r:.300}"
    watching = False
    seconds = time.process_time() - start
    if kind == "adapter":
        for name in list(base().adapters):
            outcome = outcome if outcome == "loaded" else f"left behind: {outcome}"
            base().adapters.remove(name)
    return outcome, seconds


def peak_bytes():
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))


def main():
    global folder
    torch.set_num_threads(1)
    cases = json.loads((root / "cases.json").read_text())
    for kind in 2 * list(LOADERS):  # what is imported and allocated on first use
        assert load(kind, valid[kind])[0] == "loaded", load(kind, valid[kind])
    sys.addaudithook(watch)
    LOADERS["misbehaves"] = misbehave
    folder = valid["model"]
    load("misbehaves", folder)
    noticed = sorted({event.split()[0] for event in events})
    events.clear()
    results, before = [], peak_bytes()
    for number, (kind, name, target) in enumerate(cases):
        folder = root / "cases" / str(number)
        base()
        outcome, seconds = load(kind, folder / target)
        for _ in range(4):  # another process may have had the caches
            if seconds > 0.025:
                seconds = min(seconds, load(kind, folder / target)[1])
        results.append(
            {"kind": kind, "name": name, "outcome": outcome, "seconds": seconds, "events": list(set(events))}
        )
        events.clear()
    grown = peak_bytes() - before
    folder = root / "valid"
    loads = {kind: load(kind, path)[0] for kind, path in valid.items()}
    print(
        json.dumps({"results": results, "grown": grown, "valid": loads, "events": events, "noticed": noticed})
    )


main()
