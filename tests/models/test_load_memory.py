"""Loading is memory-mapped: private memory of a process of its own, sampled while it loads.

Pages of the mapped file are not private: they are the system's cache, and go when it needs them.
"""

import subprocess
import sys

import pytest
from conftest import tiny_llama

import minift

SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
PROGRAM = """
import sys, threading, time
import minift, minift.load, torch
folder, small, dtype, quantize = sys.argv[1:]
def private():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
minift.load_model(small, dtype, quantize=quantize or None)  # what is allocated on first use
start, peak, done = private(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
model = minift.load_model(folder, dtype, quantize=quantize or None)
done = True; watcher.join()
peak = max(peak, private())  # the watcher may not have had its turn
print((peak - start) / (2 * {parameters}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of a model of 206 MB in bf16, folder of one of its blocks, parameters of the first)."""
    root, parameters = tmp_path_factory.mktemp("memory"), 0
    for name, sizes in (("large", SIZES), ("small", {**SIZES, "num_hidden_layers": 1})):
        model = tiny_llama(**sizes).bfloat16()
        parameters = max(parameters, sum(p.numel() for p in model.parameters()))
        minift.save_model(model, root / name)
    return root / "large", root / "small", parameters


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "dtype, quantize, limit", [("bfloat16", "", 1.3), ("float32", "", 2.6), ("bfloat16", "nf4", 0.4)]
)
def test_loading_takes_little_more_than_the_model(folders, dtype, quantize, limit):
    """As a multiple of the model's bytes in bf16; 0.28 of them is what NF4 keeps."""
    large, small, parameters = folders
    program = PROGRAM.replace("{parameters}", str(parameters))
    words = [sys.executable, "-c", program, large, small, dtype, quantize]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert 0.9 * limit / 1.3 <= float(done.stdout) <= limit
