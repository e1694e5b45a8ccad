"""Dependencies of the package, read from the requirements files; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
EXTRA_NAMES = {"wandb": ["wandb"], "s3": ["s3fs", "aiobotocore", "boto3"]}
"""Extras that requirements.txt installs as well."""


def requirements(name: str) -> list[str]:
    """The requirement lines of a file, without comments and options."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def package_of(line: str) -> str:
    """The name in a requirement line."""
    return re.split(r"[\s<>=\[;]", line)[0]


def named(names: list[str]) -> list[str]:
    """The lines of requirements.txt for these packages."""
    return [line for line in requirements("requirements.txt") if package_of(line) in names]


def at_least(line: str) -> str:
    """A requirement that pins what was tested as one that takes newer versions too: an extra replaces none of these."""
    return line.replace("==", ">=", 1)


EXTRAS = {extra: named(names) for extra, names in EXTRA_NAMES.items()} | {
    "ray": ["ray[default]>=2.50"],
    "gcs": ["gcsfs>=2026.7"],
    "azure": ["adlfs>=2026.8"],
    "parquet": ["pyarrow>=20"],  # for data sets of the Hub
    "gpu": ["xformers>=0.0.30"],
    "float8": ["torchao>=0.17,<0.20"],
    "eval": [
        at_least(line) for line in requirements("requirements-eval.txt")
    ],  # LLM Foundry itself comes with `make install-eval`
    "serve": requirements("requirements-serve.txt"),
    "ladder": requirements("requirements-ladder.txt"),
    "test": ["pytest>=9", "pytest-xdist>=3.6", "hypothesis>=6.150"],
    "docs": [at_least(line) for line in requirements("requirements-docs.txt")],
}
FOR_USE = ("wandb", "s3", "ray", "parquet", "serve", "ladder", "gpu", "float8")
EXTRAS["all"] = sorted({line for extra in FOR_USE for line in EXTRAS[extra]})
IN_EXTRAS = {name for names in EXTRA_NAMES.values() for name in names}
NEEDED = [line for line in requirements("requirements.txt") if package_of(line) not in IN_EXTRAS]

setup(install_requires=NEEDED, extras_require=EXTRAS)
