"""The two attentions of the torch engine."""

import pytest

from realtime_serve.runners.torch_lm.native_attention import NativeAttention


@pytest.fixture(params=["native", "gathered"])
def each_attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels where they can be used, and what other devices and types have."""
    if request.param == "gathered":
        monkeypatch.setattr(NativeAttention, "supports", lambda *_: False)
