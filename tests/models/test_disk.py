"""Writing: what is on disk at every moment of a save, and in which order it gets there."""

import json
import os
import shutil

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import save_file

import minift
from minift.models import disk, weights


def watched(monkeypatch, before_step):
    """Call `before_step(name, path)` before each flush, removal and renaming."""
    unlink, real = disk.Path.unlink, {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(handle):
        before_step("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        real["fsync"](handle)

    def replace(part, path):
        before_step("replace", str(path))
        real["replace"](part, path)

    def removed(path, **options):
        before_step("unlink", str(path))
        unlink(path, **options)

    monkeypatch.setattr(disk.os, "fsync", fsync)
    monkeypatch.setattr(disk.os, "replace", replace)
    monkeypatch.setattr(disk.Path, "unlink", removed)


def test_everything_is_on_disk_before_anything_has_its_name(tmp_path, monkeypatch):
    steps = []
    minift.save_model(tiny_llama(), tmp_path)
    watched(monkeypatch, lambda what, path: steps.append((what, os.path.basename(path))))
    minift.save_model(tiny_llama(seed=1), tmp_path)
    flushed, renamed = [s for s in steps if s[0] == "fsync"], [s for s in steps if s[0] == "replace"]
    assert renamed == [("replace", "model.safetensors"), ("replace", "config.json")]
    first = steps.index(renamed[0])
    assert [path.split(".")[1] for _, path in flushed[:2]] == ["model", "config"]
    assert steps.index(flushed[1]) < first and steps.index(flushed[2]) > steps.index(renamed[1])
    assert len(flushed) == 3 and flushed[2][1] == tmp_path.name  # the folder


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def shard(folder):
    """The model of a folder in two files and an index."""
    state = minift.load_model(folder).state_dict()
    halves = [{n: t for i, (n, t) in enumerate(state.items()) if i % 2 == k} for k in (0, 1)]
    for k, half in enumerate(halves):
        save_file(half, folder / f"model-{k}.safetensors")
    index = {"weight_map": {n: f"model-{k}.safetensors" for k, half in enumerate(halves) for n in half}}
    disk.write_text(folder / weights.INDEX, json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("eps", [2.0**-20, 2.0**-10])
def test_a_crash_at_any_step_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, sharded, eps):
    """With another config there is a moment with none; never new weights under an old config."""
    folder, images = tmp_path / "m", []
    old, new = tiny_llama(), tiny_llama(seed=1, rms_norm_eps=eps)
    minift.save_model(old, folder)
    if sharded:
        shard(folder)

    def image(what, path):
        images.append(tmp_path / f"image-{len(images)}")
        shutil.copytree(folder, images[-1])

    with monkeypatch.context() as patch:
        watched(patch, image)
        minift.save_model(new, folder)
    found = []
    for path in [*images, folder]:
        try:
            loaded = minift.load_model(path)
        except ValueError as error:
            assert "is missing" in str(error) and (old.config != new.config or sharded)
            found.append("none")
            continue
        model = {old.config: old, new.config: new}[loaded.config] if old.config != new.config else None
        model = model or (old if same(loaded, old) else new)
        assert same(loaded, model)
        found.append("old" if model is old else "new")
    assert found[0] == "old" and found[-1] == "new" and len(images) >= 6
    assert found == sorted(found, key=["old", "none", "new"].index)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("step", range(6))
def test_an_error_at_any_step_leaves_no_part_behind(tmp_path, monkeypatch, step):
    count = iter(range(100))

    def fail(what, path):
        if what != "unlink" and next(count) == step:
            raise OSError(28, "No space left on device")

    minift.save_model(tiny_llama(), tmp_path)
    with monkeypatch.context() as patch:
        watched(patch, fail)
        if step < 5:
            with pytest.raises(OSError, match=r"cannot write .*model.safetensors: No space left"):
                minift.save_model(tiny_llama(seed=1), tmp_path)
        else:
            minift.save_model(tiny_llama(seed=1), tmp_path)  # has no more steps
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    minift.load_model(tmp_path)


def test_files_get_the_mode_that_new_files_get(tmp_path):
    disk.write_text(tmp_path / "a", "é")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").read_text(encoding="utf-8") == "é"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
