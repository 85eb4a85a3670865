"""Heads that read prompt tokens: what they say, when they are asked, their files, and their training."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from ppd_compose.integrations.medusa import MedusaHeads, files
from ppd_compose.integrations.medusa import train_prompt_heads as training
from ppd_compose.integrations.medusa.command_prompt_heads import command
from ppd_compose.integrations.medusa.prompt_heads import FACTS, TENSORS, PromptHeads
from ppd_compose.integrations.medusa.train_prompt_heads import (
    PromptBatches,
    PromptBlocks,
    PromptHeadsRecipe,
    train_prompt_heads,
)
from safetensors.torch import save_file
from test_compose import tokenizer
from test_medusa import FEW, random_heads, same
from test_train import replies
from tiny import prompt, prompt_tokens, tiny
from torch.nn.functional import rms_norm, silu
from typer.testing import CliRunner

from ppd_compose import PromptTokens, compose, hookimpl, load_drafter
from ppd_compose.finish import OutputHead
from ppd_compose.identity import Identity
from ppd_compose.packed import can_pack
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply

RECIPE = PromptHeadsRecipe(steps=6, batch_size=2, points=5, checkpoint_every=2, warmup=1, heads=3, width=8)


def prompt_heads(tokens, hidden=32, width=8, seed=0, distances=None):
    dice = torch.Generator().manual_seed(seed)
    n = distances or len(tokens.embeddings)
    return PromptHeads(
        torch.randn(n, 3 * hidden, width, generator=dice), torch.randn(n, width, hidden, generator=dice), tokens.digest
    )


def greedy(model, tokens=24):
    ids = prompt()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)


class Listens:
    """Notes what each step's prompt tokens were told to say."""

    def __init__(self, drafter):
        self.drafter, self.told = drafter, []

    @hookimpl
    def merge(self, step):
        answer = step.answers.get(self.drafter)
        if answer is not None and len(answer.kinds):
            self.told.append((list(step.ids), answer))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "granite"])
@pytest.mark.parametrize("v", [1, 2])
@pytest.mark.parametrize("token_map", [None, FEW])
def test_tokens_are_those_of_the_base_and_the_heads_are_heard(family, v, token_map):
    base, tokens = tiny(family), prompt_tokens(3, v)
    medusa = MedusaHeads(random_heads(token_map=token_map), prompt_heads=prompt_heads(tokens))
    listens = Listens(tokens)
    model = compose(base, medusa, tokens, budget=24, plugins=[listens])
    assert torch.equal(greedy(model), greedy(base))
    assert listens.told
    for _, answer in listens.told:
        assert answer.tokens is token_map or torch.equal(answer.tokens, token_map)
        assert answer.logits.shape[1] == (61 if token_map is None else len(token_map))
        assert answer.kinds.tolist() == [v * i for i in range(len(answer.logits))]


@pytest.mark.parametrize("v", [1, 2])
def test_the_heads_say_what_the_formula_says(v):
    base, tokens = tiny(), prompt_tokens(2, v)
    heads = prompt_heads(tokens)
    listens = Listens(tokens)
    greedy(compose(base, MedusaHeads(random_heads(), prompt_heads=heads), tokens, budget=24, plugins=[listens]))
    embed, layers = base.get_input_embeddings(), base.config.num_hidden_layers
    for ids, answer in listens.told[:4]:
        context = embed(torch.tensor([ids[:-1]]))
        last = base.model(inputs_embeds=context).last_hidden_state[0, -1]
        for i, said in enumerate(answer.logits):
            chains = [torch.cat([context[0], tokens.embeddings[: i + 1, j].double()]) for j in range(v)]
            state = torch.stack([base.model(inputs_embeds=chain[None]).last_hidden_state[0, -1] for chain in chains])
            seen = [rms_norm(each, each.shape) for each in (state.mean(0), last, embed.weight[ids[-1]])]
            state = state.mean(0) + silu(torch.cat(seen) @ heads.down[i].double()) @ heads.up[i].double()
            torch.testing.assert_close(said, base.lm_head(state).float(), rtol=1e-4, atol=1e-4)
    assert layers


