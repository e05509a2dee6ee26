"""What each model family computes, from a configuration in transformers' terms to the native engine's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from realtime_serve.errors import ModelLoadError

T = TypeVar("T", int, float, bool, str)
Floats = npt.NDArray[np.float32]


class NeedsTorchEngine(Exception):
    """The native engine does not run such a model; the text says what it lacks."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """See DecoderSpec in csrc/cpu/decoder_spec.hpp; `max_positions` is how long a sequence can be."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    norm: str
    activation: str
    norm_epsilon: float
    attention_scale: float
    embedding_scale: float
    windows: list[int]
    frequencies: list[float]
    local_frequencies: list[float]
    max_positions: int
    has_tied_head: bool
    norm_offset: float
    """What is added to a stored norm's weight."""

    def as_arguments(self) -> dict[str, Any]:
        return asdict(self)


class Config:
    """A configuration's values, checked as they are read."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def get(self, key: str, default: T) -> T:
        """The value; the default also where it is null. Raises ModelLoadError where it is of another type."""
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ModelLoadError(f"{self.source}: {key} must be a {type(default).__name__}; it is {str(value)[:40]!r}")
        return type(default)(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default or 0)
        if value < 1:
            raise ModelLoadError(f"{self.source}: {key} must be 1 or more; it is {value}")
        return value

    def raw(self, key: str) -> Any:
        return self._values.get(key)

    def table(self, key: str) -> Config | None:
        value = self._values.get(key)
        return Config(value, f"{self.source}: {key}") if isinstance(value, Mapping) else None


def decoder_of(values: Mapping[str, Any], source: str, rope_factors: Floats | None = None) -> Decoder:
    """`rope_factors` divide the frequencies. Raises NeedsTorchEngine, or ModelLoadError where they make no model."""
    family = values.get("model_type")
    make = _FAMILIES.get(str(family))
    if make is None:
        raise NeedsTorchEngine(f"architecture {family!r}")
    decoder = make(Config(values, source), rope_factors)
    if decoder.head_dim % 8 or decoder.head_dim > 256:
        raise NeedsTorchEngine(f"heads of {decoder.head_dim} values")
    if decoder.heads % decoder.kv_heads:
        raise ModelLoadError(
            f"{source}: {decoder.heads} attention heads cannot share {decoder.kv_heads} key-value heads"
        )
    return decoder


def _llama(config: Config, rope_factors: Floats | None, windows: list[int] | None = None) -> Decoder:
    """Llama, and what differs from it by its windows, norms or biases alone."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    head_dim = config.count("head_dim", hidden // heads)
    layers = config.count("num_hidden_layers")
    _require_activation(config, "hidden_act", "silu", "silu")
    theta = config.get("rope_theta", 10000.0)
    return Decoder(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=config.count("intermediate_size"),
        vocabulary=config.count("vocab_size"),
        norm="rms",
        activation="silu_gate",
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        attention_scale=head_dim**-0.5,
        embedding_scale=1.0,
        windows=windows or [0] * layers,
        frequencies=_frequencies(_rope(config), head_dim, theta, rope_factors),
        local_frequencies=[],
        max_positions=config.count("max_position_embeddings", 2048),
        has_tied_head=config.get("tie_word_embeddings", False),
        norm_offset=0.0,
    )


def _mistral(config: Config, rope_factors: Floats | None) -> Decoder:
    window = config.get("sliding_window", 0)
    return _llama(config, rope_factors, [window] * config.count("num_hidden_layers"))


def _qwen(config: Config, rope_factors: Floats | None) -> Decoder:
    layers = config.count("num_hidden_layers")
    kinds = config.raw("layer_types")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else 0
    if isinstance(kinds, list) and len(kinds) == layers:
        windows = [window if kind == "sliding_attention" else 0 for kind in kinds]
    else:
        first = config.get("max_window_layers", 28)
        windows = [window if layer >= first else 0 for layer in range(layers)]
    return _llama(config, rope_factors, windows)


