"""What kind of EAGLE head a configuration describes: sizes, norms, positions and which hidden states it reads.

Knows the fields of the official, SpecForge and speculators configurations, and refuses by name what a head here cannot
do. Does not read files, and knows tensors only by their names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OWN = "ppd_compose"  # the key under which our own facts stand in a configuration
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
OPTIONAL = (
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters",
)  # fmt: skip
# Whole numbers with the most that each may be, which keeps what is made of them small.
WIDTHS = dict.fromkeys((*SIZES[:3], "num_key_value_heads", "head_dim", "target_hidden_size"), 2**20)
WHOLE = {**WIDTHS, **dict.fromkeys(("vocab_size", "draft_vocab_size", "max_position_embeddings"), 2**31)}
NUMBERS = ("rms_norm_eps", "rope_theta")
OF_KIND = {"rope_scaling": dict, "rope_parameters": dict, "eagle_config": dict, "hidden_act": str, "layer_types": list}


@dataclass(frozen=True)
class EagleConfig:
    """One draft layer and how it is fed. `version` 1 is EAGLE-1 and EAGLE-2, which share their weights; 3 is EAGLE-3.

    A head of version 1 guesses all tokens in official files; here also the most frequent ones alone (FR-Spec, arXiv
    2502.14856).

    `layer` are keyword arguments of `LlamaConfig`: sizes, activation and rotary positions of the draft layer.
    """

    version: int
    layer: Mapping[str, Any]
    vocab_size: int  # of the base
    draft_vocab_size: int  # tokens that the head can guess
    state_size: int  # hidden size of the base
    states: int  # hidden states of the base that are fused; 1 for version 1
    layers: tuple[int, ...] | None = None  # which ones, numbered as by `output_hidden_states`; None: `default_layers`
    biases: frozenset[str] = field(default_factory=frozenset)  # of "fc", "qkv", "o" and "mlp"
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    @property
    def hidden_size(self) -> int:
        """Width of the draft layer."""
        return int(self.layer["hidden_size"])

    def llama(self) -> LlamaConfig:
        """The configuration from which transformers' building blocks are made."""
        return LlamaConfig(**{**self.layer, "vocab_size": self.vocab_size, "mlp_bias": "mlp" in self.biases})

    def reads(self, depth: int) -> tuple[int, ...]:
        """Which hidden states are read of a base of `depth` layers."""
        if self.version == 1:
            return (depth,)
        return self.layers or default_layers(depth)


