"""Compiled graphs kept in the user's cache, so that a process that finds them need not trace a model again.

Knows torch's compiling ahead of time, and whether a file means what this process would compile. Does not know models.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
import torch._inductor.config
import torch.fx.experimental._config
from torch import Tensor, nn

from .built import PLAIN, Same, Wordless, worded
from .paging import give_back
from .storage import cache_folder, staged_file

BUILTINS = "__builtins_dict__"  # by what name Python's own functions are found, which nobody replaces
ORDER = "list(dict.keys("  # what stands at some place of a dictionary, which goes by what else a process has loaded
MOST = 8  # forms of one function, as many as torch compiles
Filter = Callable[[Sequence[Any]], Sequence[bool]]


def can_keep(model: Any) -> bool:
    """Whether graphs of `model` can be kept: by this version of torch, on a CPU, as elsewhere nobody has tried, and of
    plain tensors, as what others compute is not in the sources that are looked at."""
    tensors = (*model.parameters(), *model.buffers())
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return hasattr(torch.compiler, "load_compiled_function") and plain


@contextmanager
def tracing(**more: Any) -> Iterator[None]:
    """Within, what torch traces has settings such as the scale of attention as numbers, weights as inputs, and every
    size for itself, with `more` of torch's settings.

    Else it takes the first for inputs that change, finds that most cannot be, and traces everything once more; where a
    user has asked for frozen weights, a graph for all models that are built alike would hold those of one; and sizes
    that happen to be equal, as two rows and the two halves of keys and values, would have to be so for ever.
    """
    patches = (
        torch._dynamo.config.patch(specialize_float=True, **more),
        torch._inductor.config.patch(freezing=False),
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


class KeptGraph:
    """A function compiled for what it is called with, or taken from files that another process has left.

    Args:
        run: the function.
        compile: gives what `torch.compile` does, for a filter of guards.
        plain: the function compiled, for arguments with which it cannot be kept.
        key: tells what the function takes for given beside its arguments.
    """

    def __init__(self, run: Any, compile: Callable[[Filter], Any], plain: Callable[..., Any], key: str) -> None:
        self.run, self.compile, self.plain = run, compile, plain
        self.folder = cache_folder() / "graphs" / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.forms: list[_Form] = []
        self.unread = sorted(self.folder.glob("*.graph"))
        self.fails = False  # ahead of time; as torch compiles otherwise it may do
        self.lock = Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function makes of these."""
        form = self._serving(args, kwargs) or self._another(args, kwargs)
        return (self.plain if form is None else form.graph)(*args, **kwargs)

    def look_again(self) -> None:
        """Forget forms for which a global that they were made with is another by now."""
        for form in [form for form in self.forms if not form.holds()]:
            with suppress(ValueError):  # another thread may have done so
                self.forms.remove(form)

    def _serving(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Form | None:
        return next((form for form in self.forms if form.serves(*args, **kwargs)), None)

    def _another(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Form | None:
        """A form that nobody has asked for in this process."""
        with self.lock:
            while self.unread:
                self.forms += self._read(self.unread.pop(0))
                if (form := self._serving(args, kwargs)) is not None:
                    break
            else:
                if self.fails or len(self.forms) >= MOST:
                    return None
                form = self._serving(args, kwargs) or self._compiled(args, kwargs)
        give_back()  # what reading and compiling took
        return form

    def _compiled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Form | None:
        guards = _Guards()
        try:
            with tracing(enable_aot_compile=True):
                graph = self.compile(guards).aot_compile((args, kwargs))
            form = _Form.of(graph, guards.globals)
        except torch._dynamo.exc.Unsupported:
            raise
        except Exception:  # what is young in torch may fail in many ways, of which the older way knows nothing
            self.fails = True
            return None
        self.forms.append(form)
        with suppress(Exception):  # what cannot be kept lasts as long as the process
            form.write(self.folder / f"{len(list(self.folder.glob('*.graph'))) % MOST}.graph")
        return form

    def _read(self, path: Path) -> list[_Form]:
        """The form in the file `path`; none where it cannot be read, or was made of something else."""
        with suppress(Exception):  # whatever is wrong with a file, it can be made again
            head, data = path.read_bytes().split(b"\n", 1)
            told = json.loads(head)
            if _digests(told["sources"]) == told["sources"]:
                graph: Any = torch.compiler.load_compiled_function(io.BytesIO(data), f_globals=self.run.__globals__)
                form = _Form.of(graph, told["globals"])
                if form.words() == told["globals"]:
                    return [form]
        return []


@dataclass(frozen=True, eq=False)
class _Form:
    """A graph for arguments of some kinds, and what it takes for given beside them."""

    graph: Any
    serves: Callable[..., bool]  # whether it was made for some arguments
    globals: dict[str, CodeType]  # how to find each, by the name that guards have for it
    were: dict[str, Hashable]  # what they were

    @classmethod
    def of(cls, graph: Any, names: Sequence[str] | Mapping[str, Any]) -> _Form:
        """A form that has just been made, with the names of its globals."""
        graph.disable_guard_check()  # a second time: `serves` has been asked
        form = cls(graph, graph.guard_check, {name: compile(name, "global", "eval") for name in names}, {})
        form.were.update(form.now())
        return form

    def now(self) -> dict[str, Hashable]:
        """What its globals are."""
        scope: dict[str, object] = {"G": self.graph.fn.__globals__}
        return {name: _found(code, scope) for name, code in self.globals.items()}

    def holds(self) -> bool:
        """Whether they are what they were."""
        return self.now() == self.were

    def words(self) -> dict[str, str]:
        """What they are, as far as another process can tell.

        Raises `Wordless` for a function or class that it cannot: of an object, what is read of it is a global too.
        """
        told = {}
        for name, seen in self.were.items():
            try:
                told[name] = worded(seen)
            except Wordless:
                if isinstance(seen, FunctionType | type):
                    raise
        return told

    def write(self, path: Path) -> None:
        """Write the graph, and what it takes for given in a line before it."""
        sources = dict.fromkeys(sorted({each.module for each in self.graph.source_info().inlined_sources}), "")
        head = json.dumps({"sources": _digests(sources), "globals": self.words()})
        data = type(self.graph).serialize(self.graph).serialized_data
        with staged_file(path) as staging:
            staging.write_bytes(head.encode() + b"\n" + data)


class _Guards:
    """Filter of guards: those on arguments stay, modules are not looked at, and globals are noted by name."""

    def __init__(self) -> None:
        self.globals: list[str] = []

    def __call__(self, entries: Sequence[Any]) -> list[bool]:
        """Which of `entries` to check before a graph is used."""
        names = [entry.name for entry in entries if entry.is_global and "G[" in entry.name]
        self.globals = [name for name in dict.fromkeys(names) if BUILTINS not in name and ORDER not in name]
        unguarded = torch.compiler.skip_guard_on_all_nn_modules_unsafe(entries)
        return [
            not entry.is_global and ((wanted and _lasts(entry)) or _lists_modules(entry))
            for entry, wanted in zip(entries, unguarded, strict=True)
        ]


def _lasts(entry: Any) -> bool:
    """Whether a guard means something in another process."""
    fleeting = torch._dynamo.guards.CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES
    return not {entry.guard_type, *entry.derived_guard_types}.intersection(fleeting)


def _lists_modules(entry: Any) -> bool:
    """Whether a guard is about the kind of what a list of modules holds. Their order is noted beside the guards, and
    torch looks for them when it reads a graph."""
    listed = entry.guard_type == "TYPE_MATCH" and entry.name.endswith("._modules")
    return bool(listed and all(name.isdecimal() for name in entry.value))


def _found(code: CodeType, scope: dict[str, object]) -> Hashable:
    try:
        return _seen(eval(code, scope))
    except Exception as error:
        gone: Any = type(error)
        return cast(Hashable, gone)


def _seen(value: object) -> Hashable:
    """What a graph may have read of a global: of a container whether it holds something, as what is read of that is a
    global of its own."""
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return type(value), bool(value)
    if isinstance(value, MethodType):  # made anew whenever it is looked up
        return value.__func__, Same(value.__self__)
    return value if isinstance(value, (*PLAIN, type)) else Same(value)


def _digests(modules: Mapping[str, str]) -> dict[str, str]:
    """By the names of Python modules, digests of their sources."""
    files = {name: inspect.getsourcefile(importlib.import_module(name)) for name in modules}
    return {name: hashlib.sha256(Path(file or "").read_bytes()).hexdigest() for name, file in files.items()}
