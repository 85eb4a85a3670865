"""Folders of heads and of compositions that nobody vouches for: mutated at random, and killed while they were saved."""

import json
import random
from dataclasses import replace

import pytest
from killed import killed
from mutations import mutated_bytes, mutated_config, mutated_header
from ppd_compose.integrations.eagle import EagleHead
from ppd_compose.integrations.medusa import MedusaHeads
from test_eagle import eagle, random_head
from test_medusa import FEW, random_heads
from test_ngram import ngram_table
from tiny import VOCAB, prompt, prompt_tokens, tiny

from ppd_compose import PromptTokens, compose, compose_from_pretrained, load_drafter
from ppd_compose.identity import Identity

HEADS = {
    "medusa": lambda: MedusaHeads(random_heads(2, token_map=FEW), accuracy=[[0.5]] * 2, identity=Identity.of(tiny())),
    "medusa-own": lambda: MedusaHeads(random_heads(2, outputs=1, token_map=FEW, vocab=VOCAB)),
    "eagle": lambda: EagleHead(replace(random_head(), identity=Identity.of(tiny()), accuracy=(0.5, 0.25))),
    "eagle-1": lambda: eagle(1),
    "ngram": lambda: ngram_table(identity=Identity.of(tiny()), accuracy=[0.5, 0.25]),
}
LAYOUTS = {"medusa-own": {"layout": "vllm"}}


def everything_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:.*(same shapes but other weights|fewer guesses may be right)")
@pytest.mark.parametrize("kind", HEADS)
def test_mutated_heads_load_or_are_refused_in_words(tmp_path, monkeypatch, kind):
    """No crash, no code executed, nothing written."""
    monkeypatch.chdir(tmp_path)
    base, folder, dice, refused = tiny(), tmp_path / "heads", random.Random(1), []
    HEADS[kind]().save_pretrained(folder, **LAYOUTS.get(kind, {}))
    whole = everything_in(folder)
    tensors = next(name for name in whole if name.endswith(".safetensors"))
    for number in range(400):
        changed = dict(whole)
        match number % 4:
            case 0 | 1:
                changed["config.json"] = mutated_config(json.loads(whole["config.json"]), dice)
            case 2:
                changed[tensors] = mutated_header(whole[tensors], dice, "config.json")
            case 3:
                name = dice.choice(["config.json", tensors])
                changed[name] = mutated_bytes(whole[name], dice)
        for name, content in changed.items():
            (folder / name).write_bytes(content)
        try:
            compose(base, load_drafter(folder), budget=8)
        except (ValueError, OSError) as error:
            refused.append(str(error))
        assert set(everything_in(folder)) == set(whole)
    assert len(refused) > 150
    assert all(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def test_mutated_compositions_load_or_are_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, folder, dice, refused = tiny(), tmp_path / "saved", random.Random(2), []
    made = prompt_tokens(3, 2)
    tokens = PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(base))
    heads = MedusaHeads(random_heads(), choices=[[0], [1], [0, 0]])
    compose(base, tokens, heads, "lookup", "recycling", budget=8).save_composition(folder)
    told = json.loads((folder / "composition.json").read_text())
    for number in range(600):
        if number % 5 == 0:
            mutated = mutated_bytes(json.dumps(told).encode(), dice)
        elif number % 5 == 1:
            place = dice.randrange(len(told["drafters"]))
            part = json.loads(mutated_config(told["drafters"][place], dice))
            parts = [*told["drafters"][:place], part, *told["drafters"][place + 1 :]]
            mutated = json.dumps({**told, "drafters": parts}).encode()
        else:
            mutated = mutated_config(told, dice)
        (folder / "composition.json").write_bytes(mutated)
        try:
            model = compose_from_pretrained(folder, base)
            model.generate(prompt(), max_new_tokens=4, do_sample=False)
        except (ValueError, OSError) as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


SAVES = """
from pathlib import Path
from dataclasses import replace
from ppd_compose.integrations.eagle import EagleHead
from ppd_compose.integrations.medusa import MedusaHeads
from test_eagle import random_head
from test_medusa import random_heads
folder = Path(sys.argv[1])
saves = []
for n in (1, 2):
    heads = MedusaHeads(random_heads(n), accuracy=[[0.1 * n]] * n, training={"steps": n})
    saves.append((heads, folder / "medusa"))
    head = replace(random_head(seed=n), accuracy=(0.1 * n,), training={"steps": n})
    saves.append((EagleHead(head), folder / "eagle"))
def save():
    for drafter, place in saves:
        drafter.save_pretrained(place)
"""


def test_saves_of_heads_that_are_killed_leave_what_was_or_what_comes(tmp_path):
    """A hundred times, at random moments: never a mixture, never a folder that does not load."""
    seen = []
    for _ in killed(SAVES, tmp_path, longest=0.09):
        medusa, eagle = load_drafter(tmp_path / "medusa"), load_drafter(tmp_path / "eagle")
        n, steps = medusa.training["steps"], eagle.head.training["steps"]
        assert len(medusa.heads) == n
        assert medusa.accuracy.tolist() == [[0.1 * n]] * n
        assert eagle.head.accuracy == (0.1 * steps,)
        seen.append((n, steps))
    assert all(min(values.count(1), values.count(2)) > 5 for values in zip(*seen, strict=True))
