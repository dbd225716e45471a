"""Faults planted in the C file, each of which the checks of the ops notice; the address sanitizer."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_decode_attention import check_decode_attention
from test_library import LEVELS, check_everything, check_ties
from test_linear import check_linear
from test_rms_norm import check_rms_norm

from minift.kernels import library

SOURCES = Path(library.__file__).parent / "cpu"
pytestmark = [
    pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="mutants are compiled with gcc"),
]

MUTANTS = [
    ("kernels.c", "int minift_level(void)", "int minift_level(void)"),  # the source as it is passes
    ("weights.h", "*even = NAME(lookup)(t, bytes >> 4);", "*even = NAME(lookup)(t, bytes >> 3);"),
    ("weights.h", "if (at + W > 256) scale", "if (0) scale"),
    ("weights.h", "value * scale + w->offset[0];", "NAME(fma)(value, scale, NAME(splat)(w->offset[0]));"),
    ("weights.h", "if (kind == TABLE4) memcpy(codes, w->packed + from / 2, (rest + 1) / 2);", "if (0) ;"),
    ("weights.h", "for (int step = 8; step; step /= 2)", "for (int step = 8; step > 1; step /= 2)"),
    ("weights.h", "(x > NAME(lookup)", "(x >= NAME(lookup)"),
    ("weights.h", "x = divide ? x / divisor : x * inverse;", "x = x * inverse;"),
    ("weights.h", "(kind == INTEGER8 ? 127 : 1)", "(kind == INTEGER8 ? 128 : 1)"),
    ("vectors.h", "+ 0x7fff + ((bits >> 16) & 1)", "+ 0x8000"),
    ("vectors.h", "code * (129 / 16384.0f) + code", "code * (129 / 16384.0f) + 0 * code"),
    ("adamw.h", "sign * CELLS", "sign * (CELLS - 1)"),
    ("adamw.h", "(bits ^ sign) & 0xffff", "bits & 0xffff"),
    ("adamw.h", "memset(m_copy, a->m_zero", "memset(m_copy, 255"),
    ("adamw.h", "grad * grad * a->one_minus_beta2", "grad * (grad * a->one_minus_beta2)"),
    ("adamw.h", "v_old * a->beta2", "v_old * a->beta1"),
    ("adamw.h", "x * a->keep", "x"),
    ("adamw.h", "where[2], m_absmax, where[3], v_absmax)", "where[2], m_absmax, where[3], m_absmax)"),
    (
        "adamw.h",
        "count < MOMENTS) {\n                memcpy(p, p_copy",
        "0) {\n                memcpy(p, p_copy",
    ),
    ("kernels.c", "FIRST_CELL = 103 * 128", "FIRST_CELL = 104 * 128"),
    ("bf16.h", "entries[i % 16]", "entries[i / 2]"),
    ("bf16.h", "_mm512_srai_epi16(words, 8)", "_mm512_srli_epi16(words, 8)"),
    ("amx.h", "_tile_loadd(4, pairs + 8 * k + 256, 64)", "_tile_loadd(4, pairs + 8 * k, 64)"),
    ("amx.h", "splat_avx512(scale[r * blocks + block])", "splat_avx512(scale[block])"),
    ("vectors.h", "(v[0] + v[2]) + (v[1] + v[3])", "(v[0] + v[2]) + (v[1] + v[2])"),
    ("linear.h", "if (k < K) STEP", "if (0) STEP"),
    ("linear.h", "bias[i] = NAME", "bias[0] = NAME"),
    ("linear.h", "height * sizeof *line", "sizeof line"),
    ("linear_amx.h", "            _tile_zero(0);\n", ""),
    ("linear_amx.h", "r < height; r++) memcpy", "r < height - 1; r++) memcpy"),
    ("rms_norm.h", "/ D + eps", "/ D"),
    ("rms_norm.h", "NAME(fma)(last, last, total)", "total"),
    ("attend.h", "x < -87", "x < -8"),
    ("attend.h", "1 / 24.0f", "1 / 25.0f"),
    ("attend.h", "twice + hd / 2 + i", "twice + i"),
    ("attend.h", "vi above = s > most", "vi above = s < most"),
    ("attend.h", "a->mask + b * a->mask_stride", "a->mask"),
    ("attend.h", "a->cos, b * a->table_stride + i", "a->cos, i"),
    ("attend.h", "* a->scale", "* a->scale * a->scale"),
    ("attend.h", "NAME(splat)(score[g * width + t])", "NAME(splat)(score[t])"),
]
CHECKS = (check_everything, check_ties, check_linear, check_rms_norm, check_decode_attention)


def build(folder: Path, *flags) -> Path:
    flags = ["-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", *flags]
    subprocess.run(["gcc", *flags, folder / "kernels.c", "-o", folder / "kernels.so"], check=True)
    return folder / "kernels.so"


# Each is compiled, seconds of work: one in four in the default run, the others among the slow tests.
@pytest.mark.parametrize(
    "file, old, new",
    [pytest.param(*m, marks=[pytest.mark.slow] * (i % 4 > 0), id=str(i)) for i, m in enumerate(MUTANTS)],
)
def test_mutants_die(file, old, new, tmp_path, monkeypatch):
    if file in ("bf16.h", "amx.h", "linear_amx.h") and len(LEVELS) < 5:
        pytest.skip("this processor has no AVX-512 BF16 or no AMX")
    shutil.copytree(SOURCES, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {file}"
    (tmp_path / file).write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(library, "LIBRARY", library.open_library(build(tmp_path, "-O0")))
    torch.manual_seed(0)
    with pytest.raises(AssertionError) if old != new else nullcontext():
        for check in CHECKS:
            check()


@pytest.mark.slow
def test_the_address_sanitizer_sees_nothing(tmp_path):
    shutil.copytree(SOURCES, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    built = build(tmp_path, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests', 'tests/kernels']\n"
        "import test_library as t, test_library_mutants as m\n"
        f"t.library.LIBRARY = t.library.open_library(Path({str(built)!r}))\n"
        "for level in t.LEVELS:\n    t.library.LEVEL = level\n    t.check_everything(); t.check_ties()\n"
        "for check in m.CHECKS[2:]:\n    check()\n"
        "print('clean')"
    )
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]
