"""Dependencies of the package, read from the requirements files; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
EXTRA_NAMES = {"wandb": ["wandb"], "s3": ["s3fs", "aiobotocore", "boto3"]}
"""Extras that requirements.txt installs as well."""


def requirements(name: str) -> dict[str, str]:
    """The requirement lines of a file by the name of the package, without comments and options."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    words = {line: line.replace("[", " ").replace(">", " ").replace("=", " ").replace(";", " ") for line in lines}
    return {word.split()[0]: line for line, word in words.items() if line and not line.startswith("-")}


NEEDED = requirements("requirements.txt")
EXTRAS = {extra: [NEEDED.pop(name) for name in names] for extra, names in EXTRA_NAMES.items()} | {
    "ray": ["ray[default]>=2.50"],
    "parquet": ["pyarrow>=20"],  # for data sets of the Hub
    "gpu": ["xformers>=0.0.30"],
    "eval": list(requirements("requirements-eval.txt").values()),  # LLM Foundry itself comes with `make install-eval`
    "serve": list(requirements("requirements-serve.txt").values()),
    "ladder": list(requirements("requirements-ladder.txt").values()),
    "test": ["pytest>=9", "pytest-xdist>=3.6", "hypothesis>=6.150"],
    "docs": list(requirements("requirements-docs.txt").values()),
}
ALL = sorted({package for name in ("wandb", "s3", "ray", "parquet", "serve", "ladder", "gpu") for package in EXTRAS[name]})

setup(install_requires=list(NEEDED.values()), extras_require={**EXTRAS, "all": ALL})
