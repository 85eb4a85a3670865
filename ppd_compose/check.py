"""Is what a drafter returned a candidate tree, or appended rows? If not, who and why.

Knows the rules of the arrays. Does not repair anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from .step import Answer, Step
from .tree import Appended, TokenTree

HUGE = 1e4  # far beyond what training makes, and within what half precision can tell
ALMOST = 1e-6  # that a claim may be above what it may be
TREE = {"tokens": "i", "parents": "i", "log_probs": "f", "sources": "i"}  # arrays, by numpy's letters for kinds
APPENDED = {"kinds": "i", "parents": "i", "nodes": "i", "gains": "f"}


class MalformedDraft(ValueError):
    """A plugin returned something that cannot be verified."""

    def __init__(self, who: str, fault: str) -> None:
        super().__init__(f"{who} returned a malformed draft: {fault}")


def check_tree(tree: object, who: str, root: int, vocab_size: int) -> TokenTree:
    """Return `tree`, or raise `MalformedDraft` naming `who` returned it and the first fault."""
    if not isinstance(tree, TokenTree):
        raise MalformedDraft(who, f"expected a TokenTree or None, got {type(tree).__name__}")
    for fault in chain(_array_faults(tree, TREE), _size_faults(tree), _tree_faults(tree, root, vocab_size)):
        raise MalformedDraft(who, fault)
    return tree


def _array_faults(draft: object, kinds: Mapping[str, str]) -> Iterator[str]:
    for name, kind in kinds.items():
        array = getattr(draft, name)
        if not isinstance(array, np.ndarray) or array.ndim != 1 or (array.dtype.kind != kind and array.size):
            yield f"{name} must be a flat array of {'integers' if kind == 'i' else 'floats'}, got {array!r:.60}"


def _size_faults(tree: TokenTree) -> Iterator[str]:
    sizes = {name: len(getattr(tree, name)) for name in TREE}
    if len(set(sizes.values())) > 1 or not sizes["tokens"]:
        yield f"arrays of different or no length: {sizes}"


def _tree_faults(tree: TokenTree, root: int, vocab_size: int) -> Iterator[str]:
    # One by one: of so few nodes that is sooner than by searches of numpy.
    tokens, parents, claims = tree.tokens.tolist(), tree.parents.tolist(), tree.log_probs.tolist()
    if tokens[0] != root or parents[0] != -1:
        yield f"row 0 must be the root, token {root} with parent -1; got {tokens[0]}, {parents[0]}"
    for node, (token, parent, claim) in enumerate(zip(tokens, parents, claims, strict=True)):
        if node and not 0 <= parent < node:
            yield f"node {node} has parent {parent}: a parent must come before its children"
        if not 0 <= token < vocab_size:
            yield f"node {node} holds token {token}, outside the vocabulary of {vocab_size}"
        if not claim <= ALMOST:
            yield f"node {node} claims log-probability {claim}: it must be a number of at most 0"
        if node and claim > claims[parent] + ALMOST:
            yield f"node {node} claims more than its parent: log_probs are those of the whole path"
    if len(set(zip(parents, tokens, strict=True))) < len(tree):
        yield "two children of one node hold the same token"


def check_appended(appended: object, drafter: str, tree: TokenTree) -> Appended:
    """Return `appended`, or raise `MalformedDraft` naming `drafter` and the fault."""
    who = f"drafter {drafter!r}"
    if not isinstance(appended, Appended):
        raise MalformedDraft(who, f"append must return Appended or None, got {type(appended).__name__}")
    for fault in _array_faults(appended, APPENDED):
        raise MalformedDraft(who, fault)
    if not isinstance(appended.embeddings, Tensor) or appended.embeddings.ndim != 2:
        raise MalformedDraft(who, f"embeddings must be a Tensor [kinds, hidden], got {appended.embeddings!r:.60}")
    size = len(tree)
    sizes = {len(appended.kinds), len(appended.parents), len(appended.nodes), len(appended.gains)}
    if len(sizes) > 1:
        raise MalformedDraft(who, f"appended arrays of different lengths: {sorted(sizes)}")
    if not len(appended):
        return appended
    places = np.arange(size + len(appended))
    if appended.parents.min() < 0 or (appended.parents >= places[size:]).any():
        raise MalformedDraft(who, "an appended row must hang from a tree node or an earlier appended row")
    places[size:] = appended.nodes  # so that they tell below which node a row stands
    if (places[appended.parents] != appended.nodes).any():
        raise MalformedDraft(who, "an appended row must name the tree node that its chain hangs from")
    if appended.kinds.min() < 0 or appended.kinds.max() >= len(appended.embeddings):
        raise MalformedDraft(who, f"kinds must index the {len(appended.embeddings)} embeddings")
    if not appended.gains.min() >= 0:
        raise MalformedDraft(who, "gains must be numbers of at least 0")
    return appended


def is_huge(states: Tensor) -> bool:
    """Whether `states` hold NaN or values beyond `HUGE`, with which a forward may make NaN."""
    return not bool((states.detach().float().abs() <= HUGE).all())


def check_embeddings(embeddings: Tensor, drafter: str, width: int) -> None:
    """Raise `MalformedDraft` naming `drafter` when its `embeddings` `[kinds, hidden]` are of another width, or hold NaN
    or huge values: NaN spreads even to rows that the mask hides it from."""
    who = f"drafter {drafter!r}"
    if embeddings.shape[1] != width:
        raise MalformedDraft(who, f"embeddings must be {width} wide, as the model's are, got {embeddings.shape[1]}")
    if is_huge(embeddings):
        raise MalformedDraft(who, f"embeddings hold NaN or values beyond {HUGE:g}")


def check_fitted(fitted: object, step: Step, drafters: Sequence[str]) -> tuple[TokenTree, Sequence[Appended]]:
    """Return what `fit` made of a tree and the rows that `drafters` appended, or raise `MalformedDraft` saying what is
    wrong with it."""
    if not isinstance(fitted, tuple) or len(fitted) != 2:
        raise MalformedDraft("fit", f"expected a tree and the appended rows, got {type(fitted).__name__}")
    tree, blocks = check_tree(fitted[0], "fit", step.ids[-1], step.vocab_size), fitted[1]
    if not isinstance(blocks, list | tuple) or len(blocks) != len(drafters):
        raise MalformedDraft("fit", f"the rows of {len(drafters)} drafters must come back, in the order given")
    return tree, [check_appended(rows, name, tree) for name, rows in zip(drafters, blocks, strict=True)]


def check_path(pairs: Iterable[tuple[int, int]], tree: TokenTree, vocab_size: int) -> Iterator[tuple[int, int]]:
    """What `accept` returned, pair by pair, or raise `MalformedDraft` where it is no path of `tree`."""
    node: int | None = 0
    for told, token in pairs:
        if told != node:
            raise MalformedDraft("accept", f"node {told} does not follow: the root, then children that hold the token")
        if not 0 <= token < vocab_size:
            raise MalformedDraft("accept", f"token {token} is outside the vocabulary of {vocab_size}")
        yield told, token
        node = tree.child(told, token)
    if node == 0:
        raise MalformedDraft("accept", "at least the root and the token after it must come back")


def check_answer(answer: object, drafter: str) -> Answer:
    """Return `answer`, or raise `MalformedDraft` saying what is wrong with what `drafter`'s was refined to."""
    who = f"refine, for drafter {drafter!r},"
    if not isinstance(answer, Answer):
        raise MalformedDraft(who, f"expected an Answer or None, got {type(answer).__name__}")
    if not isinstance(answer.logits, Tensor) or answer.logits.ndim != 2:
        raise MalformedDraft(who, f"logits must be a Tensor [rows, entries], got {answer.logits!r:.60}")
    rows, entries = answer.logits.shape
    if len(answer.kinds) != rows or not rows:
        raise MalformedDraft(who, f"{len(answer.kinds)} kinds of {rows} rows")
    if answer.tokens is not None and len(answer.tokens) != entries:
        raise MalformedDraft(who, f"{len(answer.tokens)} tokens for {entries} entries")
    return answer


def check_foretold(told: object, drafter: str) -> Sequence[Tensor]:
    """Return what that drafter foretold, or raise `MalformedDraft` where it is anything but tensors."""
    if not isinstance(told, tuple | list) or not all(isinstance(each, Tensor) for each in told):
        raise MalformedDraft(f"foretell, of drafter {drafter!r},", f"expected tensors or None, got {told!r:.60}")
    return told