def test_other_prompt_tokens_speak_for_themselves():
    base, tokens = tiny(), prompt_tokens()
    medusa = MedusaHeads(random_heads(), prompt_heads=prompt_heads(prompt_tokens(seed=1)))
    listens = Listens(tokens)
    assert torch.equal(greedy(compose(base, medusa, tokens, budget=24, plugins=[listens])), greedy(base))
    assert listens.told
    assert all(answer.hidden_states for _, answer in listens.told)  # as they came from the forward


@pytest.mark.parametrize("outputs", [1, 4])
def test_beside_heads_with_output_heads_of_their_own_the_bases_is_used(outputs):
    base, tokens = tiny("granite"), prompt_tokens()
    told = []
    for heads in (random_heads(outputs=outputs), random_heads()):
        listens = Listens(tokens)
        medusa = MedusaHeads(heads, prompt_heads=prompt_heads(tokens))
        greedy(compose(base, medusa, tokens, budget=24, plugins=[listens]))
        told.append({tuple(ids): answer.logits for ids, answer in listens.told})
    both = told[0].keys() & told[1].keys()
    assert both
    for ids in both:
        mine, theirs = (logits[: min(len(told[0][ids]), len(told[1][ids]))] for logits in (told[0][ids], told[1][ids]))
        torch.testing.assert_close(mine, theirs)


def test_heads_of_fewer_distances_speak_for_the_first():
    base, tokens = tiny(), prompt_tokens()
    listens = Listens(tokens)
    medusa = MedusaHeads(random_heads(), prompt_heads=prompt_heads(tokens, distances=2))
    assert torch.equal(greedy(compose(base, medusa, tokens, budget=24, plugins=[listens])), greedy(base))
    assert {len(answer.kinds) for _, answer in listens.told} <= {1, 2}


def test_prompt_tokens_are_told_apart_by_their_numbers():
    tokens = prompt_tokens()
    assert tokens.digest == PromptTokens(tokens.embeddings.clone()).digest == PromptTokens(tokens.embeddings).digest
    assert (
        PromptTokens(tokens.embeddings.bfloat16()).digest == PromptTokens(tokens.embeddings.bfloat16().float()).digest
    )
    others = [prompt_tokens(seed=1), PromptTokens(tokens.embeddings, prefix=torch.ones(3, 2, 2, 1, 8))]
    assert all(other.digest != tokens.digest for other in others)


@pytest.mark.skipif(not can_pack(tiny(dtype=torch.float32)), reason="torch has no oneDNN here")
def test_a_packed_composition_decodes_the_same():
    base, tokens = tiny(dtype=torch.float32), prompt_tokens()
    medusa = MedusaHeads(random_heads(token_map=FEW), prompt_heads=prompt_heads(tokens))
    assert torch.equal(greedy(compose(base, medusa, tokens, budget=12, packed=True)), greedy(base))


# Files


def test_what_is_saved_is_read_bit_for_bit_and_goes_with_the_heads(tmp_path):
    tokens = prompt_tokens()
    facts = {"accuracy": [[0.5, 0.25]] * 3, "training": {"steps": 3}}
    mine = replace(prompt_heads(tokens), facts=facts)
    MedusaHeads(random_heads(), prompt_heads=mine).save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    same(again, random_heads())
    assert torch.equal(again.prompt_heads.down, mine.down)
    assert torch.equal(again.prompt_heads.up, mine.up)
    assert (again.prompt_heads.prompt_tokens, again.prompt_heads.facts) == (tokens.digest, facts)
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(load_drafter(tmp_path / "copy").prompt_heads.up, mine.up)
    MedusaHeads(random_heads(seed=1)).save_pretrained(tmp_path)  # whose they are not
    assert load_drafter(tmp_path).prompt_heads is None
    assert not (tmp_path / TENSORS).exists()


def spoilt(**changed):
    tensors = {"down": torch.zeros(3, 96, 8), "up": torch.zeros(3, 8, 32)}
    return {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        (spoilt(up=None), {"prompt_tokens": "x"}, "'up'"),
        (spoilt(), {}, "'prompt_tokens'"),
        (spoilt(down=torch.zeros(3, 95, 8)), {"prompt_tokens": "x"}, r"must be \[distances, 3 \* hidden, width\]"),
        (spoilt(up=torch.full((3, 8, 32), torch.nan)), {"prompt_tokens": "x"}, "NaN or infinite"),
        (spoilt(down=torch.zeros(3, 48, 8), up=torch.zeros(3, 8, 16)), {"prompt_tokens": "x"}, "16 numbers beside"),
        (None, {"prompt_tokens": "x"}, "holds no prompt heads"),
    ],
)
def test_a_defect_names_the_file_or_the_fault(tmp_path, tensors, facts, message):
    MedusaHeads(random_heads()).save_pretrained(tmp_path)
    (tmp_path / FACTS).write_text(json.dumps(facts))
    (tmp_path / TENSORS).write_bytes(b"no tensors") if tensors is None else save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=message):
        MedusaHeads.from_pretrained(tmp_path)


