"""Which of transformers' models are run, and what a configuration must not ask for.

A model is on the list when it calls its attention as `paged_attention` expects, passing window, soft cap and scale, and
when all else that it computes is a token's own: tests/core/torch_lm compares each with transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from realtime_serve.errors import ModelLoadError, UnsupportedModelError

# By `model_type` in config.json.
FAMILIES = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)

# Types whose frequencies depend on nothing but the configuration: a batch mixes sequences of every length. Those of
# "longrope" do not within the original context, to which `max_positions` keeps them.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_STATE_SPACE = ("state_size", "ssm_cfg", "mamba_d_state", "mamba_n_heads", "ssm_state_size", "lru_width")
_LINEAR_LAYERS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv")


def make_config(values: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """transformers' configuration, checked. Raises UnsupportedModelError that names what is not supported, or
    ModelLoadError where transformers refuses the values."""
    family = values.get("model_type")
    if family not in FAMILIES:
        feature = _unsupported_feature(values)
        because = f" (it has {feature})" if feature else ""
        raise UnsupportedModelError(
            f"{source}: architecture {family!r} is not supported{because}; supported: {', '.join(map(repr, FAMILIES))}"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[family].from_dict(dict(values))
    except Exception as error:  # the library raises no narrower type
        raise ModelLoadError(f"{source}: {' '.join(str(error).split())}") from error
    _check_heads(config, source)
    for rope in _ropes(config):
        if rope["rope_type"] not in _ROPE_TYPES:
            raise UnsupportedModelError(
                f"{source}: rope type {rope['rope_type']!r} is not supported;"
                f" supported: {', '.join(map(repr, _ROPE_TYPES))}"
            )
    for flag, feature in (
        ("use_bidirectional_attention", "attention to later tokens"),
        ("add_cross_attention", "cross attention"),
    ):
        if getattr(config, flag, False):
            raise UnsupportedModelError(f"{source}: {feature} ({flag}) is not supported")
    return config


def max_positions(config: PreTrainedConfig) -> int:
    """How long a sequence can be."""
    limits: list[int] = [config.max_position_embeddings]
    limits += [rope["original_max_position_embeddings"] for rope in _ropes(config) if rope["rope_type"] == "longrope"]
    return min(limits)


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: none, one for all layers, or one a kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    ropes = [parameters] if "rope_type" in parameters else parameters.values()
    return [rope for rope in ropes if isinstance(rope, dict) and "rope_type" in rope]


def _check_heads(config: PreTrainedConfig, source: str) -> None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ModelLoadError(f"{source}: {heads} attention heads cannot share {kv_heads} key-value heads")


def _unsupported_feature(values: Mapping[str, Any]) -> str | None:
    """What an architecture that is not on the list has, as far as its configuration says."""
    layer_types = values.get("layer_types") or values.get("layers_block_type") or ()
    if "vision_config" in values:
        return "a vision tower"
    if "audio_config" in values:
        return "an audio tower"
    if values.get("is_encoder_decoder"):
        return "an encoder"
    if values.get("model_type") == "gpt_oss":
        return "attention sinks and a mixture of experts"
    if any(key in values for key in _STATE_SPACE):
        return "state-space layers"
    if any(kind in _LINEAR_LAYERS for kind in layer_types):
        return "layers that keep a state in place of keys and values"
    if any(values.get(key) for key in _EXPERTS):
        return "a mixture of experts"
    if values.get("kv_lora_rank"):
        return "latent attention"
    if values.get("alibi") or values.get("model_type") in ("bloom", "mpt"):
        return "ALiBi"
    return None
