"""Folders of drafters and compositions to the Hub and back.

Knows huggingface_hub. What the files mean is known where they are written.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from .storage import staged_folder

SHARED = ("*.json", "*.safetensors", "*.md", "*.py", "*.txt")  # no pickles, and nothing hidden


class Shared:
    """What drafters with files share: `push_to_hub`, by their own `save_pretrained`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        **saving: Any,
    ) -> str:
        """Save, and upload in one commit; returns the commit's address.

        Args:
            repo_id: "user/name"; made when it is not there.
            private: of a repository that is made; None leaves it to the Hub's own setting.
            revision: a branch, made when it is not there; None is "main".
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.
            token: of the Hub; None takes the one that was stored at login.
            saving: arguments of `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)  # type: ignore[attr-defined]
            return push_folder(Path(folder), repo_id, private=private, revision=revision,
                               commit_message=commit_message, create_pr=create_pr, token=token)  # fmt: skip


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Upload the files of `folder` in one commit, as `Shared.push_to_hub`: all of them arrive, or none.

    Raises:
        FileNotFoundError: `folder` is none.
        ValueError: it holds a link that leads out of it.
        OSError: the Hub refused or could not be reached (`HfHubHTTPError`); its last commit stays as it was.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the one that a drafter or composition was saved to")
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}: replace the link by the file, if it is to be uploaded")
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = hub.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
        commit_message=commit_message or "Upload by ppd_compose", allow_patterns=list(SHARED), ignore_patterns=[".*"],
    )  # fmt: skip
    return str(commit.pr_url or commit.commit_url)


def pull_folder(repo_id: str, folder: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a repository into `folder`, which is there whole or not at all.

    Raises:
        FileExistsError: `folder` is there already.
        OSError: the Hub refused or could not be reached (`HfHubHTTPError`, `LocalEntryNotFoundError`).
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it, or name another")
    fetched = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(SHARED)))
    with staged_folder(folder) as staging:
        shutil.copytree(fetched, staging, dirs_exist_ok=True)  # follows the links of the cache
    return folder
