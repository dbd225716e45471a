"""Packaging. kernels/ stands at the top of the repository and is installed as minift.kernels."""

from pathlib import Path

from setuptools import Extension, setup

DEMO = ["gguf>=0.17", "matplotlib>=3.9"]

# Plain C, loaded by ctypes; where it does not compile, the install goes on without it.
CPU_KERNELS = Extension(
    "minift.kernels.cpu._kernels",
    sources=["kernels/cpu/kernels.c"],
    depends=sorted(map(str, Path("kernels/cpu").glob("*.h"))),
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name="minift",
    version="0.1.0",
    description="A from-scratch research framework for parameter-efficient fine-tuning",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "minift",
        "minift.data",
        "minift.kernels",
        "minift.kernels.cpu",
        "minift.methods",
        "minift.metrics",
        "minift.models",
        "minift.optim",
        "minift.quant",
        "minift.reports",
        "minift.training",
    ],
    package_dir={"minift.kernels": "kernels"},
    package_data={"minift.kernels.cpu": ["*.c", "*.h"]},
    ext_modules=[CPU_KERNELS],
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "jinja2>=3.1.4",
    ],
    extras_require={
        "demo": DEMO,
        "plots": ["matplotlib>=3.9"],
        "tensorboard": ["tensorboard>=2.18"],
        "test": [*DEMO, "safetensors>=0.5", "pytest>=8.3", "hypothesis>=6.120", "ruff>=0.9"],
        "parity": [
            *("transformers>=5.0", "peft>=0.18", "bitsandbytes>=0.50"),
            *("scikit-learn>=1.9", "scipy>=1.15", "sacrebleu>=2.6", "rouge-score>=0.1.2", "nltk>=3.10"),
            *("seqeval>=1.2.2", "statsmodels>=0.15", "krippendorff>=0.8"),
        ],
    },
    entry_points={"console_scripts": ["minift = minift.cli:main"]},
)
