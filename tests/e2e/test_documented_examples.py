"""What README.md and the published package's README print, run as printed but for the model and the port."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from program import infer, post, program, serve
from support import null_model
from tiny_models import save_tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from realtime_serve import InferenceRequest, InferenceServer, ServerConfig
from realtime_serve.errors import InvalidRequestError

README = (Path(__file__).parents[2] / "README.md").read_text()
SERVER, CLIENT, EMBEDDED, CLASSIFIER, GENERATOR, MIDDLEWARE = re.findall(
    r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
)
DEFAULT_MODEL = '"smollm2-135m-instruct"'

# The published package's quick start and client.
PUBLISHED_SERVER = """\
import asyncio
from realtime_serve import InferenceServer, ModelConfig

server = InferenceServer(
    max_connections=256,
    request_timeout=30.0,
    max_batch_size=32,
)

server.register_model(ModelConfig(
    name="gpt2",
    version="1.0.0",
    model_path="/models/gpt2",
    device="cuda",
))

asyncio.run(server.start(host="0.0.0.0", port=8000))
"""
PUBLISHED_CLIENT = """\
import aiohttp, asyncio

async def stream():
    async with aiohttp.ClientSession() as session:
        async with session.post("http://localhost:8000/infer", json={
            "model": "gpt2",
            "prompt": "Once upon a time",
            "max_tokens": 100,
        }) as resp:
            async for line in resp.content:
                print(line.decode().strip(), end="", flush=True)

asyncio.run(stream())
"""


def changed(code: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


def check_client_output(out: str, model: str) -> None:
    """What the client prints: events without their line ends."""
    assert re.findall(r'id: (\d+)data: {"token":', out) == [str(index) for index in range(100)]
    done = json.loads(out.split("event: donedata: ")[1])
    assert (done["model"], done["finish_reason"], done["usage"]["completion_tokens"]) == (model, "length", 100)


def run_pair(server_code: str, client_code: str, model: str, tmp_path: Path) -> None:
    """A server and its client, each as a script."""
    (tmp_path / "server.py").write_text(changed(server_code, ('host="0.0.0.0", port=8000', 'host="127.0.0.1", port=0')))
    with program(str(tmp_path / "server.py")) as server:
        client = changed(client_code, ("localhost:8000", f"127.0.0.1:{server.port()}"))
        (tmp_path / "client.py").write_text(client)
        with program(str(tmp_path / "client.py")) as running:
            status, out = running.end()
            assert (status, running.errors) == (0, "")
        check_client_output(out, model)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == (0, "")


def test_the_readmes_server_and_client(tmp_path: Path) -> None:
    to_null = (DEFAULT_MODEL, '"null"')
    run_pair(changed(SERVER, to_null), changed(CLIENT, to_null), "null", tmp_path)


def test_the_published_quick_start_and_client(tmp_path: Path) -> None:
    server = changed(PUBLISHED_SERVER, ("/models/gpt2", "null"), ("cuda", "cpu"))
    run_pair(server, PUBLISHED_CLIENT, "gpt2", tmp_path)


def test_the_readmes_embedding(tmp_path: Path) -> None:
    (tmp_path / "embedded.py").write_text(changed(EMBEDDED, (DEFAULT_MODEL, '"null"')))
    with program(str(tmp_path / "embedded.py")) as running:
        status, out = running.end()
        assert (status, running.errors) == (0, "")
    assert out.startswith(" they be at one have")
    assert "length Usage(prompt_tokens=16, completion_tokens=50, cached_tokens=0)" in out


@pytest.mark.usefixtures("default_model_path")
def test_the_readmes_embedding_with_its_model(tmp_path: Path) -> None:
    (tmp_path / "embedded.py").write_text(changed(EMBEDDED, ("max_tokens=50", "max_tokens=6")))
    with program(str(tmp_path / "embedded.py")) as running:
        status, out = running.end()
        assert (status, running.errors) == (0, "")
    found = re.fullmatch(
        r"(.+)(stop|length) Usage\(prompt_tokens=4, completion_tokens=\d, cached_tokens=0\)\n", out, re.DOTALL
    )
    assert found
    assert re.search("[a-z]", found[1])


def test_the_readmes_classifier(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(changed(CLASSIFIER, ("port=8000", 'host="127.0.0.1", port=0')))
    with program(str(tmp_path / "server.py")) as server:
        answer = post(server.port(), "/predict", {"model": "iris", "input": [5.1, 3.5, 1.4, 0.2]})
        assert len(answer["output"]) == 3
        assert sum(answer["output"]) == pytest.approx(1.0)
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
    assert server.errors.count("model iris runs in a thread of this process") == 1


def test_the_readmes_generator(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(changed(GENERATOR, ("port=8000", 'host="127.0.0.1", port=0')))
    with program(str(tmp_path / "server.py")) as server:
        answer = infer(server.port(), model="echo", prompt="one two three", max_tokens=10)
        assert [token["token"] for token in answer["tokens"]] == ["one ", "two ", "three "]
        assert (answer["text"], answer["finish_reason"]) == ("one two three ", "stop")
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_tiny_llama(tmp_path, vocab_size=tokenizer.get_vocab_size(), eos_token_id=tokenizer.token_to_id("<end>"))
    with serve(str(tmp_path), "--device", "cpu", "--max-seq-length", "256") as server:
        port = server.port()
        asked = {"prompt": "Hello, wörld", "max_tokens": 20, "ignore_eos": True, "logprobs": True}
        greedy = [infer(port, temperature=0, **asked) for _ in range(2)]
        assert greedy[0]["tokens"] == greedy[1]["tokens"]
        assert greedy[0]["usage"] == {
            "prompt_tokens": 13, "completion_tokens": 20, "cached_tokens": 0, "total_tokens": 33,
        }  # fmt: skip
        assert all(token["logprob"] < 0 for token in greedy[0]["tokens"])
        drawn = [infer(port, seed=seed, **asked)["tokens"] for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]


async def test_the_readmes_middleware(capsys: pytest.CaptureFixture[str]) -> None:
    server = InferenceServer(ServerConfig(isolation="thread"))
    server.register_model(null_model(max_seq_length=20_000))
    exec(MIDDLEWARE, {"server": server})
    async with server:
        response = await server.infer(InferenceRequest("short", "null", "x", max_tokens=1000))
        assert len(response.tokens) == 256
        assert capsys.readouterr().out == "short length 256\n"
        with pytest.raises(InvalidRequestError, match="must be shorter here"):
            await server.infer(InferenceRequest("long", "null", "x" * 10_001))
