"""How far an engine's logits are from those of a float32 forward of the same weights.

The reference dequantizes the model's weights and computes in float32 with torch. Over every position of a text, in
windows that each start from position 0: the divergence of the engine's distribution from the reference's (its mean and
its 99th percentile), how often both have the same most likely token, and the engine's perplexity over the reference's.

Beside engines, schemes: the reference with the inputs and weights of its matrix products rounded as an engine would,
and nothing else. They tell what a number format costs before there is an engine for it, and, beside an engine's own
figures, what is left to its arithmetic.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from realtime_serve.config import DEFAULT_MODEL
from realtime_serve.errors import ServeError
from realtime_serve.hub import resolve
from realtime_serve.machine import physical_cores
from realtime_serve.runners.cpu_lm.checkpoint import open_checkpoint
from realtime_serve.runners.cpu_lm.families import NeedsTorchEngine, decoder_of
from realtime_serve.runners.cpu_lm.parts import Parts
from realtime_serve.runners.cpu_lm.runner import make_weights
from realtime_serve.runners.torch_lm.folder_checkpoint import FolderCheckpoint
from realtime_serve.runners.torch_lm.gguf_checkpoint import GgufCheckpoint
from realtime_serve.runners.torch_lm.model import ModelBuilder
from realtime_serve.tokenizer import Tokenizer

_TEXT = Path(__file__).parent / "text" / "us_founding_documents.txt"
_WINDOW = 512
_GROUP = 32
"""Numbers that share a scale."""
_ROTATED = 8
"""Numbers of a group that are turned together, as far apart as they can be."""

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]
Rounding = Callable[[torch.Tensor], torch.Tensor]


class Engine(Protocol):
    """What is measured."""

    def logits(self, token_ids: Tokens, /) -> Logits:
        """A row for each token: what follows it, given those before it, the first one being at position 0."""


class TorchEngine:
    """transformers' model, in one number format throughout."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        checkpoint = FolderCheckpoint(path) if path.is_dir() else GgufCheckpoint(path)
        self.model: Any = ModelBuilder(checkpoint, dtype).load(torch.device("cpu"))
        self.model.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def logits(self, token_ids: Tokens, /) -> Logits:
        output = self.model(input_ids=torch.from_numpy(token_ids)[None], use_cache=False)
        logits: Logits = output.logits[0].float().numpy()
        return logits


def _exact(values: torch.Tensor) -> torch.Tensor:
    return values


def _grouped(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], -1, size)


