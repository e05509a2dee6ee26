"""A Hugging Face folder, its configuration in transformers' terms and its tensors in torch's."""

from __future__ import annotations

from pathlib import Path

import torch

from realtime_serve.checkpoints.folder import CONFIG_FILE, open_weights, read_config
from realtime_serve.errors import UnsupportedModelError
from realtime_serve.runners.torch_lm.families import make_config

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class FolderCheckpoint:
    """See `Checkpoint`. Raises UnsupportedModelError or ModelLoadError that names the file or tensor at fault."""

    rope_factors = None

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self.config = make_config(read_config(folder), str(folder / CONFIG_FILE))
        self._tensors = open_weights(folder)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def check_type(self, name: str) -> None:
        stored = self._tensors[name].dtype
        if stored not in _FLOATS:
            raise UnsupportedModelError(
                f"{self.source}: tensor {name!r} is stored as {stored}; supported: {', '.join(_FLOATS)}"
            )

    def read(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        # Copied: the file's bytes lie as it happens, and whoever writes to the file later does not write to the model.
        return torch.from_numpy(stored.data.copy()).view(_FLOATS[stored.dtype]).view(stored.shape)
