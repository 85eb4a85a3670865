"""From a base, a draft model and a prompt file to a draft folder: the whole of `ppd-compose train pard`.

Knows the order: draft model, own replies, training, files. The files are those that vLLM reads for parallel drafting.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose.checkpoints import discard
from ppd_compose.identity import Identity, called
from ppd_compose.paired import writing
from ppd_compose.prompts import Prompt
from ppd_compose.storage import staged_file
from ppd_compose.training_loop import placed
from ppd_compose.training_setup import checkpoints_in, split_replies, training_facts

from .card import model_card
from .drafter import DraftModel
from .files import draft_folder, load_draft
from .fitting import compare_vocabularies, refuse_draft
from .shared import KEYS, REACH, choose_token, shared_token
from .train import PardRecipe, train_parallel

TOKENIZER_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedDraft:
    """What a training made: the shared prompt token's id, and by distance how often the best guess was right."""

    token: int
    accuracy: list[float]


def train_pard(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: str | Path,
    prompts: list[Prompt],
    out: Path,
    recipe: PardRecipe,
    *,
    token: str | None = None,
    base_name: str | None = None,
    held_out: int = 64,
    reply_tokens: int = 160,
    reply_batch: int = 32,
    command: str = "",
    data: str = "",
) -> TrainedDraft:
    """Train the draft model `draft` (folder or Hub id) on the own replies of `base` to `prompts`, and save it to `out`.

    Trained in float32, saved in the base's dtype; the files of `draft` stay as they are. The last `held_out` prompts
    (at most a tenth) are kept for the accuracies. Replies are cached by base and prompts; checkpoints lie in
    `out` until the model is written, so a killed call goes on where it stopped.

    Args:
        token: id or text of the token that becomes the shared prompt token; None takes the one that `draft` has, or the
            last row of the vocabulary that no text uses.

    Raises:
        ValueError: the draft model does not fit the base, there is no free token, the base writes the given one, `out`
            holds another model, or training diverged.
    """
    begin = time.monotonic()
    folder = draft_folder(draft)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} holds the draft model to start from, which stays as it is: give another folder")
    checkpoints = checkpoints_in(out, DraftModel, KEYS[0])
    found = load_draft(folder, dtype=torch.float32)
    model, own = placed(found.model.to(base.device)), found.tokenizer
    refuse_draft(model)
    compare_vocabularies(model, base, own)
    known = None if token is not None else shared_token(model.config)
    chosen = choose_token(token, model.config, own or tokenizer) if known is None else known
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    if any(chosen in reply.ids for reply in [*replies, *held]):
        raise ValueError(f"token {chosen} is in the base's prompts or replies: the shared prompt token must be in none")
    accuracy = train_parallel(model, chosen, replies, held, recipe, checkpoints)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    made = TrainedDraft(chosen, accuracy)
    names = (Identity.of(base, base_name).name, called(folder) if Path(draft).is_dir() else str(draft))
    setattr(model.config, KEYS[0], chosen)
    setattr(model.config, REACH, recipe.tokens)
    model.config.spd_type = "pard"
    _write(cast(Any, model).to(base.dtype), folder, tokenizer, out, _card(names, made, facts))
    discard(checkpoints)
    return made


def _card(names: tuple[str, str], made: TrainedDraft, facts: Mapping[str, Any]) -> str:
    base, draft = (Path(name).name if Path(name).is_absolute() else name for name in names)
    return model_card(base, draft, made.token, made.accuracy, facts)


def _write(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, out: Path, card: str) -> None:
    """Write model, tokenizer (the files in `folder`, else `tokenizer`) and card; each file is replaced whole, the
    configuration last."""
    words = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as name:
        staging = Path(name)
        with writing(out):
            model.save_pretrained(staging)
        if not words:
            tokenizer.save_pretrained(staging)
        for path in words:
            shutil.copyfile(path, staging / path.name)
        (staging / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            with staged_file(out / path.name) as target:
                path.replace(target)
