"""Options and arguments that commands share, those of other packages' `train` commands included.

Knows typer. Does not know any command.
"""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .loading import DTYPES


def _tell_version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"ppd-compose {version('ppd_compose')}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version, and end.")
]
BaseOption = Annotated[str, typer.Option(help="Folder or Hub id of the base; 'demo' is SmolLM2-135M-Instruct.")]
ListingOption = Annotated[
    str, typer.Option("--drafters", help="Names, folders or Hub ids of drafters joined by '+', or 'none'.")
]
DraftersOption = Annotated[
    list[str] | None,
    typer.Option(help="One composition: drafters joined by '+', or 'none'. Repeatable; 'ppd' when left out."),
]
CountOption = Annotated[int | None, typer.Option(min=1, help="Questions of each category; all when left out.")]
QuestionsOption = Annotated[
    Path | None, typer.Option(help='JSON lines with "prompt" or "turns", such as Spec-Bench; ours when left out.')
]
LengthOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
DtypeOption = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
RowsOption = Annotated[int | None, typer.Option(help="Most rows of a forward; as many as pay here when left out.")]
GenerateWithOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Also time the base's generate with this argument, such as prompt_lookup_num_tokens=10. Repeatable.",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result there. Cut off, the same command given again goes on."),
]
AllTurnsOption = Annotated[
    bool, typer.Option("--all-turns", help="Ask the later turns of a conversation too, after the base's answers.")
]
EagerOption = Annotated[
    bool, typer.Option("--eager", help="Time forwards as they are, as when none of these four is given.")
]
PackedOption = Annotated[
    bool, typer.Option("--packed", help="Keep weights a second time, laid out for the CPU's kernels.")
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the verify forward, which takes some minutes at first.")
]
RegionsOption = Annotated[
    bool, typer.Option("--regions", help="Compile layers that are alike once: sooner, and a little slower for good.")
]

PromptsOption = Annotated[Path, typer.Option(help='JSON lines with "prompt" or "turns".')]
OutOption = Annotated[Path, typer.Option(help="Folder to write.")]
StepsOption = Annotated[int, typer.Option(help="Optimiser steps.")]
BatchOption = Annotated[int, typer.Option(help="Replies in one step.")]
PointsOption = Annotated[int, typer.Option(help="Positions of each reply at which guesses are trained.")]
RateOption = Annotated[float, typer.Option(help="Peak of the cosine schedule of the learning rate.")]
MaxLengthOption = Annotated[int, typer.Option(help="Tokens of prompt and reply that are used.")]
HeldOutOption = Annotated[int, typer.Option(min=1, help="Prompts kept for the accuracies.")]
ReplyTokensOption = Annotated[int, typer.Option(min=1, help="Longest reply.")]
ReplyBatchOption = Annotated[int, typer.Option(min=1, help="Replies generated at once.")]
SeedOption = Annotated[int, typer.Option(help="Same seed, same weights.")]
CheckpointOption = Annotated[int, typer.Option(help="Steps between checkpoints.")]
DataOption = Annotated[str, typer.Option(help="Where the prompts come from, for the card.")]

# Paths from a root, Windows' too, alone or behind "=" or "+".
ABSOLUTE = re.compile(r"(?:^|(?<=[=+]))(?:/|[A-Za-z]:[\\/]|\\\\)(?:[^=+]*[\\/])?([^\\/=+]*)[\\/]?(?=[=+]|$)")


def compiling(compile: bool, regions: bool) -> bool | str:
    """Both options as `compose` takes them."""
    return "regions" if regions else compile


def command_line() -> str:
    """This command as it was typed, without the folders of this machine."""
    return shlex.join(["ppd-compose", *(ABSOLUTE.sub(r"\1", word) for word in sys.argv[1:])])
