"""Every place where a plugin can take part in a decoding step, in the order in which they are called.

A plugin is any object with methods marked `@hookimpl`; each method names the arguments that it wants.
What a plugin remembers about a sequence belongs into `step.memory[self]`: one plugin may serve several sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .step import Answer, Reached, Step
    from .tree import Appended, TokenTree

PROJECT = "ppd_compose"
hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)


@hookspec
def prepare(model: PreTrainedModel) -> None:
    """Called by `compose`: raise `ValueError` when you cannot take part with `model`, saying why."""


@hookspec
def forward_kwargs(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return keyword arguments that `model`'s forward needs beside transformers' own, as a base with code of its own
    may.

    Called once a generation. Two plugins that want different values for one keyword are an error, and so is
    `output_hidden_states`: hidden states are asked for by `hidden_layers`.
    """


@hookspec
def hidden_layers(model: PreTrainedModel) -> Sequence[int] | None:
    """Return which hidden states you need, numbered as by `output_hidden_states`: 0 is the embedding, i the output of
    layer i, and that of the last layer is normalised. They come as `step.hidden_states`.

    Called once a generation.
    """


@hookspec
def prefix() -> Tensor | None:
    """Return keys and values `[layers, 2, key heads, columns, head_dim]` that the rows which you append see before the
    sequence, and nobody else, in the layers of the model that keep the whole context; or None. Of drafters only.

    Called once a generation.
    """


@hookspec
def start(step: Step, model: PreTrainedModel) -> None:
    """A sequence begins: its prompt is in the KV cache, and `step.memory[self]` is not there yet.

    `step.hidden_states` are those of all prompt tokens that were not in the cache already. The first token is then
    accepted after the prompt's last one, as a step whose tree is that root alone. What is to be given back when the
    sequence ends, however it does, goes on `step.ending`.
    """


@hookspec(firstresult=True)
def ask(step: Step, drafter: str) -> bool | None:
    """Return whether the drafter of that name is asked to propose and extend at this step.

    Not called for one whose appended rows were verified below the last accepted node: they are paid for, and it
    takes part.
    """


@hookspec(firstresult=True)
def refine(step: Step, drafter: Any, answer: Answer, reached: Reached) -> Answer | None:
    """Return what the rows that `drafter` appended say, told better than by `answer.logits`, or None.

    Called for each drafter with such rows below the last accepted node, before anyone drafts: it finds the answer that
    you return. `answer.hidden_states` are those that anyone asks for by `hidden_layers`. The last accepted token and
    the one after it are told by `reached`: for a drafter that foretells on a device you are called before `step` knows
    them, with rows that may mean nothing, see `foretell`, and not again where it foretold.
    """


@hookspec
def propose(step: Step) -> TokenTree | None:
    """Draft: return a candidate tree rooted at `step.ids[-1]`, or None for no guess at this step. Its arrays are to
    stay as they are until the next one."""


@hookspec(firstresult=True)
def merge(step: Step, trees: Sequence[TokenTree]) -> TokenTree | None:
    """Return the one tree that stands for `trees`, of which the first is the bare root. Its arrays are new ones: they
    are kept for later steps, and become read-only.

    A node's `sources` are those of all trees that hold it, or'ed: by them it is known what each drafter adds. Its
    `log_probs` are those of whole paths: no node claims more than its parent.
    """


@hookspec
def extend(step: Step, tree: TokenTree) -> TokenTree | None:
    """Return a tree with the same root whose paths continue those of the merged `tree`, or None.

    The `sources` of `tree` are 0. A node that you return counts as your guess where its path is not in `tree`; where it
    is, it does so if you give it any other `sources`, and your `log_probs` are then what you claim for it.
    """


@hookspec
def append(step: Step, tree: TokenTree) -> Appended | None:
    """Return rows that ride along in the verify forward and are never accepted, or None. Their embeddings are finite
    and as wide as the model's.

    Their `parents` and `nodes` are of `tree`; `gains` `[rows]` are the tokens that each is expected to add to the next
    step, at least 0. The logits of those below the last accepted node come back as `step.answers[self]` in the next
    step, for `ask` and the hooks from `propose` to `fit`.
    """


@hookspec(firstresult=True)
def fit(step: Step, tree: TokenTree, appended: Sequence[Appended]) -> tuple[TokenTree, Sequence[Appended]] | None:
    """Return the tree and the appended rows, cut to what the budget pays for: as many blocks as `appended` has, in that
    order, of which some may be of no rows. None is kept without the one that it hangs from. `parents` and `nodes` of
    rows are of the tree that is returned, see `tree.cut`."""


@hookspec
def foretell(
    step: Step, tree: TokenTree, logits: Tensor, reached: Reached, answers: Mapping[Any, Answer]
) -> Sequence[Tensor] | None:
    """Return tensors of the device that you will want on the host, or None. Of drafters only.

    Called while the device computes a greedy step: so its next work is launched before the host knows what is accepted,
    and comes to it with the picks in one copy, as `step.foretold[self]` for `observe` and the next step. Look at no
    number of a tensor here, nor in `refine`: the host would wait. Not called of a prompt, on a CPU or where picks are
    made otherwise, and what it told is not there where generation stopped within a path: ask the device then yourself.

    `logits` `[nodes, vocab]` are the model's after every node of `tree`. `answers` are those of the next step, of the
    kinds, and as many rows, that hang from the node from which most of a drafter's rows hang: those beyond what hangs
    from the last accepted one mean nothing, and one that hangs other kinds from other nodes cannot read them.
    """


@hookspec(firstresult=True)
def accept(step: Step, tree: TokenTree, logits: Tensor, pick: Callable[[int], int]) -> Iterable[tuple[int, int]] | None:
    """Return the accepted path, root first: pairs of a node and the token that follows it.

    `logits` `[nodes, vocab]` are the model's, unprocessed. `pick(node)` is the model's own choice after `node`:
    every logits processor applied to the sequence up to that node, then argmax or one draw. It may be asked once a
    node, of nodes of the path alone where processors keep state, as those of grammars do. The pairs are consumed one by
    one and dropped when generation stops, so yielding them is best.
    """


@hookspec
def observe(step: Step, logits: Tensor) -> None:
    """The step is committed: `step.tree`, `step.path` and `step.ids` tell what became of the guesses.

    `logits` `[nodes, vocab]` are the model's after every node of `step.tree`, unprocessed, valid until you return.
    Work that nobody waits for, and that does not need them, can be appended to `step.later`: it is done once the next
    forward was launched, or when the sequence ends, unless something raised; what it puts off in turn waits for one
    forward more. Its time is on no drafter's account.
    """
