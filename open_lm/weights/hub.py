"""Models on the Hugging Face Hub: `hf://owner/name[@revision]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_lm.errors import ConfigError, StorageError

SCHEME = "hf://"
WANTED = ["*.json", "*.safetensors", "*.pt", "*.bin", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class HubModel:
    """A repository on the Hub, at a revision (None: its main branch)."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, url: str) -> HubModel:
        """The repository that `url` names.

        Raises:
            ConfigError: it is not of the form hf://owner/name[@revision].
        """
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", url.rstrip("/"))
        if match is None:
            raise ConfigError(f"{url}: not a model on the Hub. Write hf://owner/name or hf://owner/name@revision.")
        return cls(match[1], match[2])


def download(url: str) -> Path:
    """The local folder (of huggingface_hub's cache) with the configs and weights of `url`.

    Raises:
        StorageError: there is no such repository, no access to it, or no network and nothing in the cache.
    """
    import huggingface_hub

    model = HubModel.parse(url)
    try:
        return Path(huggingface_hub.snapshot_download(model.repo, revision=model.revision, allow_patterns=WANTED))
    except Exception as error:  # huggingface_hub raises its own, httpx's and OSErrors
        raise StorageError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    known: Sequence[tuple[type, str]] = (
        (errors.GatedRepoError, "access to it must be asked for on its page on the Hub, then log in: `hf auth login`."),
        (errors.RevisionNotFoundError, "no such revision. Look at the branches and tags of the repository."),
        (
            errors.RepositoryNotFoundError,
            "no such model, or a private one. Check the name, or log in: `hf auth login` (or set HF_TOKEN).",
        ),
        (
            errors.LocalEntryNotFoundError,
            "not in the cache, and the Hub cannot be reached (offline mode, or no network).",
        ),
    )
    text = str(error).strip()
    shown = text.splitlines()[0] if text else type(error).__name__
    return next((f"{said} ({shown})" for kind, said in known if isinstance(error, kind)), shown)


def push(folder: Path, repo: str) -> str:
    """Upload `folder` to the repository, which is made (private) if there is none; returns its page.

    Raises:
        StorageError: not logged in, not allowed, or no network.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model trained with OpenLM")
        return f"{api.endpoint}/{repo}"
    except Exception as error:  # huggingface_hub raises its own, httpx's and OSErrors
        raise StorageError(f"--push {repo}: {_reason(error)}") from error
