"""How long does the host work in a step? Milliseconds by stage at 64 rows, all that is not its forward.

Once on a random model of SmolLM2's 30 layers but a tiny width and vocabulary, where what remains is Python, numpy and
the dispatch of tensor operations; and once on SmolLM2 itself, where on a CPU the search through 49,152 logits and the
movement of keys and values are counted too.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ppd_compose import PromptTokens, compose
from ppd_compose.drafters import load_drafter
from ppd_compose.environment import environment
from ppd_compose.loading import load_base


def narrow() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=30, num_attention_heads=2,
        initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=None)
    return model


def milliseconds(base: Any, drafter: Any, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step by stage, the median of `rounds` generations."""
    model = compose(base, drafter, budget=rows)
    ids = torch.arange(2, 34)[None]
    told = []
    for _ in range(rounds + 1):
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        stats = model.stats
        told.append({name: 1000 * seconds / stats.forwards for name, seconds in stats.seconds.items()})
        told[-1]["host"] = 1000 * stats.host_seconds / stats.forwards
    by_stage = {name: median(one[name] for one in told[1:]) for name in told[0]}
    return {"rows_per_forward": stats.rows_per_forward, "milliseconds": by_stage}


def main(
    rows: int = 64,
    tokens: int = 96,
    rounds: Annotated[int, typer.Option(help="Generations of each; the median counts.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print milliseconds a step, and as the last line the result as JSON."""
    dice = torch.Generator().manual_seed(0)
    prompt = PromptTokens(torch.randn(3, 1, 32, generator=dice), [[0.3, 0.15, 0.1, 0.05]] * 3)
    demo = load_base("demo").model
    result = {
        "environment": environment(demo, f"python benchmarks/host.py --rows {rows} --tokens {tokens}"),
        "narrow": milliseconds(narrow(), prompt, rows, tokens, rounds),
        "smollm2": milliseconds(demo, load_drafter("ppd"), rows, tokens, rounds),
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
