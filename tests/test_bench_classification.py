"""The benchmark of classifiers: an interruption loses one run, and the table says what the runs said."""

import json
import subprocess
import types

import pytest

from benchmarks import bench_classification as bench

RIGHT = {"head": "1000", "lora": "1110", "full": "1101"}


class Process:
    """A program that knows the result of every run, and stops after some of them."""

    def __init__(self, until=10**6):
        self.calls, self.until = [], until

    def __call__(self, command, **options):
        if len(self.calls) == self.until:
            raise subprocess.CalledProcessError(1, command)
        task, method, seed = command[3:6]
        self.calls.append((task, method, seed))
        right = RIGHT.get(method, "1100")
        result = {"task": task, "method": method, "seed": int(seed), "rate": 1e-3, "f1": 0.5, "trainable": 7}
        result |= {"accuracy": right.count("1") / 4, "steps": 2, "seconds": 1.0 + int(seed), "peak": 100}
        return types.SimpleNamespace(stdout=f"noise\n{json.dumps(result | {'right': right})}\n")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WORK", tmp_path / "out" / "work.jsonl")
    monkeypatch.setenv("MINIFT_TEST_DATA", str(tmp_path))
    return bench.WORK


def test_a_second_call_runs_what_the_first_did_not_finish(monkeypatch, work):
    first, second = Process(until=5), Process()
    monkeypatch.setattr(subprocess, "run", first)
    with pytest.raises(subprocess.CalledProcessError):
        bench.run(False)
    with open(work, "a", encoding="utf-8") as file:
        file.write('{"key": {"cut')  # the line that a crash cut off
        file.write("\n")
    monkeypatch.setattr(subprocess, "run", second)
    rows, details = bench.run(False)
    assert len(first.calls + second.calls) == len(set(first.calls + second.calls)) == 24
    assert len(rows) == 12 and len(details["runs"]) == 24 and not work.exists()


def test_other_settings_are_measured_again(monkeypatch, work):
    monkeypatch.setattr(subprocess, "run", Process(until=3))
    with pytest.raises(subprocess.CalledProcessError):
        bench.run(False)
    monkeypatch.setitem(bench.RUNS, "head", (bench.RUNS["head"][0], 0.5))
    again = Process()
    monkeypatch.setattr(subprocess, "run", again)
    bench.run(False)
    assert len(again.calls) == 24


def test_the_table_has_means_over_seeds_and_the_paired_interval(monkeypatch):
    monkeypatch.setattr(subprocess, "run", Process())
    rows, details = bench.run(False)
    lora = next(row for row in rows if row["task"] == "sst2" and row["method"] == "lora")
    assert (lora["accuracy %"], lora["seeds"], lora["s"]) == ("75.0", "75.0, 75.0, 75.0", 2)
    # One row right by either alone of four: 0 +- 1.96 sqrt(2) / 4.
    assert details["paired"] == dict.fromkeys(("sst2", "banking77"), "+0.0 (-69.3 to +69.3)")


def test_the_subsample_is_balanced_and_does_not_depend_on_the_order_of_the_file():
    rows = [{"text": f"{i}", "label": i % 2} for i in range(20)]
    found = bench.subsample(rows, 3)
    assert [sum(row["label"] == x for row in found) for x in (0, 1)] == [3, 3]
    assert bench.subsample(rows[::-1], 3) == found
