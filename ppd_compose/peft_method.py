"""Prompt tokens as a method of PEFT: `get_peft_model(base, PPDConfig(...))`, `PeftModel.from_pretrained(...)`.

Knows where PEFT keeps adapters and how a method is registered; importing this module registers it. Nothing is computed
here: the base's forward stays as it is, and `compose` reads the rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from .adapter import FORMAT, PREFIX, SUFFIX, WITH_PREFIX, Adapter, check_counts
from .identity import Identity
from .prefix import check_prefix_shape

NAME = "PPD"


@dataclass
class PPDConfig(PeftConfig):
    """Prompt tokens for Parallel Prompt Decoding (arXiv 2405.18628).

    Args:
        num_prompt_tokens: how many tokens ahead are guessed, beyond the next.
        ensemble: embeddings of each (EPTs, section 3.2).
        prefix: `[layers, 2, key heads, columns, head_dim]`, the shape of keys and values that prompt tokens alone see
            before the sequence; None for none.
        accuracy: `[num_prompt_tokens][rank]`, how often each guess was right on held-out replies.
        base: what tells the base from others; read off the model.
        training: what is known of the training, for the card.
        target_modules: where the base keeps its input embedding; read off the model.
    """

    num_prompt_tokens: int = 3
    ensemble: int = 1
    prefix: list[int] | None = None
    accuracy: list[list[float]] | None = None
    base: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | None = None
    format_version: int = FORMAT
    digest: str | None = None  # of the rows in files that we write; PEFT's files carry none

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_counts(self.num_prompt_tokens, self.ensemble)
        if self.format_version not in (FORMAT, WITH_PREFIX):
            raise ValueError(
                f"format_version is {self.format_version!r}, this version reads those up to {WITH_PREFIX}: upgrade"
            )
        if self.prefix is not None:
            check_prefix_shape(self.prefix)
            self.format_version = WITH_PREFIX
        elif self.format_version == WITH_PREFIX:
            raise ValueError(f"format_version is {WITH_PREFIX}, that of rows with a prefix, but prefix is None")
        self.digest = None
        self.peft_type = _peft_type()
        self.task_type = self.task_type or "CAUSAL_LM"


class PPDEmbedding(nn.Module, BaseTunerLayer):
    """The base's input embedding, which it passes on unchanged, with the rows of each adapter beside it."""

    adapter_layer_names = (SUFFIX, PREFIX)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ppd_embeddings = nn.ParameterDict()
        self.ppd_embeddings_prefix = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, config: PPDConfig) -> None:
        """Add rows `[prompt tokens x embeddings, hidden]` float32 for `adapter`, at first the mean of all tokens', and
        where there is to be one a prefix, at first zeros."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        rows = weight.detach().mean(0, dtype=torch.float32).expand(config.num_prompt_tokens * config.ensemble, -1)
        self.ppd_embeddings[adapter] = nn.Parameter(rows.clone())
        if config.prefix is not None:
            self.ppd_embeddings_prefix[adapter] = nn.Parameter(rows.new_zeros(config.prefix))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's own embedding says."""
        return self.base_layer(*args, **kwargs)


class PPDModel(BaseTuner):
    """Puts a `PPDEmbedding` in the place of the input embedding; everything else is PEFT's."""

    # Told from others by this; PEFT takes no adapter's name that is a part of it, and "ppd" is a likely one.
    prefix = "pd_embeddings"
    tuner_layer_cls = PPDEmbedding

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        base = Identity.of(self.model)
        config: PPDConfig = peft_config
        config.target_modules = [base.embedding]
        if config.base is None:
            config.base = asdict(base)
        elif (trained := _identity(config)).shape != base.shape:
            raise ValueError(f"these prompt tokens were trained for {trained}; they cannot be used on {base}")
        return config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, PPDEmbedding) else PPDEmbedding(target)
        layer.update_layer(adapter_name, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError("prompt tokens are no change of weights and cannot be merged: use unload()")

    # PEFT warns of a changed embedding that is tied to the output, in two places; this one stays as it is.

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        return None


def adapter_in(model: Any, name: str | None = None) -> Adapter:
    """The prompt tokens called `name`, or the active ones, of a model that PEFT put them on.

    Raises `ValueError` when there are none, or none of that name.
    """
    layer = next((module for module in model.modules() if isinstance(module, PPDEmbedding)), None)
    if layer is None:
        raise ValueError(f"this {type(model).__name__} holds no prompt tokens: load an adapter of peft_type PPD first")
    name = name or (layer.active_adapters or [""])[0]
    if name not in layer.ppd_embeddings:
        raise ValueError(f"no prompt tokens are called {name!r}, there are {sorted(layer.ppd_embeddings)}")
    config = model.peft_config[name]
    rows = layer.ppd_embeddings[name].detach().float()
    embeddings = rows.view(config.num_prompt_tokens, config.ensemble, -1)
    states = layer.ppd_embeddings_prefix[name].detach() if name in layer.ppd_embeddings_prefix else None
    return Adapter(embeddings, config.accuracy, _identity(config), dict(config.training or {}), states)


def _identity(config: Any) -> Identity:
    try:
        return Identity(**config.base)
    except TypeError as error:
        raise ValueError(f"the adapter's config does not say which base it is for: {error}") from None


def _peft_type() -> PeftType:
    return PeftType[NAME]


def _register() -> None:
    """Enter the method into PEFT's tables, which takes a member of the enumeration first; PEFT has no way for others
    to add one."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    vars(member).update(_name_=NAME, _value_=NAME, _sort_order_=len(PeftType))
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(name=NAME.lower(), config_cls=PPDConfig, model_cls=PPDModel, prefix=PPDModel.prefix)


_register()
