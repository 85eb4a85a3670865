"""Folders of drafters and compositions to the Hub and back.

Knows huggingface_hub. What the files mean is known where they are written.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

from .saved import COMPOSITION
from .shipped import DATA
from .sources import asking_the_hub
from .storage import staged_folder

TEMPLATE = DATA / "custom_generate.template"
SHARED = ("*.json", "*.safetensors", "*.md", "*.py", "*.txt", "*.jinja", "*.model")  # no pickles, nothing hidden
CONFIG = "config.json"
# Beside a configuration they decide what it is of, or hold its weights.
RIVALS = ("adapter_config.json", "*_origin.json", "*.index.json", "*.safetensors", "*.bin", "*.pt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class PushesToHub:
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
        custom_generate: bool = False,
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
            custom_generate: see `push_folder`.
            saving: arguments of `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)  # type: ignore[attr-defined]
            return push_folder(
                Path(folder), repo_id, private=private, revision=revision, commit_message=commit_message,
                create_pr=create_pr, token=token, custom_generate=custom_generate,
            )  # fmt: skip


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    custom_generate: bool = False,
) -> str:
    """Upload the files of `folder` in one commit, as `PushesToHub.push_to_hub`: all of them arrive, or none.

    With `custom_generate` the repository gets a `custom_generate/generate.py`, so that
    `model.generate(custom_generate=repo_id, trust_remote_code=True)` decodes with it, with nothing else to write.

    Raises:
        FileNotFoundError: `folder` is none.
        ValueError: it holds a link that leads out of it, weights that are pickles only, or nothing to upload; or the
            repository is there already and public, though `private`, or holds files that would be read instead.
        OSError: the Hub refused or could not be reached; its last commit stays as it was.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the one that a drafter or composition was saved to")
    files: dict[str, Any] = {path.relative_to(folder).as_posix(): path for path in _to_upload(folder)}
    hub, message = HfApi(token=token), commit_message or "Upload by ppd_compose"
    with asking_the_hub(repo_id, revision):
        repo_id = _repository(hub, repo_id, private, None if create_pr else revision)
        if custom_generate:
            code = TEMPLATE.read_text(encoding="utf-8")
            code = code.format(repo=repo_id, revision=revision, whole=COMPOSITION in files)
            files["custom_generate/generate.py"] = code.encode()
        _refuse_rivals(set(hub.list_repo_files(repo_id, revision=None if create_pr else revision)), set(files), repo_id)
        adds = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = hub.create_commit(repo_id, adds, revision=revision, commit_message=message, create_pr=create_pr)
    return str(commit.pr_url or commit.commit_url)


def _repository(hub: HfApi, repo_id: str, private: bool | None, branch: str | None) -> str:
    """The full name of the repository, which is there then, with that branch."""
    made = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not hub.model_info(made).private:
        raise ValueError(f"{made} is there already and public: make it private on the Hub, or leave private out")
    if branch is not None and not branch.startswith("refs/"):
        hub.create_branch(made, branch=branch, exist_ok=True)
    return made


def _refuse_rivals(there: set[str], files: set[str], repo_id: str) -> None:
    """Raise `ValueError` when files that stay beside those uploaded say, or hold, what is read in their place."""
    for config in (PurePosixPath(name) for name in sorted(files) if PurePosixPath(name).name == CONFIG):
        beside = (PurePosixPath(name) for name in sorted(there - files) if PurePosixPath(name).parent == config.parent)
        if rival := next((name for name in beside if any(map(name.match, RIVALS))), None):
            raise ValueError(
                f"{repo_id} holds {rival}, which would be read with what is uploaded or in its place: remove it there "
                "or give another repository"
            )


def _to_upload(folder: Path) -> list[Path]:
    """What is uploaded; a `ValueError` for links that lead out, and for weights that would stay behind."""
    for path in _visible(folder):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}: replace the link by the file, if it is to be uploaded")
        if path.suffix in PICKLES and not any(path.parent.glob("*.safetensors")):
            raise ValueError(f"{path} is a pickle, which is not uploaded: save it as safetensors first")
    if not (found := _shared_files(folder)):
        raise ValueError(f"{folder} holds nothing to upload: expected files {', '.join(SHARED)}")
    return found


def _shared_files(folder: Path) -> list[Path]:
    return sorted(path for path in _visible(folder) if path.is_file() and any(map(path.match, SHARED)))


def _visible(folder: Path) -> list[Path]:
    """All in `folder` that is neither hidden nor in something hidden."""
    return [path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)]


def pull_folder(repo_id: str, folder: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a repository into `folder`, which is there whole or not at all.

    Raises:
        FileExistsError: `folder` is there already.
        ValueError: the repository holds nothing of what is shared.
        OSError: the Hub refused or could not be reached.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it, or name another")
    with asking_the_hub(repo_id, revision):
        fetched = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(SHARED)))
    if not (found := _shared_files(fetched)):
        raise ValueError(
            f"{repo_id} holds nothing to fetch: expected files {', '.join(SHARED)}; pickles are left there"
        )
    with staged_folder(folder) as staging:
        # The snapshot is one of links into the cache, and may hold more than was asked for this time.
        for path in found:
            place = staging / path.relative_to(fetched)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return folder