def _gemma3(config: Config, rope_factors: Floats | None) -> Decoder:
    hidden, head_dim = config.count("hidden_size", 2304), config.count("head_dim", 256)
    heads, layers = config.count("num_attention_heads", 8), config.count("num_hidden_layers", 26)
    _require_activation(config, "hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.raw(cap):
            raise NeedsTorchEngine(f"soft-capped logits ({cap})")
    if config.get("use_bidirectional_attention", False):
        raise NeedsTorchEngine("attention to later tokens")
    window, kinds = config.count("sliding_window", 4096), config.raw("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        period = config.count("sliding_window_pattern", 6)
        kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    ropes = config.table("rope_parameters")
    full, local = (ropes.table("full_attention"), ropes.table("sliding_attention")) if ropes else (None, None)
    return Decoder(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.count("num_key_value_heads", 4),
        head_dim=head_dim,
        intermediate=config.count("intermediate_size", 9216),
        vocabulary=config.count("vocab_size", 262208),
        norm="rms",
        activation="gelu_gate",
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        attention_scale=config.get("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=float(np.float32(math.sqrt(hidden))),
        windows=[window if kind == "sliding_attention" else 0 for kind in kinds],
        frequencies=_frequencies(full or _rope(config), head_dim, config.get("rope_theta", 1e6), rope_factors),
        local_frequencies=_frequencies(local, head_dim, config.get("rope_local_base_freq", 10000.0), None),
        max_positions=config.count("max_position_embeddings", 131072),
        has_tied_head=config.get("tie_word_embeddings", True),
        norm_offset=1.0,
    )


def _gpt2(config: Config, rope_factors: Floats | None) -> Decoder:
    hidden, heads, layers = config.count("n_embd", 768), config.count("n_head", 12), config.count("n_layer", 12)
    _require_activation(config, "activation_function", "gelu_new", "gelu_new")
    if config.get("scale_attn_by_inverse_layer_idx", False) or config.get("add_cross_attention", False):
        raise NeedsTorchEngine("attention that is scaled by layer, or across models")
    if hidden % heads:
        raise ModelLoadError(f"{config.source}: n_embd {hidden} is no multiple of n_head {heads}")
    return Decoder(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=config.count("n_inner", 4 * hidden),
        vocabulary=config.count("vocab_size", 50257),
        norm="layer",
        activation="gelu",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        attention_scale=(hidden // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0,
        embedding_scale=1.0,
        windows=[0] * layers,
        frequencies=[],
        local_frequencies=[],
        max_positions=config.count("n_positions", 1024),
        has_tied_head=config.get("tie_word_embeddings", True),
        norm_offset=0.0,
    )


# By `model_type`.
_FAMILIES: dict[str, Callable[[Config, Floats | None], Decoder]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
}
FAMILIES = tuple(_FAMILIES)


def _require_activation(config: Config, key: str, default: str, wanted: str) -> None:
    if (activation := config.get(key, default)) != wanted:
        raise NeedsTorchEngine(f"activation {activation!r}")


def _rope(config: Config) -> Config | None:
    """`rope_parameters`, or what configurations before transformers 5 have in its place."""
    return config.table("rope_parameters") or config.table("rope_scaling")


def _frequencies(rope: Config | None, head_dim: int, theta: float, factors: Floats | None) -> list[float]:
    """Of a head's rotary pairs, [head_dim / 2], in radians a position: Su et al. 2021, and Llama 3's scaling."""
    kind = "default"
    if rope is not None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = rope.get("rope_theta", theta)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise NeedsTorchEngine("rotary positions on a part of each head")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: Floats = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if rope is not None and kind == "linear":
        frequencies = (frequencies / np.float32(rope.get("factor", 1.0))).astype(np.float32)
    elif rope is not None and kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    elif kind != "default":
        raise NeedsTorchEngine(f"rope type {kind!r}")
    if factors is not None:
        if factors.shape != frequencies.shape:
            raise ModelLoadError(f"rotary factors are {len(factors)}, the model has {len(frequencies)} frequencies")
        frequencies = frequencies / factors
    return [float(frequency) for frequency in frequencies]


def _llama3_frequencies(rope: Config, frequencies: Floats) -> Floats:
    """Long wavelengths are stretched by the factor, short ones stay, those between are mixed."""
    factor, low, high = rope.get("factor", 8.0), rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context = rope.count("original_max_position_embeddings", 8192)
    if high <= low or factor <= 0:
        raise ModelLoadError(f"{rope.source}: the factors of 'llama3' make no sense")
    wavelengths = 2 * math.pi / frequencies
    share = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    return ((1 - share) * frequencies / factor + share * frequencies).astype(np.float32)