# Training


def trained(base, folder, recipe=RECIPE, tokens=None):
    mine, tokens = replies(base), tokens or prompt_tokens()
    return train_prompt_heads(base, mine[:-1], mine[-1:], tokens, None, recipe, folder)


@pytest.mark.parametrize("v", [1, 2])
def test_heads_begin_as_what_the_prompt_tokens_say(v):
    base, tokens = tiny(dtype=torch.float32), prompt_tokens(3, v)
    batch = PromptBatches(base, RECIPE, None, tokens)(replies(base, 3), 0)
    logits = PromptBlocks(RECIPE, 32).logits(batch, OutputHead.of(base))
    torch.testing.assert_close(logits, base.lm_head(batch.prompts))
    reply = replies(base, 3)[0]
    ids = torch.tensor([reply.ids])
    point = int(batch.points[0])
    context = base.get_input_embeddings()(ids[:, : point + 1])
    chains = [torch.cat([context[0], tokens.embeddings[:2, j]])[None] for j in range(v)]
    states = [base.model(inputs_embeds=chain).last_hidden_state[0, -1] for chain in chains]
    torch.testing.assert_close(batch.prompts[1, 0], torch.stack(states).mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.roots[0], base.get_input_embeddings()(ids[0, point + 1]))


def test_every_epoch_draws_other_points_of_what_the_base_said_once():
    base, tokens = tiny(dtype=torch.float32), prompt_tokens()
    forwards = [0]
    base.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    mine = replies(base, 3)
    forwards[0] = 0
    batches = PromptBatches(base, RECIPE, None, tokens)
    first, asked = batches(mine, 0), forwards[0]
    again = batches(mine, 1)
    assert (asked, forwards[0]) == (2 * len(mine), 2 * len(mine))  # of each reply one, of its prompt tokens another
    torch.testing.assert_close(again.states, first.states)
    assert not torch.equal(again.points, first.points)
    for point, states in zip(again.points.tolist(), again.prompts.transpose(0, 1), strict=True):
        if point in (drawn := first.points.tolist()):
            torch.testing.assert_close(states, first.prompts[:, drawn.index(point)])


def test_training_lowers_the_loss_and_leaves_the_base(tmp_path):
    base = tiny(dtype=torch.float32).train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    recipe = replace(RECIPE, steps=40, points=10, learning_rate=1e-2)
    heads, told = trained(base, tmp_path, recipe)
    assert base.training
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert (len(told.accuracy), heads.prompt_tokens) == (3, prompt_tokens().digest)
    batch = PromptBatches(base.eval(), recipe, None, prompt_tokens())(replies(base)[:-1], 0)
    output, blocks = OutputHead.of(base), PromptBlocks(recipe, 32)
    start = blocks(batch, output, 0.8, 0.5).loss.item()
    blocks.load_state_dict({"down": heads.down, "up": heads.up})
    assert blocks(batch, output, 0.8, 0.5).loss.item() < 0.8 * start


