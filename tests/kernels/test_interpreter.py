"""The tests of each kernel file marked `triton`, in Triton's interpreter, in a process of their own.

The default run leaves out their mutants, which take minutes there; `pytest -m slow` has them as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = [p for p in sorted(HERE.glob("test_*.py")) if "pytest.mark.triton" in p.read_text(encoding="utf-8")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
@pytest.mark.parametrize("path", [p for p in FILES if p != Path(__file__)], ids=lambda p: p.stem)
@pytest.mark.parametrize("chosen", ["not mutants", pytest.param("mutants", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(path, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "triton"]
    command += ["-k", chosen, path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    none_there = done.returncode == 5 and chosen == "mutants"
    assert done.returncode == 0 or none_there, done.stdout[-6000:] + done.stderr[-2000:]
