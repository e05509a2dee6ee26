"""Which tensor of a checkpoint is which part of the native engine's decoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from realtime_serve._core import CpuTensor
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.cpu_lm.checkpoint import CpuCheckpoint, Tensor
from realtime_serve.runners.cpu_lm.families import Decoder

_LLAMA = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GEMMA3 = {
    **_LLAMA,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    "attention_norm": "ln_1",
    "output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_GPT2_ATTENTION = "attn.c_attn"
_OPTIONAL = ("q_norm", "k_norm")
# Buffers that checkpoints of earlier versions hold and nobody reads.
_COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class Parts:
    """The parts of a decoder, taken one by one from a checkpoint.

    Raises ModelLoadError that names a tensor that is missing, of another shape, or without a place.
    """

    def __init__(self, decoder: Decoder, checkpoint: CpuCheckpoint) -> None:
        self._decoder = decoder
        self._checkpoint = checkpoint
        self._used: set[str] = set()
        self._names: dict[str, str] = {}
        self.tensors: dict[str, CpuTensor] = {}
        if checkpoint.config.get("model_type") == "gpt2":
            self._take_gpt2()
        else:
            self._take_llama()
        self._refuse_surplus()

    def named(self, message: str) -> str:
        """The engine's message, with the checkpoint's name in place of a part's."""
        for part, name in self._names.items():
            message = message.replace(f"'{part}'", f"'{name}'")
        return f"{self._checkpoint.source}: {message}"

    def _take_llama(self) -> None:
        decoder = self._decoder
        hidden, queries = decoder.hidden, decoder.heads * decoder.head_dim
        keys = decoder.kv_heads * decoder.head_dim
        is_gemma = self._checkpoint.config.get("model_type") == "gemma3_text"
        shapes = {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "output": (hidden, queries),
            "gate": (decoder.intermediate, hidden),
            "up": (decoder.intermediate, hidden),
            "down": (hidden, decoder.intermediate),
            "q_norm": (decoder.head_dim,),
            "k_norm": (decoder.head_dim,),
        }
        self._matrix("embedding", "model.embed_tokens.weight", (decoder.vocabulary, hidden))
        self._norm("norm", "model.norm", hidden)
        for layer in range(decoder.layers):
            for part, stem in (_GEMMA3 if is_gemma else _LLAMA).items():
                name = f"model.layers.{layer}.{stem}"
                if part in _OPTIONAL and f"{name}.weight" not in self._checkpoint.tensors:
                    continue
                if part.endswith("norm"):
                    self._norm(f"{layer}.{part}", name, shapes.get(part, (hidden,))[0])
                    continue
                pairs = {"q": decoder.heads, "k": decoder.kv_heads}.get(part, 0)
                pairs = pairs if self._checkpoint.has_rotary_pairs else 0
                self._matrix(f"{layer}.{part}", f"{name}.weight", shapes[part], pairs)
                self._bias(f"{layer}.{part}", f"{name}.bias", shapes[part][0], pairs)
        self._head("lm_head.weight", "model.embed_tokens.weight")

    def _take_gpt2(self) -> None:
        decoder, hidden = self._decoder, self._decoder.hidden
        tensors = self._checkpoint.tensors
        root = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
        shapes = {
            "output": (hidden, hidden),
            "up": (decoder.intermediate, hidden),
            "down": (hidden, decoder.intermediate),
        }
        self._matrix("embedding", f"{root}wte.weight", (decoder.vocabulary, hidden))
        self._matrix("positions", f"{root}wpe.weight", (decoder.max_positions, hidden))
        self._norm("norm", f"{root}ln_f", hidden, has_bias=True)
        for layer in range(decoder.layers):
            prefix = f"{root}h.{layer}."
            for part, stem in _GPT2.items():
                if part.endswith("norm"):
                    self._norm(f"{layer}.{part}", prefix + stem, hidden, has_bias=True)
                    continue
                weight = self._projection(prefix + stem, shapes[part])
                self._put(f"{layer}.{part}", f"{prefix}{stem}.weight", weight)
                self._bias(f"{layer}.{part}", f"{prefix}{stem}.bias", shapes[part][0])
            weight = self._projection(prefix + _GPT2_ATTENTION, (3 * hidden, hidden))
            bias = self._take(f"{prefix}{_GPT2_ATTENTION}.bias", (3 * hidden,)).floats()
            rows = len(weight.data) // (3 * hidden)
            for i, part in enumerate("qkv"):
                own = slice(i * hidden, (i + 1) * hidden)
                data = weight.data[own.start * rows : own.stop * rows]
                name = f"{prefix}{_GPT2_ATTENTION}"
                self._put(f"{layer}.{part}", f"{name}.weight", Tensor(weight.type, (hidden, hidden), data))
                self._put(f"{layer}.{part}.bias", f"{name}.bias", Tensor.of_floats(bias[own]))
        self._head("lm_head.weight", f"{root}wte.weight")

    def _projection(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Outputs first, whichever way it is stored."""
        if not self._checkpoint.is_transposed:
            return self._take(f"{name}.weight", shape)
        return Tensor.of_floats(self._take(f"{name}.weight", shape[::-1]).floats().T)

    def _head(self, name: str, tied: str) -> None:
        shape = (self._decoder.vocabulary, self._decoder.hidden)
        is_tied = self._decoder.has_tied_head or name not in self._checkpoint.tensors
        self._matrix("head", tied if is_tied else name, shape)
        self._used.add(name)

    def _matrix(self, part: str, name: str, shape: tuple[int, ...], pair_heads: int = 0) -> None:
        self._put(part, name, self._take(name, shape), pair_heads)

    def _bias(self, part: str, name: str, size: int, pair_heads: int = 0) -> None:
        if name not in self._checkpoint.tensors:
            return
        values = self._take(name, (size,)).floats()
        if pair_heads:
            values = values.reshape(pair_heads, -1, 2).transpose(0, 2, 1).reshape(-1)
        self._put(f"{part}.bias", name, Tensor.of_floats(values))

    def _norm(self, part: str, name: str, size: int, *, has_bias: bool = False) -> None:
        offset = 0.0 if self._checkpoint.has_norm_offset else self._decoder.norm_offset
        weight = self._take(f"{name}.weight", (size,)).floats() + np.float32(offset)
        self._put(part, f"{name}.weight", Tensor.of_floats(weight))
        if has_bias:
            self._bias(part, f"{name}.bias", size)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._checkpoint.tensors.get(name)
        if tensor is None:
            raise ModelLoadError(f"{self._checkpoint.source}: tensor {name!r} is missing")
        if tensor.shape != shape:
            raise ModelLoadError(
                f"{self._checkpoint.source}: tensor {name!r} has shape {list(tensor.shape)}, the model needs"
                f" {list(shape)}"
            )
        self._used.add(name)
        return tensor

    def _put(self, part: str, name: str, tensor: Tensor, pair_heads: int = 0) -> None:
        *rows, columns = tensor.shape
        try:
            self.tensors[part] = CpuTensor(
                tensor.data, tensor.type, rows[0] if rows else 1, columns, pair_heads=pair_heads
            )
        except ValueError:
            raise UnsupportedModelError(
                f"{self._checkpoint.source}: tensor {name!r} is stored as {tensor.type}, which is not read here"
            ) from None
        self._names[part] = name

    def _refuse_surplus(self) -> None:
        for name in self._surplus():
            raise ModelLoadError(f"{self._checkpoint.source}: the model has no place for tensor {name!r}")

    def _surplus(self) -> Iterator[str]:
        for name in sorted(self._checkpoint.tensors.keys() - self._used):
            if not name.endswith(_COMPUTED):
                yield name
