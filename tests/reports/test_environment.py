"""minift env: what runs here and why; a wish that cannot be met is one sentence."""

import os
import subprocess
import sys

import pytest

from minift.kernels import library


def env(**changes):
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **changes}
    command = [sys.executable, "-m", "minift.cli", "env"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_page_names_versions_and_backends():
    page = env().stdout
    rows = dict(line.split(maxsplit=1) for line in page.splitlines() if line.split()[0] in ("torch", "cache"))
    assert set(rows) == {"torch", "cache"} and library.WHY in page


@pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")
def test_a_lower_instruction_set_or_another_backend_is_named():
    assert "plain, named by MINIFT_CPU" in env(MINIFT_CPU="plain").stdout
    page = env(MINIFT_BACKEND="torch").stdout
    assert "kernels on CPUs  torch" in page


@pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")
def test_an_instruction_set_that_is_not_there_is_one_sentence():
    done = env(MINIFT_CPU="sse9")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MINIFT_CPU is 'sse9'; this processor runs plain" in done.stderr
