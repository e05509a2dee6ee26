"""A decoder model run by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.torch_lm.attention import AttentionStep
from realtime_serve.runners.torch_lm.checkpoint import Checkpoint
from realtime_serve.runners.torch_lm.device import free_bytes, open_device
from realtime_serve.runners.torch_lm.folder_checkpoint import FolderCheckpoint
from realtime_serve.runners.torch_lm.gguf_checkpoint import GgufCheckpoint
from realtime_serve.runners.torch_lm.kv_cache import KvCache, block_bytes
from realtime_serve.runners.torch_lm.llama import build_llama

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BLOCK_SIZE = 16
_DEFAULT_KV_CACHE_MB = 1024
# On a CPU the cache's memory is taken as it is used, and idle blocks would keep it.
_DEFAULT_PREFIX_CACHE_MB = 64
# Of what a GPU has free once the weights are on it; the rest is for a step's activations.
_KV_CACHE_SHARE = 0.8


class VocabularySource(Protocol):
    """What the runner needs of a tokenizer."""

    @property
    def special_tokens(self) -> frozenset[int]: ...

    @property
    def eos_tokens(self) -> frozenset[int]: ...

    def vocabulary_tokens(self) -> list[bytes]: ...


class TorchLM:
    """See `Runner` for the contract."""

    block_size = _BLOCK_SIZE

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: VocabularySource,
        *,
        max_context: int,
        max_batch_size: int,
        kv_cache_mb: int | None,
        prefix_cache_mb: int | None = None,
    ) -> None:
        config = model.config
        self.vocabulary_tokens = _vocabulary(tokenizer, config.vocab_size)
        self.special_tokens = tokenizer.special_tokens
        self.eos_tokens = tokenizer.eos_tokens
        self.max_context = min(max_context, config.max_position_embeddings)
        self._model = model
        self._device, self._dtype = model.device, model.dtype
        self._heads_per_kv_head = config.num_attention_heads // config.num_key_value_heads
        self.num_blocks = _count_blocks(
            config, self._dtype, self._device, self.max_context, max_batch_size, kv_cache_mb
        )
        self.cached_blocks = _count_cached_blocks(config, self._dtype, self._device, self.num_blocks, prefix_cache_mb)
        self._cache = KvCache(
            config, num_blocks=self.num_blocks, block_size=_BLOCK_SIZE, dtype=self._dtype, device=self._device
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        tokenizer: VocabularySource,
        device: str,
        dtype: str,
        max_context: int,
        max_batch_size: int,
        kv_cache_mb: int | None = None,
        prefix_cache_mb: int | None = None,
    ) -> TorchLM:
        """Loads a GGUF file, or a Hugging Face folder of safetensors.

        Raises ModelLoadError or UnsupportedModelError with one line that says what is wrong.
        """
        if dtype not in _DTYPES:
            raise ModelLoadError(f"dtype {dtype!r} is not supported; supported: {', '.join(map(repr, _DTYPES))}")
        checkpoint: Checkpoint = FolderCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
        model = build_llama(checkpoint, dtype=_DTYPES[dtype], device=open_device(device))
        return cls(
            model,
            tokenizer,
            max_context=max_context,
            max_batch_size=max_batch_size,
            kv_cache_mb=kv_cache_mb,
            prefix_cache_mb=prefix_cache_mb,
        )

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> None:
        logits = self._forward(batch)
        if len(logits):
            batch.sample(logits.float().cpu().numpy())

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits of the tokens that want them, [S, vocabulary]."""
        hidden = self._model.model(
            input_ids=torch.from_numpy(batch.tokens)[None].to(self._device),
            position_ids=torch.from_numpy(batch.positions)[None].to(self._device),
            use_cache=False,
            attention_step=AttentionStep(
                batch,
                self._cache,
                heads_per_kv_head=self._heads_per_kv_head,
                dtype=self._dtype,
                device=self._device,
            ),
        ).last_hidden_state[0]
        logits: torch.Tensor = self._model.lm_head(hidden[torch.from_numpy(batch.logits_at).to(self._device)])
        return logits

    def close(self) -> None:
        del self._model, self._cache


def _vocabulary(tokenizer: VocabularySource, logits: int) -> list[bytes]:
    """The tokenizer's tokens; embeddings are often padded to a round number of rows, which print as nothing."""
    tokens = tokenizer.vocabulary_tokens()
    if len(tokens) > logits:
        raise ModelLoadError(f"the tokenizer has {len(tokens)} tokens, the model {logits}")
    return tokens + [b""] * (logits - len(tokens))


def _count_blocks(
    config: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    max_batch_size: int,
    kv_cache_mb: int | None,
) -> int:
    """As many blocks as the memory for them holds, or as a full batch can use."""
    bytes_each = block_bytes(config, _BLOCK_SIZE, dtype)
    per_sequence = -(-max_context // _BLOCK_SIZE)
    if kv_cache_mb is None and device.type == "cuda":
        budget = int(free_bytes(device) * _KV_CACHE_SHARE)
    else:
        budget = (kv_cache_mb or _DEFAULT_KV_CACHE_MB) << 20
    if budget // bytes_each < per_sequence:
        raise ModelLoadError(
            f"the KV cache of {budget >> 20} MB does not hold one sequence of {max_context} positions:"
            f" that takes kv_cache_mb={-(-per_sequence * bytes_each >> 20)}"
        )
    return min(budget // bytes_each, per_sequence * max_batch_size)


def _count_cached_blocks(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, num_blocks: int, prefix_cache_mb: int | None
) -> int:
    """Idle blocks that are kept for their prefixes: on a GPU all, whose memory is taken anyway."""
    if prefix_cache_mb is None and device.type != "cpu":
        return num_blocks
    megabytes = _DEFAULT_PREFIX_CACHE_MB if prefix_cache_mb is None else prefix_cache_mb
    return min(num_blocks, (megabytes << 20) // block_bytes(config, _BLOCK_SIZE, dtype))
