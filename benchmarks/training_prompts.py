"""Which prompts are the shipped drafters trained on? Writes them as one JSON-lines file.

Reads GSM8K's training questions, self-instruct's instructions and, where given, ShareGPT's first turns, passages
and sentences to translate, and mixes them with a fixed seed. Never reads Spec-Bench, MT-Bench or GSM8K's
test split: those are for evaluation.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def conversations(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON array, also of one that ends in the middle of a record."""
    text, decoder = path.read_text(encoding="utf-8"), json.JSONDecoder()
    at = text.index("{")
    while at < len(text):
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        yield record
        at = text.find("{", at)
        if at < 0:
            return


COMMON = {  # words that tell the languages apart
    "German": {"und", "der", "die", "das", "ist", "nicht", "mit", "für", "ein", "zu"},
    "French": {"et", "le", "les", "est", "une", "pour", "dans", "que", "des", "vous"},
    "Spanish": {"el", "los", "es", "una", "para", "con", "que", "por", "las", "del"},
}


def translations(path: Path) -> list[str]:
    """Sentences of 40 to 300 characters in German, French or Spanish, to be translated."""
    asked = []
    for record in conversations(path):
        for turn in record.get("conversations", []):
            text = turn["value"]
            language = language_of(text)
            sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text)] if language else []
            asked += [f"Translate {language} to English: {s}" for s in sentences[:20] if 40 <= len(s) <= 300]
    return asked


def language_of(text: str) -> str | None:
    """The language whose common words make up over a sixth of `text`."""
    words = text[:2000].lower().split()
    for language, common in COMMON.items():
        if len(words) >= 8 and sum(word in common for word in words) > len(words) / 6:
            return language
    return None


def is_english(text: str) -> bool:
    return sum(c.isascii() for c in text) >= 0.98 * len(text)


def sharegpt(path: Path) -> tuple[list[str], list[str]]:
    """First questions of 20 to 1,200 characters, and passages of 600 to 2,000 out of replies."""
    questions, passages = [], []
    for record in conversations(path):
        turns = record.get("conversations", [])
        if len(turns) < 2 or turns[0]["from"] != "human" or not is_english(turns[0]["value"] + turns[1]["value"]):
            continue
        question, reply = turns[0]["value"].strip(), turns[1]["value"].strip()
        if 20 <= len(question) <= 1200 and len(reply) > 200:
            questions.append(question)
        if 600 <= len(reply) <= 2000 and "```" not in reply:
            passages.append(reply)
    return questions, passages


def self_instruct(folder: Path) -> list[str]:
    prompts = []
    for line in (folder / "seed_tasks.jsonl").read_text(encoding="utf-8").strip().split("\n"):
        task = json.loads(line)
        prompts.append(f"{task['instruction']}\n\n{task['instances'][0]['input']}".strip())
    for line in (folder / "user_oriented_instructions.jsonl").read_text(encoding="utf-8").strip().split("\n"):
        task = json.loads(line)
        prompts.append(f"{task['instruction']}\n\n{task['instances'][0]['input']}".strip())
    return [prompt for prompt in prompts if len(prompt) <= 2000]


def grounded(passages: list[str], questions: list[str]) -> list[str]:
    """Summaries of passages, and questions to be answered from a passage."""
    made = [f"Summarize the following text.\n\n{p}\n\nSummary:" for p in passages[0::2]]
    return made + [
        f"Answer the question using the documents below.\n\n{p}\n\nQuestion: {q}"
        for p, q in zip(passages[1::2], questions, strict=False)
        if len(q) < 200
    ]


def main(
    gsm8k: Annotated[Path, typer.Option(help="train.jsonl of openai/grade-school-math")],
    instruct: Annotated[Path, typer.Option(help="folder with self-instruct's two files")],
    out: Annotated[Path, typer.Option(help="JSON-lines file to write")],
    chats: Annotated[Path | None, typer.Option(help="ShareGPT_V3_unfiltered_cleaned_split.json")] = None,
    size: Annotated[int, typer.Option(help="prompts to write")] = 2000,
    seed: int = 0,
) -> None:
    """Mix 45 % chats, 20 % summaries and grounded questions, 15 % mathematics, 10 % translations, and self-instruct."""
    dice = random.Random(seed)
    math = [json.loads(line)["question"] for line in gsm8k.read_text(encoding="utf-8").strip().split("\n")]
    questions, passages = sharegpt(chats) if chats else ([], [])
    tasks = self_instruct(instruct)
    foreign = translations(chats) if chats else []
    shares = [
        (questions, 0.45),
        (grounded(passages, questions[::-1]), 0.20),
        (math, 0.15),
        (foreign, 0.10),
        (tasks, 0.10),
    ]
    prompts = [p for pool, share in shares for p in dice.sample(pool, min(len(pool), int(size * share)))]
    dice.shuffle(prompts)
    out.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts in {out}")


if __name__ == "__main__":
    typer.run(main)
