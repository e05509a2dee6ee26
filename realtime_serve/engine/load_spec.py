"""What a worker loads, in a form that can cross a process border."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from realtime_serve.config import BatchConfig, ModelConfig
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.runners.loader import Loader, import_loader, import_name

NULL_MODEL = "null"


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A model version and the limits that it runs under."""

    model: ModelConfig
    limits: EngineLimits
    log_level: str = "INFO"
    path: str = field(default="")
    """Where the model's files are; resolved by the front end, which needs the tokenizer from there."""
    loader: Loader | None = None
    """Makes the model's object, in place of our own engines."""
    batching: BatchConfig = field(default_factory=BatchConfig)
    """How the requests of an object that is called are batched."""

    def to_message(self) -> dict[str, Any]:
        """Raises ValueError where the loader cannot be imported by name."""
        loader = import_name(self.loader) if self.loader is not None else None
        if self.loader is not None and loader is None:
            raise ValueError(f"its loader {self.loader!r} cannot be imported by name")
        return {
            "op": "load",
            "model": asdict(self.model),
            "limits": asdict(self.limits),
            "log_level": self.log_level,
            "path": self.path,
            "loader": loader,
            "batching": asdict(self.batching),
        }

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> LoadSpec:
        """Raises ModelLoadError where the loader cannot be imported here."""
        loader = message["loader"]
        return cls(
            model=ModelConfig(**message["model"]),
            limits=EngineLimits(**message["limits"]),
            log_level=message["log_level"],
            path=message["path"],
            loader=import_loader(loader) if loader is not None else None,
            batching=BatchConfig(**message["batching"]),
        )
