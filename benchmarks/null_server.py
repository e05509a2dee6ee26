"""Serves `null`, or a model that predicts, over HTTP on any free port, which it prints, until it is told to stop."""

import asyncio
import sys

import uvloop

from realtime_serve import InferenceServer, ModelConfig, ServerConfig


def null_server(**settings: object) -> InferenceServer:
    config = ServerConfig(host="127.0.0.1", port=0, max_batch_size=256, rate_limit_per_minute=0, **settings)
    server = InferenceServer(config)
    server.register_model(ModelConfig(name="null", device="cpu"))
    return server


def predict_server() -> InferenceServer:
    from instant_model import InstantModel

    server = InferenceServer(ServerConfig(host="127.0.0.1", port=0, rate_limit_per_minute=0))
    server.register_model(ModelConfig(name="instant", device="cpu"), InstantModel)
    return server


async def main() -> None:
    server = predict_server() if "predict" in sys.argv else null_server()
    serving = asyncio.ensure_future(server.start())
    while server.port is None and not serving.done():  # noqa: ASYNC110 (nothing tells when it listens)
        await asyncio.sleep(0.01)
    print(server.port, flush=True)
    await serving


if __name__ == "__main__":
    uvloop.run(main())
