"""A decoder model run by torch."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from realtime_serve._core import KV_BLOCK_POSITIONS
from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.kv_plan import KvPlan, KvRequest, plan_kv_cache
from realtime_serve.runners.torch_lm.attention import PagedAttention
from realtime_serve.runners.torch_lm.checkpoint import Checkpoint
from realtime_serve.runners.torch_lm.device import free_bytes, open_device
from realtime_serve.runners.torch_lm.families import max_positions
from realtime_serve.runners.torch_lm.folder_checkpoint import FolderCheckpoint
from realtime_serve.runners.torch_lm.gathered_attention import GatheredAttention
from realtime_serve.runners.torch_lm.gguf_checkpoint import GgufCheckpoint
from realtime_serve.runners.torch_lm.kv_cache import KvCache, KvShape
from realtime_serve.runners.torch_lm.model import ModelBuilder
from realtime_serve.runners.torch_lm.native_attention import NativeAttention
from realtime_serve.runners.vocabulary import VocabularySource, padded_vocabulary

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TorchLM:
    """See `Runner` for the contract."""

    block_size = KV_BLOCK_POSITIONS

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: VocabularySource,
        *,
        vocabulary_tokens: list[bytes],
        max_context: int,
        kv_plan: KvPlan,
    ) -> None:
        self.vocabulary_tokens = vocabulary_tokens
        self.special_tokens = tokenizer.special_tokens
        self.eos_tokens = tokenizer.eos_tokens
        self.max_context = max_context
        self.weights = str(model.dtype).removeprefix("torch.")
        self.num_blocks, self.cached_blocks = kv_plan.num_blocks, kv_plan.cached_blocks
        self._model = model
        self._device = model.device
        self._attention = _attention_for(model, self.num_blocks)

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
        where, values = open_device(device), _DTYPES[dtype]
        checkpoint: Checkpoint = FolderCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
        builder = ModelBuilder(checkpoint, values)
        vocabulary = padded_vocabulary(tokenizer, checkpoint.config.vocab_size)
        max_context = min(max_context, max_positions(checkpoint.config))
        kv_plan = plan_kv_cache(
            KvRequest(
                source=checkpoint.source,
                weights=dtype,
                weight_bytes=builder.weight_bytes,
                block_bytes=KvShape.of(checkpoint.config).block_bytes(KV_BLOCK_POSITIONS, values),
                block_size=KV_BLOCK_POSITIONS,
                max_context=max_context,
                max_batch_size=max_batch_size,
                kv_cache_mb=kv_cache_mb,
                prefix_cache_mb=prefix_cache_mb,
            ),
            device=str(where),
            free=free_bytes(where),
        )
        return cls(
            builder.load(where),
            tokenizer,
            vocabulary_tokens=vocabulary,
            max_context=max_context,
            kv_plan=kv_plan,
        )

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> None:
        logits = self._forward(batch)
        if len(logits):
            batch.sample(logits.float().cpu().numpy())

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        """Logits of the tokens that want them, [S, vocabulary]."""
        self._attention.begin_step(batch)
        logits: torch.Tensor = self._model(
            input_ids=torch.from_numpy(batch.tokens)[None].to(self._device),
            position_ids=torch.from_numpy(batch.positions)[None].to(self._device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(batch.logits_at).to(self._device),
            paged_attention=self._attention,
        ).logits[0]
        return logits

    def close(self) -> None:
        del self._model, self._attention


def _attention_for(model: PreTrainedModel, num_blocks: int) -> PagedAttention:
    if NativeAttention.supports(model.config, model.dtype, model.device):
        return NativeAttention(model.config, num_blocks=num_blocks)
    shape = KvShape.of(model.config)
    return GatheredAttention(
        KvCache(shape, num_blocks=num_blocks, block_size=KV_BLOCK_POSITIONS, dtype=model.dtype, device=model.device)
    )