def default_layers(depth: int) -> tuple[int, int, int]:
    """The three hidden states that an EAGLE-3 head reads when its file names none.

    Those of the official code, 2, depth // 2 and depth - 3 (the inputs of those layers); in bases of less than 7
    layers, where these do not ascend, states of a like place, of which some may be the same.
    """
    if depth >= 7:
        return 2, depth // 2, depth - 3
    return min(2, depth // 2), depth // 2, depth - 1


def parse(raw: Mapping[str, Any], names: Collection[str], where: str) -> EagleConfig:
    """Read a configuration of any layout; `names` are those of the tensors, as `files` calls them.

    Raises:
        ValueError: no EAGLE head, a field missing or of a kind that cannot be honoured; it begins with `where`.
    """
    layer = _layer_fields(raw, where)
    version = _version(raw, names)
    _refuse(raw, layer, where)
    layers = _layers(raw, where) if version == 3 else None
    hidden, vocab = layer["hidden_size"], layer["vocab_size"]
    flags = {name: bool(raw.get(name)) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    if flags["norm_before_fc"] and flags["fc_norm"]:
        raise ValueError(f"{where} sets norm_before_fc and fc_norm: a head has one of them; correct the configuration")
    if version == 1 and any(flags.values()):
        raise ValueError(f"{where} sets {[f for f in flags if flags[f]]}, which a head of EAGLE-1 does not have")
    return EagleConfig(
        version,
        {name: layer[name] for name in (*SIZES[:3], *OPTIONAL) if layer.get(name) is not None},
        vocab,
        raw.get("draft_vocab_size") or vocab,
        (raw.get("target_hidden_size") or hidden) if version == 3 else hidden,
        1 if version == 1 else len(layers or (2, 1, 0)),
        layers,
        _biases(layer, names, version),
        "layer.self_attn.q_norm.weight" in names,
        **flags,
    )


def _version(raw: Mapping[str, Any], names: Collection[str]) -> int:
    """3 by what only such a head has; a draft vocabulary is that, unless we wrote the file and say otherwise."""
    own = raw.get(OWN)
    if "layer.hidden_norm.weight" in names or "norm.weight" in names:
        return 3
    return 3 if "draft_vocab_size" in raw and not (isinstance(own, Mapping) and own.get("version") == 1) else 1


def _layer_fields(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The fields of the draft layer: nested in the speculators layout, else those of the configuration itself."""
    kind = raw.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise ValueError(f"{where} describes a speculator of kind {kind!r}: of that format only eagle3 is read")
    layer = raw if kind is None else raw.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise ValueError(f"{where} has no transformer_layer_config: a speculators configuration describes its layer so")
    for name in SIZES:
        if layer.get(name) is None:
            raise ValueError(f"{where}: {name} must be a whole number of at least 1, got {layer.get(name)!r}")
    for fields in (raw, layer):
        _check_kinds(fields, where)
    return layer


def _check_kinds(fields: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for a field that is there and is not of its kind."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name, most in WHOLE.items():
        if type(given.get(name, 1)) is not int or not 1 <= given.get(name, 1) <= most:
            raise ValueError(f"{where}: {name} must be a whole number of at least 1, got {given[name]!r:.60}")
    for name in NUMBERS:
        if type(given.get(name, 1)) not in (int, float) or not 0 < given.get(name, 1) < 1e30:
            raise ValueError(f"{where}: {name} must be a number above 0, got {given[name]!r:.60}")
    for name, kind in OF_KIND.items():
        if not isinstance(given.get(name, kind()), kind):
            raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {given[name]!r:.60}")


def _layers(raw: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """The hidden states named, numbered as by `output_hidden_states`.

    vLLM and speculators count as transformers does, id i being the input of layer i; SGLang and SpecForge, who nest
    their ids in `eagle_config`, name the layer whose output is meant, which is the input of the next.
    """
    nested = (raw.get("eagle_config") or {}).get(LAYER_IDS)
    ids = raw.get(LAYER_IDS) or nested
    if not ids:
        return None
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{where} names the hidden states {ids!r:.60}: they must be layer numbers of at least 0")
    return tuple(ids if raw.get(LAYER_IDS) else (i + 1 for i in ids))


def _biases(layer: Mapping[str, Any], names: Collection[str], version: int) -> frozenset[str]:
    """Which linear layers have a bias: those whose bias is in the file or promised by the configuration."""
    attention = bool(layer.get("attention_bias"))
    found = {
        "fc": "fc.bias" in names or (version == 1 and bool(layer.get("bias"))),
        "qkv": "layer.self_attn.q_proj.bias" in names or attention or bool(layer.get("qkv_bias")),
        "o": "layer.self_attn.o_proj.bias" in names or attention,
        "mlp": "layer.mlp.gate_proj.bias" in names or bool(layer.get("mlp_bias")),
    }
    return frozenset(name for name, there in found.items() if there)


def _refuse(raw: Mapping[str, Any], layer: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for what a configuration asks and a head here would not do."""
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", *ROPE_INIT_FUNCTIONS)
    activation = layer.get("hidden_act", "silu")
    partial = rope.get("partial_rotary_factor", layer.get("partial_rotary_factor"))
    faults = {
        f"num_hidden_layers={layer.get('num_hidden_layers')!r}": layer.get("num_hidden_layers", 1) != 1,
        f"rope_type={kind!r} (known are {', '.join(known)})": kind not in known,
        f"partial_rotary_factor={partial!r}": partial not in (None, 1),
        f"hidden_act={activation!r}": activation not in ACT2FN,
        "sliding_attention in layer_types": "sliding_attention" in (layer.get("layer_types") or ()),
        "use_sliding_window": bool(layer.get("use_sliding_window")),
        f"logit_scale={layer.get('logit_scale')!r}": layer.get("logit_scale", 1) != 1,
        "use_aux_hidden_state=false": (raw.get("eagle_config") or {}).get("use_aux_hidden_state", True) is False,
        "quantization_config": bool(raw.get("quantization_config")),
    }
    if found := [name for name, holds in faults.items() if holds]:
        raise ValueError(f"{where} asks for {', '.join(found)}, which a head here cannot do: another head is needed")
