"""A model that predicts at no cost."""

from typing import Any


class InstantModel:
    def __init__(self, config: object) -> None:
        """Holds nothing."""

    def predict(self, inputs: list[Any]) -> list[Any]:
        return inputs