def _8_bits(values: torch.Tensor) -> torch.Tensor:
    groups = _grouped(values, _GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return ((groups / scale).round() * scale).reshape(values.shape)


def _4_bits(values: torch.Tensor) -> torch.Tensor:
    """As in GGUF's Q4_0: 16 levels, of which the outermost is the number that is furthest from 0."""
    groups = _grouped(values, _GROUP)
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = torch.where(furthest == 0, 1, furthest / -8)
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(values.shape)


def _hadamard(order: int) -> torch.Tensor:
    """Orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.vstack((torch.hstack((matrix, matrix)), torch.hstack((matrix, -matrix))))
    return matrix / math.sqrt(order)


def _rotated(values: torch.Tensor) -> torch.Tensor:
    """Spreads outliers over their neighbours. A product is the same where both of its sides are turned."""
    groups = _grouped(values, _GROUP).unflatten(-1, (_ROTATED, _GROUP // _ROTATED))
    return (groups.mT @ _hadamard(_ROTATED)).mT.reshape(values.shape)


def _rotated_8_bits(values: torch.Tensor) -> torch.Tensor:
    return _8_bits(_rotated(values))


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is made of the two sides of each matrix product."""

    weights: Rounding
    head_weights: Rounding
    """Those of the output layer."""
    inputs: Rounding


class SchemeEngine(TorchEngine):
    """The reference, its matrix products rounded."""

    def __init__(self, path: Path, scheme: Scheme) -> None:
        super().__init__(path)
        head = self.model.get_output_embeddings()
        linear = [module for module in self.model.modules() if isinstance(module, torch.nn.Linear)]
        for module in linear:
            rounding = scheme.head_weights if module is head else scheme.weights
            # A new parameter: the output layer's may be the embedding's too.
            module.weight = torch.nn.Parameter(rounding(module.weight), requires_grad=False)
            module.register_forward_pre_hook(lambda _, inputs: (scheme.inputs(inputs[0]),))


class NativeEngine:
    """Ours for CPUs."""

    def __init__(self, path: Path, *, kv_format: str = "int8", value_bits: int = 8) -> None:
        checkpoint = open_checkpoint(path)
        decoder = decoder_of(checkpoint.config, checkpoint.source, checkpoint.rope_factors)
        self.kv_format = kv_format
        self.weights = make_weights(
            decoder, Parts(decoder, checkpoint), threads=physical_cores(), value_bits=value_bits
        )
        self.weights.pack()

    def logits(self, token_ids: Tokens, /) -> Logits:
        return self.weights.logits(token_ids, kv_format=self.kv_format)


def _scheme(scheme: Scheme) -> Callable[[Path], Engine]:
    return lambda path: SchemeEngine(path, scheme)


ENGINES: dict[str, tuple[Callable[[Path], Engine], str]] = {
    "native": (NativeEngine, "our engine for CPUs"),
    "native-kv16": (
        lambda path: NativeEngine(path, kv_format="float16"),
        "the same with keys and values in half precision",
    ),
    "native-int4": (
        lambda path: NativeEngine(path, value_bits=4),
        "the same with the layers' weights in 4 bits where they are not already",
    ),
    "torch": (TorchEngine, "the reference itself"),
    "bfloat16": (lambda path: TorchEngine(path, torch.bfloat16), "the reference's model, all of it in bfloat16"),
    "a8": (_scheme(Scheme(_exact, _exact, _8_bits)), "exact weights, inputs in 8 bits"),
    "rotated-a8": (
        _scheme(Scheme(_rotated, _rotated_8_bits, _rotated_8_bits)),
        "exact weights, those of the output layer in 8 bits, inputs in 8 bits, all turned by H8 before",
    ),
    "w8-a8": (_scheme(Scheme(_8_bits, _8_bits, _8_bits)), "weights and inputs in 8 bits"),
    "rotated-w8-a8": (
        _scheme(Scheme(_rotated_8_bits, _rotated_8_bits, _rotated_8_bits)),
        "weights and inputs in 8 bits, turned by H8 before",
    ),
    "w4-a8": (
        _scheme(Scheme(_4_bits, _8_bits, _8_bits)),
        "weights in 4 bits as in Q4_0, those of the output layer and inputs in 8 bits",
    ),
}


@dataclass(slots=True)
class Agreement:
    """An engine beside the reference, over the windows so far."""

    divergences: list[float] = field(default_factory=list)
    """By position: the Kullback-Leibler divergence, reference‖engine, in nats."""
    same_choice: int = 0
    predicted: int = 0
    surplus: float = 0.0
    """The engine's negative log-likelihood of the `predicted` tokens, less the reference's."""

    def add(self, token_ids: Tokens, reference: torch.Tensor, engine: torch.Tensor) -> None:
        """Both are log-probabilities of one window."""
        self.divergences += (reference.exp() * (reference - engine)).sum(-1, dtype=torch.float64).tolist()
        self.same_choice += int((reference.argmax(-1) == engine.argmax(-1)).sum())
        following = torch.from_numpy(token_ids).long()[1:, None]
        self.surplus += (reference - engine)[:-1].gather(-1, following).sum(dtype=torch.float64).item()
        self.predicted += len(following)

    def row(self) -> list[str]:
        positions = len(self.divergences)
        return [
            f"{positions:,}",
            f"{np.mean(self.divergences):.5f}",
            f"{np.percentile(self.divergences, 99):.4f}",
            f"{100 * self.same_choice / positions:.2f} %",
            f"{np.exp(self.surplus / self.predicted):.4f}",
        ]


_HEADINGS = ["engine", "positions", "mean KL", "p99 KL", "same top-1", "× perplexity"]


def windows(tokenizer: Tokenizer, text: str) -> Iterator[Tokens]:
    """The text in full windows; each begins with what the model's tokenizer puts in front of a prompt."""
    prefix = tokenizer.encode("")
    tokens = tokenizer.encode(text)[len(prefix) :]
    size = _WINDOW - len(prefix)
    for start in range(0, len(tokens) - size + 1, size):
        yield np.array(prefix + tokens[start : start + size], np.int32)


def log_probabilities(name: str, engine: Engine, token_ids: Tokens) -> torch.Tensor:
    """Raises RuntimeError where the engine's answer is no row of finite numbers for each token."""
    logits = engine.logits(token_ids)
    if logits.ndim != 2 or len(logits) != len(token_ids):
        raise RuntimeError(f"{name}: logits of shape {logits.shape} for {len(token_ids)} tokens")
    if not np.isfinite(logits).all():
        raise RuntimeError(f"{name}: logits that are not finite")
    return torch.log_softmax(torch.from_numpy(logits).float(), -1)


def compare(path: Path, text: str, names: list[str], limit: int | None) -> dict[str, Agreement]:
    given = list(windows(Tokenizer.load(path), text))[:limit]
    if not given:
        raise RuntimeError(f"the text has fewer than {_WINDOW} tokens")
    reference = TorchEngine(path)
    engines = {name: ENGINES[name][0](path) for name in names}
    agreements = {name: Agreement() for name in names}
    for index, token_ids in enumerate(given):
        print(f"window {index + 1} of {len(given)}", file=sys.stderr, flush=True)
        expected = log_probabilities("reference", reference, token_ids)
        for name, engine in engines.items():
            agreements[name].add(token_ids, expected, log_probabilities(name, engine, token_ids))
    return agreements


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *figures in rows:
        aligned = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *aligned]))


def main() -> int:
    known = "\n".join(f"  {name:14} {about}" for name, (_, about) in ENGINES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"engines and schemes (8 and 4 bits: one scale for {_GROUP} numbers):\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a known model's name, or a path")
    parser.add_argument(
        *("--engine", "-e"),
        action="append",
        choices=ENGINES,
        metavar="NAME",
        help="one of those below (default: native); may be given several times",
    )
    parser.add_argument("--text", type=Path, default=_TEXT, help="a UTF-8 file (default: the one in benchmarks/text)")
    parser.add_argument("--windows", type=int, metavar="N", help=f"only the first N windows of {_WINDOW} tokens")
    arguments = parser.parse_args()
    if arguments.windows is not None and arguments.windows < 1:
        parser.error("--windows must be at least 1")
    text, engines = arguments.text.read_text(), arguments.engine or ["native"]
    agreements = compare(resolve(arguments.model), text, engines, arguments.windows)
    print_table([_HEADINGS, *([name, *agreement.row()] for name, agreement in agreements.items())])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ServeError, NeedsTorchEngine) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
