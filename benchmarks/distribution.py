"""Does sampling keep the model's distribution? Total variation to the exact one over a three-token horizon.

A small random model whose every path can be enumerated, a bushy candidate tree, and temperature, top-p and
repetition penalty at once. The distance of an exact sampler is not zero but the noise of so many draws.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ppd_compose import PromptTokens, Step, TokenTree, compose, hookimpl
from ppd_compose.environment import environment

HORIZON, VOCAB = 3, 8
SETTINGS: dict[str, Any] = {
    "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.3,
}  # fmt: skip


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().double()
    model.generation_config = GenerationConfig()
    return model


def exact(base: LlamaForCausalLM, ids: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Probability of every path, from the processed scores of `generate` itself."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(HORIZON):
        longer = {}
        for path, chance in chances.items():
            whole = torch.cat([ids, torch.tensor([path], dtype=torch.long)], dim=1)
            out = base.generate(
                whole, attention_mask=torch.ones_like(whole), max_new_tokens=1, output_scores=True,
                return_dict_in_generate=True, **SETTINGS,
            )  # fmt: skip
            for token, share in enumerate(out.scores[0][0].softmax(-1).tolist()):
                longer[(*path, token)] = chance * share
        chances = longer
    return chances


class Bushy:
    """Drafter with every token at depth 1 and a few below: paths share prefixes, and siblings are rejected."""

    name = "bushy"

    @hookimpl
    def propose(self, step: Step) -> TokenTree:
        below = list(itertools.product(range(1, 5), (1, 2, 5)))
        tokens = [step.ids[-1], *range(VOCAB), *(token for _, token in below)]
        parents = [-1, *([0] * VOCAB), *(parent for parent, _ in below)]
        return TokenTree.of(tokens, parents, [0.0, *([-2.0] * VOCAB), *([-3.0] * len(below))])


def total_variation(draws: int, seed: int = 0) -> dict[str, float]:
    """Distance of `draws` samples to the exact distribution, and what an exact sampler's would be on average."""
    base, ids = small_model(), torch.tensor([[1, 3, 2]])
    chances = exact(base, ids)
    dice = torch.Generator().manual_seed(seed)
    prompt = PromptTokens(torch.randn(2, 1, 16, generator=dice), [[0.4, 0.2]] * 2)
    model = compose(base, prompt, Bushy(), budget=24)
    counts = dict.fromkeys(chances, 0)
    forwards = 0
    for _ in track(range(draws), disable=draws < 10_000):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=HORIZON, generator=dice, **SETTINGS
        )
        counts[tuple(out[0, ids.shape[1] :].tolist())] += 1
        forwards += model.stats.forwards
    distance = sum(abs(counts[path] / draws - chance) for path, chance in chances.items()) / 2
    noise = sum((2 / torch.pi * chance * (1 - chance) / draws) ** 0.5 for chance in chances.values()) / 2
    return {
        "draws": draws, "total_variation": distance, "expected_of_exact_sampler": noise,
        "tokens_per_forward": HORIZON * draws / forwards,
    }  # fmt: skip


def main(
    draws: Annotated[int, typer.Option(help="Samples of three tokens.")] = 20_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print the total variation, and as the last line the result as JSON."""
    told = total_variation(draws)
    command = f"python benchmarks/distribution.py --draws {draws}"
    result = {"environment": environment(small_model(), command), "settings": SETTINGS, **told}
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