@pytest.mark.parametrize("killed_at", [1, 4])
def test_killed_at_any_step_it_resumes_to_the_same_heads(tmp_path, monkeypatch, killed_at):
    base = tiny(dtype=torch.float32)
    whole, _ = trained(base, tmp_path / "whole")
    draw, count = training.replies_of_batch, [0]

    def fails(*args):
        count[0] += 1
        if count[0] == killed_at:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(training, "replies_of_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        trained(base, tmp_path / "cut")
    count[0] = 99
    again, _ = trained(base, tmp_path / "cut")
    assert torch.equal(again.down, whole.down)
    assert torch.equal(again.up, whole.up)


def test_checkpoints_beside_other_prompt_tokens_are_refused(tmp_path):
    base = tiny(dtype=torch.float32)
    trained(base, tmp_path)
    with pytest.raises(ValueError, match="written by another recipe"):
        trained(base, tmp_path, tokens=prompt_tokens(seed=1))


def test_heads_that_know_the_answer_make_prompt_tokens_right(tmp_path):
    """Prompt tokens of random numbers guess nothing; heads that were overfitted to the answer guess for them."""
    base, tokens = tiny(dtype=torch.float32), prompt_tokens()
    expected = greedy(base, 40)
    reply = Reply(prompt()[0].tolist(), expected[0, 12:].tolist())
    recipe = replace(RECIPE, steps=150, points=40, batch_size=1, kl=0.0, width=64, learning_rate=1e-2)
    heads, told = train_prompt_heads(base, [reply], [reply], tokens, None, recipe, tmp_path)
    assert min(row[0] for row in told.accuracy) > 0.9
    model = compose(base, MedusaHeads(random_heads(), prompt_heads=heads), tokens, budget=24)
    assert torch.equal(greedy(model, 40), expected)
    assert model.stats.accepted["ppd"].total() >= 20
    assert model.stats.forwards <= 20


def test_the_command_trains_what_loads_and_writes_a_card(tmp_path):
    base = tiny(dtype=torch.float32, eos=60)
    base.generation_config.max_length = None
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{c}abcdef"}) for c in "hijkl"))
    identity = Identity.of(base)
    PromptTokens(prompt_tokens().embeddings, identity=identity).save_pretrained(tmp_path / "ppd")
    accuracy = [[0.5] * 10] * 4
    MedusaHeads(random_heads(token_map=FEW), accuracy=accuracy, identity=identity).save_pretrained(tmp_path / "medusa")
    app = typer.Typer()
    app.command()(command)
    out = tmp_path / "out[/1]"
    words = [
        "--base", tmp_path / "base", "--dtype", "float32", "--prompts", tmp_path / "prompts.jsonl",
        "--medusa", tmp_path / "medusa", "--ppd", tmp_path / "ppd", "--out", out, "--steps", 3,
        "--reply-tokens", 12, "--points", 4, "--held-out", 1, "--batch-size", 2, "--width", 8,
    ]  # fmt: skip
    told = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert told.exit_code == 0
    assert f"heads in {out}; top-1 by distance" in told.stderr
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        files.HEADS,
        TENSORS,
        FACTS,
    }
    made, tokens = load_drafter(out), load_drafter(tmp_path / "ppd")
    assert made.prompt_heads.up.dtype == torch.bfloat16
    assert made.prompt_heads.prompt_tokens == tokens.digest
    card = (out / "README.md").read_text()
    assert "| distance | top 1 | top 2 | top 3 | top 5 | top 10 |" in card
    assert str(tmp_path) not in card + (out / FACTS).read_text()
    assert torch.equal(greedy(compose(base, made, tokens, budget=16)), greedy(base))


@pytest.mark.parametrize(
    ("given", "own", "name"),
    [("me/given", "me/own", "me/given"), (None, "me/own", "me/own"), (None, "", "lmsys/vicuna")],
)
def test_published_heads_are_saved_with_those_trained_beside_them(tmp_path, given, own, name):
    """They have neither an identity nor accuracies."""
    base, tokens = tiny(dtype=torch.float32, eos=60), prompt_tokens()
    base.config.name_or_path = own
    MedusaHeads(random_heads(), base_name="lmsys/vicuna").save_pretrained(tmp_path / "published")
    medusa, asked = load_drafter(tmp_path / "published"), [Prompt((f"{c}abcdefg",)) for c in "hijkl"]
    training.train_medusa_prompt_heads(
        base, tokenizer(), asked, tmp_path / "out", medusa, tokens, RECIPE, base_name=given, held_out=1,
        reply_tokens=12,
    )  # fmt: skip
    made, card = load_drafter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert made.identity == replace(Identity.of(base), name=name)
    assert (made.accuracy, made.prompt_heads.prompt_tokens) == (None, tokens.digest)
    assert f"# Medusa heads for {name}\n" in card
    assert "a better one.\n\nNot measured.\n" in card
    assert "## Training\n\nNot told.\n" in card
    assert "| distance | top 1 |" in card


def test_the_command_names_what_is_neither_heads_nor_prompt_tokens(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}')
    app = typer.Typer()
    app.command()(command)
    words = ["--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out", "--medusa", "ppd"]
    with pytest.raises(ValueError, match="--medusa ppd is PromptTokens and --ppd ppd PromptTokens"):
        CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
