"""Installation: `pip install -e .`, with extras for what a plain install leaves out."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirement lines of a file, without comments and without other files it includes."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


EXTRAS = {
    "eval": requirements("requirements-eval.txt"),  # LLM Foundry itself comes with `make install-eval`
    "serve": requirements("requirements-serve.txt"),
    "wandb": ["wandb==0.31.0"],
    "ray": ["ray[default]==2.60.0"],
    "parquet": ["pyarrow==26.0.1"],  # for data sets of the Hub
    "gpu": ["xformers>=0.0.30"],
    "ladder": requirements("requirements-ladder.txt"),
    "s3": ["s3fs==2026.9.0", "aiobotocore==3.10.0", "boto3==1.43.117"],
}

setup(
    name="open_lm",
    version="1.0.0.dev0",
    description="A small, fast and reliable trainer of language models that streams webdataset shards",
    license="MIT",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["open_lm", "open_lm.*"]),
    package_data={"open_lm.model": ["configs/*.json"], "open_lm.kernels": ["cpu/*"], "open_lm.serve": ["page/*"]},
    install_requires=requirements("requirements.txt"),
    extras_require={**EXTRAS, "all": sorted({package for extra in EXTRAS.values() for package in extra})},
)
