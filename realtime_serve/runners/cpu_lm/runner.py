"""A decoder model run by the native CPU engine."""

from __future__ import annotations

from pathlib import Path

from realtime_serve._core import KV_BLOCK_POSITIONS, CpuModel, CpuWeights, NativeModel, cpu_kernels
from realtime_serve.errors import ModelLoadError
from realtime_serve.machine import free_memory, physical_cores
from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.cpu_lm.checkpoint import open_checkpoint
from realtime_serve.runners.cpu_lm.families import Decoder, decoder_of
from realtime_serve.runners.cpu_lm.packed_cache import load_packed
from realtime_serve.runners.cpu_lm.parts import Parts
from realtime_serve.runners.kv_plan import KvPlan, KvRequest, plan_kv_cache
from realtime_serve.runners.vocabulary import VocabularySource, padded_vocabulary


class CpuLM:
    """See `NativeRunner` and `CachingRunner` for the contract."""

    block_size = KV_BLOCK_POSITIONS

    def __init__(
        self,
        weights: CpuWeights,
        tokenizer: VocabularySource,
        *,
        vocabulary_tokens: list[bytes],
        max_context: int,
        max_batch_size: int,
        max_step_tokens: int,
        kv_plan: KvPlan,
        kv_format: str,
    ) -> None:
        self.vocabulary_tokens = vocabulary_tokens
        self.special_tokens = tokenizer.special_tokens
        self.eos_tokens = tokenizer.eos_tokens
        self.max_context = max_context
        self.weights = "- and ".join(str(bits) for bits in weights.layer_bits) + "-bit"
        self.num_blocks, self.cached_blocks = kv_plan.num_blocks, kv_plan.cached_blocks
        self._model = CpuModel(
            weights,
            max_tokens=max_step_tokens,
            max_samples=max_batch_size,
            max_context=max_context,
            num_blocks=self.num_blocks,
            kv_format=kv_format,
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        tokenizer: VocabularySource,
        max_context: int,
        max_batch_size: int,
        max_step_tokens: int,
        threads: int = 0,
        value_bits: int = 8,
        kv_format: str = "int8",
        kv_cache_mb: int | None = None,
        prefix_cache_mb: int | None = None,
    ) -> CpuLM:
        """Loads a GGUF file, or a Hugging Face folder of safetensors. `threads` of 0: one a physical core.
        Weights of 4 bits stay as they are, others get `value_bits`, 4 or 8, in the layers. `kv_format`: what
        keys and values are kept as, "int8" or "float16".

        Raises NeedsTorchEngine where the model has what this engine lacks, and ModelLoadError or UnsupportedModelError
        with one line that says what is wrong.
        """
        checkpoint = open_checkpoint(path)
        decoder = decoder_of(checkpoint.config, checkpoint.source, checkpoint.rope_factors)
        max_context = min(max_context, decoder.max_positions)
        vocabulary = padded_vocabulary(tokenizer, decoder.vocabulary)
        parts = Parts(decoder, checkpoint)
        weights = make_weights(decoder, parts, threads=threads or physical_cores(), value_bits=value_bits)
        kv_plan = plan_kv_cache(
            KvRequest(
                source=checkpoint.source,
                weights="integers of 4 and 8 bits",
                weight_bytes=weights.packed_bytes,
                block_bytes=weights.kv_block_bytes(kv_format),
                block_size=KV_BLOCK_POSITIONS,
                max_context=max_context,
                max_batch_size=max_batch_size,
                kv_cache_mb=kv_cache_mb,
                prefix_cache_mb=prefix_cache_mb,
            ),
            device="cpu",
            free=free_memory(),
        )
        try:
            load_packed(weights, decoder, checkpoint.files, value_bits)
        except ValueError as error:
            raise ModelLoadError(parts.named(str(error))) from error
        checkpoint.release()
        return cls(
            weights,
            tokenizer,
            vocabulary_tokens=vocabulary,
            max_context=max_context,
            max_batch_size=max_batch_size,
            max_step_tokens=max(max_step_tokens, max_batch_size),
            kv_plan=kv_plan,
            kv_format=kv_format,
        )

    @property
    def native_model(self) -> NativeModel | None:
        return self._model

    def step(self, batch: StepBatch) -> None:
        """The same model, for who drives it in Python."""
        logits = self._model.forward(batch)
        if len(logits):
            batch.sample(logits)

    def close(self) -> None:
        del self._model


def make_weights(decoder: Decoder, parts: Parts, *, threads: int, value_bits: int = 8) -> CpuWeights:
    """Not packed yet. Raises ModelLoadError that names the tensor that does not fit."""
    try:
        cpu_kernels()  # what RTS_CPU_ISA asks for may not be there
        return CpuWeights(decoder.as_arguments(), parts.tensors, threads=threads, value_bits=value_bits)
    except ValueError as error:
        raise ModelLoadError(parts.named(str(error))) from error
