"""Drafts and the Hugging Face hub: fetch one to import; upload one completely, never over another unless asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspec.drafts import check_files, weight_files
from deepspec.errors import DraftError
from deepspec.files import read_json
from deepspec.progress import bytes_read, waiting


def fetch_draft(source: str | Path) -> Path:
    """The folder of a draft: ``source`` itself, or where the hub's ``owner/name`` was downloaded to.

    Raises:
        DraftError: no such folder, and no such repository or no way to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(source).is_dir():
        return Path(source)
    try:
        with waiting(f"fetching {source}"):
            return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise DraftError(f"neither a folder nor a model of the hub ({first})", file=source) from None


def push_draft(folder: str | Path, repository: str, private: bool = True, update: bool = False, api: Any = None) -> str:
    """Upload an exported draft folder.

    Args:
        folder: what ``deepspec export`` wrote.
        repository: ``owner/name`` on the hub; created where it does not exist.
        private: whether a new repository is.
        update: whether files of a repository that holds a model already may be replaced.
        api: a ``huggingface_hub.HfApi``; None makes one, with the token that ``hf auth login`` stored.

    Returns:
        The address of the commit.

    Raises:
        DraftError: the folder is incomplete, the repository holds a model and ``update`` is False, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = Path(folder)
    config = _check_whole(folder)
    hub = api or HfApi()
    try:
        if hub.repo_exists(repository) and hub.file_exists(repository, "config.json") and not update:
            remedy = "name another repository, or allow it (--update)"
            raise DraftError("the repository holds a model already", file=repository, remedy=remedy)
        hub.create_repo(repository, private=private, exist_ok=True)
        with waiting(f"uploading to {repository}", folder, bytes_read):
            commit = hub.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                commit_message=f"{config['architectures'][0]}, exported by deepspec",
                ignore_patterns=[".*", "evaluation/*"],
            )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise DraftError(f"the hub refuses ({first})", file=repository, remedy="hf auth login, or HF_TOKEN") from None
    return str(getattr(commit, "commit_url", commit))


def _check_whole(folder: Path) -> dict[str, Any]:
    """The config of a folder that an export finished.

    Raises:
        DraftError: a part of it is missing or has changed.
    """
    for name in ("provenance.json", "config.json", "README.md"):
        if not (folder / name).is_file():
            remedy = "export it: deepspec export DRAFT OUT --format ... (the card is written with it)"
            raise DraftError("no such file", file=folder / name, remedy=remedy)
    for path in weight_files(folder):
        if not path.is_file():
            raise DraftError("no such file", file=path)
    check_files(folder)
    return dict(read_json(folder / "config.json", DraftError))
