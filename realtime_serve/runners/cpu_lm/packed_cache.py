"""Where packed weights are kept from one start to the next: beside the model, or in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from realtime_serve._core import CpuWeights
from realtime_serve.errors import ConfigError
from realtime_serve.hub import cache_dir
from realtime_serve.runners.cpu_lm.families import Decoder

log = logging.getLogger(__name__)

# Of the packed form, in csrc/cpu/packed_matrix.hpp and decoder_weights.cpp: whoever changes what is written counts up.
_VERSION = 2
_SUFFIX = ".rts-packed"


def load_packed(weights: CpuWeights, decoder: Decoder, files: Sequence[Path], value_bits: int = 8) -> None:
    """Reads the weights as they were packed before, or packs them now, for the next start as well where a folder takes
    the file. Raises ValueError where a weight is not finite."""
    description = describe(decoder, files, value_bits)
    places = packed_paths(files, value_bits)
    if any(weights.open_packed(path, description) for path in places):
        return
    log.info("packing the weights for this machine's kernels; the next start finds them packed")
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            weights.create_packed(path, description)
        except OSError as error:
            log.debug("packed weights cannot be kept in %s: %s", path.parent, error.strerror)
        else:
            return
    log.warning(
        "packed weights cannot be kept in %s: each start packs them", " or ".join(str(p.parent) for p in places)
    )
    weights.pack()


def describe(decoder: Decoder, files: Sequence[Path], value_bits: int) -> str:
    """All that the packed bytes depend on."""
    stats = [path.stat() for path in files]
    sources = [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)]
    return json.dumps([_VERSION, value_bits, sources, decoder.as_arguments()])


def packed_paths(files: Sequence[Path], value_bits: int = 8) -> list[Path]:
    """Beside the first of them, then in the cache folder, where this user has one."""
    first = files[0].resolve()
    beside = first.with_name(first.name + (".int4" if value_bits == 4 else "") + _SUFFIX)
    folder = hashlib.sha256(str(first.parent).encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        return [beside, cache_dir() / "packed" / f"{folder}-{beside.name}"]
    except ConfigError:
        return [beside]
