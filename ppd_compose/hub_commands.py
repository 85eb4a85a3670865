"""`ppd-compose push`, `pull` and `convert`: folders to the Hub and back, and adapters of the PPD authors' code.

Knows typer. What is uploaded and read is known to `hub` and `adapter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BaseOption, OutOption

FolderArgument = Annotated[Path, typer.Argument(help="Folder that a drafter or composition was saved to.")]
RepoArgument = Annotated[str, typer.Argument(help="user/name on the Hub.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit; main when left out.")]


def push(
    folder: FolderArgument,
    repo: RepoArgument,
    private: Annotated[bool | None, typer.Option(help="Whether a repository that is made is private.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made when it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    custom_generate: Annotated[
        bool, typer.Option("--custom-generate", help="Let model.generate(custom_generate=REPO) decode with it.")
    ] = False,
) -> None:
    """Upload a folder in one commit and print the commit's address; logged in by `hf auth login` or HF_TOKEN."""
    from .drafters import load_drafter
    from .hub import push_folder
    from .saved import COMPOSITION, read_composition

    if (folder / COMPOSITION).is_file():
        read_composition(folder)
    else:
        load_drafter(folder.resolve())
    print(push_folder(
        folder, repo, private=private, revision=revision, commit_message=message, create_pr=create_pr,
        custom_generate=custom_generate,
    ))  # fmt: skip


def pull(
    repo: RepoArgument,
    folder: Annotated[Path, typer.Argument(help="Folder to write, which must not be there yet.")],
    revision: RevisionOption = None,
) -> None:
    """Fetch a repository into a folder: JSON, safetensors, cards; no pickles."""
    from .hub import pull_folder

    print(pull_folder(repo, folder, revision=revision))


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of an adapter of the PPD authors' code.")],
    out: OutOption,
    base: BaseOption,
    revision: RevisionOption = None,
) -> None:
    """Write an adapter of the PPD authors' code (hmarkc/ppd-*) as prompt tokens of this project, for a base."""
    from .identity import Identity, called
    from .loading import load_base
    from .prompt import PromptTokens
    from .training_setup import refuse_out

    refuse_out(out, PromptTokens)
    tokens = PromptTokens.from_pretrained(source, revision=revision)
    if tokens.identity is not None:
        raise ValueError(f"{source} is an adapter of this project already, for {tokens.identity}")
    loaded = load_base(base)
    tokens.prepare(loaded.model)
    facts = {"converted from": called(Path(source)) if Path(source).is_dir() else source}
    PromptTokens(tokens.embeddings, None, Identity.of(loaded.model), facts).save_pretrained(out)
