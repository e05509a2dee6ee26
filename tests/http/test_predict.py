"""POST /predict: forms of inputs and outputs, what is refused, and models that fail, hang and die."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import callable_models
import numpy as np
import pytest
import pytest_asyncio
import torch
from callables import Held, calling, predict
from client import Answer, Connection, ask, infer, request_bytes
from metrics import value
from support import null_model, serving, until, worker_pid

from realtime_serve import BatchConfig, InferenceServer, ModelConfig, PredictRequest, ServerConfig
from realtime_serve.engine import supervisor
from realtime_serve.errors import ConfigError, InvalidRequestError, ModelFailedError

NPY, BYTES, JSON = "application/x-npy", "application/octet-stream", "application/json"
MULTIPART = "multipart/form-data; boundary=x"

both_isolations = pytest.mark.parametrize("isolation", ["process", "thread"])


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def array_of(answer: Answer) -> np.ndarray[Any, Any]:
    assert (answer.status, answer.headers["Content-Type"]) == (200, NPY)
    return np.load(io.BytesIO(answer.body), allow_pickle=False)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    loaders = {
        "echo": callable_models.echo,
        "double": callable_models.doubler,
        "obedient": callable_models.obedient,
        "talker": callable_models.talker,
    }
    async with calling(settings={"max_body_bytes": 100_000, "max_queue": 32}, **loaders) as server:
        yield server
        await until(lambda: server.stream_manager.open_count() == 0, "the end of every stream")


# Forms


async def test_one_input_as_json(server: InferenceServer) -> None:
    answer = await predict(server.port, model="double", input=[1, 2.5])
    assert (answer.status, answer.headers["Content-Type"]) == (200, JSON)
    whole = answer.json()
    assert list(whole) == ["request_id", "model", "version", "output", "timings"]
    assert whole["request_id"] == answer.headers["X-Request-Id"]
    assert (whole["model"], whole["version"], whole["output"]) == ("double", "1.0.0", [2, 5.0])
    assert set(whole["timings"]) == {"queue_ms", "compute_ms"}
    assert all(milliseconds >= 0 for milliseconds in whole["timings"].values())


async def test_several_inputs(server: InferenceServer) -> None:
    answer = await predict(server.port, model="double", inputs=[1, "ab", [2], 0.5])
    assert answer.json()["outputs"] == [2, "abab", [4], 1.0]
    assert "output" not in answer.json()
    # As many as the channel takes at once, in their order.
    many = list(range(64))
    assert (await predict(server.port, model="double", inputs=many)).json()["outputs"] == [2 * n for n in many]


@pytest.mark.parametrize("given", [None, True, 0, -1.5, "é🎉\n\0", [], {}, {"a": [{"b": None}]}, 2**64 - 1])
async def test_json_goes_through_as_it_is(server: InferenceServer, given: object) -> None:
    answer = await predict(server.port, model="echo", input=given)
    assert answer.json()["output"] == given
    assert (await predict(server.port, model="echo", inputs=[given, given])).json()["outputs"] == [given, given]


async def test_null_is_as_if_it_were_not_there(server: InferenceServer) -> None:
    nothing = {"priority": None, "timeout": None, "client_id": None, "metadata": None}
    assert (await predict(server.port, model="echo", input=1, inputs=None, **nothing)).json()["output"] == 1
    assert (await predict(server.port, model="echo", input=None, inputs=[1])).json()["outputs"] == [1]


async def test_what_else_a_request_may_say(server: InferenceServer) -> None:
    more = {"priority": "high", "timeout": 5, "client_id": "me", "metadata": {"a": 1}}
    assert (await predict(server.port, model="echo", input=1, **more)).status == 200
    query = "?model=echo&priority=LOW&timeout=5&client_id=me"
    assert (await ask(server.port, "POST", f"/predict{query}", b"x", Content_Type="image/png")).body == b"x"


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8", "text/json", None, "", "form"])
async def test_json_by_other_names(server: InferenceServer, content_type: str | None) -> None:
    name = "application/x-www-form-urlencoded" if content_type == "form" else content_type
    headers = {} if name is None else {"Content_Type": name}
    answer = await ask(server.port, "POST", "/predict", b'{"model": "echo", "input": 1}', **headers)
    assert answer.json()["output"] == 1


@pytest.mark.parametrize("content_type", [BYTES, "image/png", "text/plain; charset=utf-8", "audio/wav"])
async def test_bytes(server: InferenceServer, content_type: str) -> None:
    data = bytes(range(256)) * 300
    answer = await ask(server.port, "POST", "/predict?model=echo", data, Content_Type=content_type)
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (200, BYTES, data)
    assert (answer.headers["X-Model"], answer.headers["X-Model-Version"]) == ("echo", "1.0.0")
    assert len(answer.headers["X-Request-Id"]) == 32
    assert (await ask(server.port, "POST", "/predict?model=echo", b"", Content_Type=content_type)).body == b""


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype="<f4").reshape(2, 3).T, np.zeros((0, 4), "i8"), np.array(5), np.array([True])]
)
async def test_arrays(server: InferenceServer, array: np.ndarray[Any, Any]) -> None:
    answer = await ask(server.port, "POST", "/predict?model=echo", npy(array), Content_Type=NPY, Accept=NPY)
    back = array_of(answer)
    assert (back.dtype, back.shape, back.tolist()) == (array.dtype, array.shape, array.tolist())


async def test_arrays_are_answered_with_arrays(server: InferenceServer) -> None:
    array = np.arange(3, dtype="f4")
    answer = await ask(server.port, "POST", "/predict?model=double", npy(array), Content_Type=NPY)
    assert array_of(answer).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (JSON, JSON),
        ("application/json;q=0.9", JSON),
        ("text/html, application/json", JSON),
        (NPY, NPY),
        ("*/*", NPY),
        ("text/html", NPY),
    ],
)
async def test_the_form_of_the_answer(server: InferenceServer, accept: str, content_type: str) -> None:
    array = npy(np.array([0.5, np.nan, np.inf]))
    answer = await ask(server.port, "POST", "/predict?model=echo", array, Content_Type=NPY, Accept=accept)
    assert (answer.status, answer.headers["Content-Type"]) == (200, content_type)
    if content_type == JSON:
        assert answer.json()["output"] == [0.5, None, None]


async def test_json_in_and_another_form_out(server: InferenceServer) -> None:
    body = {"model": "echo", "input": [[1, 2], [3, 4]]}
    assert array_of(await ask(server.port, "POST", "/predict", body, Accept=NPY)).tolist() == [[1, 2], [3, 4]]


async def test_bytes_in_json_are_base64(server: InferenceServer) -> None:
    answer = await ask(server.port, "POST", "/predict?model=echo", b"\0\xff", Content_Type=BYTES, Accept=JSON)
    assert answer.json()["output"] == "AP8="


async def test_a_single_model_needs_no_name() -> None:
    async with calling(echo=callable_models.echo) as server:
        assert (await predict(server.port, input=1)).json()["model"] == "echo"
        assert (await ask(server.port, "POST", "/predict", b"x", Content_Type=BYTES)).body == b"x"


async def test_names_that_headers_cannot_have() -> None:
    name = "modèle\r\nX-Evil: 1"
    model = ModelConfig(name, device="cpu")
    async with serving(model, loaders={name: callable_models.echo}) as server:
        answer = await ask(server.port, "POST", "/predict", b"x", Content_Type=BYTES)
        assert answer.headers["X-Model"] == "mod%C3%A8le%0D%0AX-Evil%3A%201"
        assert (await predict(server.port, model=name, input=1)).json()["model"] == name


# What users' models are like


class Classifier:
    """A torch module in eval mode, a row of logits for an input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Linear(3, 2)

    def predict(self, inputs: list[Any]) -> torch.Tensor:
        return self.net(torch.tensor(np.array(inputs), dtype=torch.float32))


class Labels(Classifier):
    def predict(self, inputs: list[Any]) -> list[dict[str, Any]]:
        rows = super().predict(inputs).softmax(-1)
        return [{"label": row.argmax(), "score": row.max(), "all": row.detach().numpy()} for row in rows]


class HalfPrecision(Classifier):
    def predict(self, inputs: list[Any]) -> torch.Tensor:
        return super().predict(inputs).to(torch.bfloat16)


@pytest.mark.parametrize("kind", [Classifier, Labels, HalfPrecision])
async def test_a_classifier_of_torch(kind: type[Classifier]) -> None:
    async with calling(model=lambda config: kind()) as server:
        outputs = (await predict(server.port, inputs=[[1, 2, 3], [0, 0, 0]])).json()["outputs"]
        assert len(outputs) == 2
        if kind is Labels:
            assert set(outputs[0]) == {"label", "score", "all"}
            assert outputs[0]["score"] == max(outputs[0]["all"])
            assert isinstance(outputs[0]["label"], int)
        else:
            assert [len(row) for row in outputs] == [2, 2]
            answer = await ask(server.port, "POST", "/predict", npy(np.array([1, 2, 3])), Content_Type=NPY)
            assert array_of(answer).tolist() == pytest.approx(outputs[0], abs=1e-5)


async def test_images_in_and_out() -> None:
    class Negative:
        def predict(self, inputs: list[bytes]) -> list[bytes]:
            return [bytes(255 - byte for byte in data) for data in inputs]

    async with calling(model=lambda config: Negative()) as server:
        answer = await ask(server.port, "POST", "/predict", b"\x01\x02", Content_Type="image/png")
        assert answer.body == b"\xfe\xfd"


async def test_a_class_id_for_an_image_is_json() -> None:
    class Counts:
        def predict(self, inputs: list[bytes]) -> torch.Tensor:
            return torch.tensor([len(data) for data in inputs])

    async with calling(model=lambda config: Counts()) as server:
        answer = await ask(server.port, "POST", "/predict", b"four", Content_Type="image/png")
        assert answer.json()["output"] == 4


# What is refused


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"[1]", 400, "invalid_json", None),
        (b"[" * 5000, 400, "invalid_json", None),
        (b'{"input": NaN}', 400, "invalid_json", None),
        (b'{"model": "\xff", "input": 1}', 400, "invalid_json", "model"),
        (b'{"timeout": 1e999, "input": 1}', 400, "invalid_json", "timeout"),
        (b'{"metadata": ' + b"[" * 5000 + b"]" * 5000 + b', "input": 1}', 400, "invalid_json", None),
        (b'{"\xff": 1, "input": 1}', 400, "invalid_json", None),
        (b'{"input": "\xff", "model": "echo"}', 400, "invalid_request", "input"),
        (b'{"input": 1e999, "model": "echo"}', 400, "invalid_request", "input"),
        (b'{"inputs": [1, "\xff"], "model": "echo"}', 400, "invalid_request", "inputs[1]"),
        ({"model": "echo"}, 400, "missing_field", "input"),
        ({"model": "echo", "inputs": None}, 400, "missing_field", "input"),
        ({"model": "echo", "input": 1, "inputs": [1]}, 400, "invalid_value", "inputs"),
        ({"model": "echo", "inputs": []}, 400, "invalid_value", "inputs"),
        ({"model": "echo", "inputs": {"a": 1}}, 400, "invalid_value", "inputs"),
        ({"model": "echo", "inputs": 1}, 400, "invalid_value", "inputs"),
        ({"model": "echo", "inputs": [1] * 65}, 400, "invalid_value", "inputs"),
        ({"model": "echo", "input": 1, "imput": 1}, 400, "unknown_field", "imput"),
        ({"model": "echo", "input": 1, "prompt": "x"}, 400, "unknown_field", "prompt"),
        ({"model": "echo", "input": 1, "request_id": "x"}, 400, "unknown_field", "request_id"),
        ({"model": "echo", "input": 1, "output_kind": 2}, 400, "unknown_field", "output_kind"),
        ({"model": 3, "input": 1}, 400, "invalid_value", "model"),
        ({"model": "", "input": 1}, 400, "invalid_value", "model"),
        ({"model": "echo", "input": 1, "priority": "urgent"}, 400, "invalid_value", "priority"),
        ({"model": "echo", "input": 1, "timeout": 0}, 400, "invalid_value", "timeout"),
        ({"model": "echo", "input": 1, "timeout": "5"}, 400, "invalid_value", "timeout"),
        ({"model": "echo", "input": 1, "client_id": 5}, 400, "invalid_value", "client_id"),
        ({"model": "echo", "input": 1, "metadata": [1]}, 400, "invalid_value", "metadata"),
        ({"model": "other", "input": 1}, 404, "model_not_found", "model"),
        ({"input": 1}, 404, "model_not_found", "model"),
        ({"model": "talker", "input": 1}, 400, "invalid_value", "model"),
        ({"model": "echo", "input": "x" * 100_000}, 413, "body_too_large", None),
    ],
)
async def test_bodies(
    server: InferenceServer, body: bytes | dict[str, object], status: int, code: str, param: str | None
) -> None:
    answer = await ask(server.port, "POST", "/predict", body)
    error = answer.error()
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert (await predict(server.port, model="echo", input=1)).status == 200


@pytest.mark.parametrize(
    ("query", "body", "headers", "status", "code", "param"),
    [
        ("model=echo", b"x", {"Content_Type": MULTIPART}, 415, "unsupported_media_type", "Content-Type"),
        ("model=echo&max_tokens=3", b"x", {"Content_Type": BYTES}, 400, "unknown_parameter", "max_tokens"),
        ("model=echo&input=3", b"x", {"Content_Type": BYTES}, 400, "unknown_parameter", "input"),
        ("model=echo&timeout=soon", b"x", {"Content_Type": BYTES}, 400, "invalid_value", "timeout"),
        ("model=echo&timeout=nan", b"x", {"Content_Type": BYTES}, 400, "invalid_value", "timeout"),
        ("model=echo&priority=x", b"x", {"Content_Type": BYTES}, 400, "invalid_value", "priority"),
        ("model=", b"x", {"Content_Type": BYTES}, 400, "invalid_value", "model"),
        ("model=other", b"x", {"Content_Type": BYTES}, 404, "model_not_found", "model"),
        ("", b"x", {"Content_Type": BYTES}, 404, "model_not_found", "model"),
        ("model=talker", b"x", {"Content_Type": BYTES}, 400, "invalid_value", "model"),
        ("model=echo", bytes(100_001), {"Content_Type": BYTES}, 413, "body_too_large", None),
        ("model=echo", b"", {"Content_Type": NPY}, 400, "invalid_request", "input"),
        ("model=echo", b"\x93NUMPY", {"Content_Type": NPY}, 400, "invalid_request", "input"),
        ("model=echo", npy(np.zeros(4))[:-1], {"Content_Type": NPY}, 400, "invalid_request", "input"),
        ("model=echo", npy(np.zeros(4)), {"Content_Type": NPY, "Accept": BYTES}, 400, "invalid_request", "Accept"),
        ("", b'{"model": "echo", "inputs": [1]}', {"Accept": NPY}, 400, "invalid_value", "Accept"),
        ("", b'{"model": "echo", "input": {}}', {"Accept": NPY}, 400, "invalid_request", "Accept"),
        ("", b'{"model": "echo", "input": 1}', {"Accept": BYTES}, 400, "invalid_request", "Accept"),
    ],
)  # fmt: skip
async def test_other_forms(
    server: InferenceServer, query: str, body: bytes, headers: dict[str, str], status: int, code: str, param: str | None
) -> None:
    answer = await ask(server.port, "POST", f"/predict?{query}", body, **headers)
    error = answer.error()
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert (await predict(server.port, model="echo", input=1)).status == 200


async def test_pickles_are_not_opened(server: InferenceServer) -> None:
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object), allow_pickle=True)
    answer = await ask(server.port, "POST", "/predict?model=echo", out.getvalue(), Content_Type=NPY)
    assert (answer.status, answer.error()["message"]) == (400, "input: arrays of Python objects are not taken")


async def test_a_model_that_predicts_does_not_infer(server: InferenceServer) -> None:
    for path in ("/infer", "/infer_stream"):
        answer = await ask(server.port, "POST", path, {"model": "echo", "prompt": "x"})
        assert (answer.status, answer.error()["param"]) == (400, "model")
        assert "POST /predict" in answer.error()["message"]
    assert "POST /infer" in (await predict(server.port, model="talker", input=1)).error()["message"]


async def test_a_full_queue_is_429_and_takes_none_of_the_inputs() -> None:
    model = Held()
    settings = {"max_batch_size": 2, "max_queue": 2}
    async with calling(settings=settings, held=model.load) as server:
        running = asyncio.ensure_future(predict(server.port, input=1))
        await until(lambda: model.batches)
        waiting = asyncio.ensure_future(predict(server.port, input=2))
        await until(lambda: server.stream_manager.open_count() == 2)
        refused = await predict(server.port, inputs=[3, 4, 5])
        assert (refused.status, refused.error()["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1
        model.gate.set()
        assert [(await one).json()["output"] for one in (running, waiting)] == [1, 2]
        await until(lambda: server.stream_manager.open_count() == 0)
        assert not {3, 4, 5} & {value for batch in model.batches for value in batch}
        assert (await predict(server.port, inputs=[1, 2, 3, 4])).json()["outputs"] == [1, 2, 3, 4]


# Models that fail


@both_isolations
async def test_a_model_that_raises(isolation: str, caplog: pytest.LogCaptureFixture) -> None:
    async with calling(settings={"isolation": isolation}, model=callable_models.obedient) as server:
        answer = await predict(server.port, input={"raise": "secret"})
        error = answer.error()
        assert (answer.status, error["type"], error["code"]) == (500, "internal_error", "model_failed")
        head, _, tail = error["message"].partition(" for request ")
        assert head == "the model raised LookupError"
        request_id, _, tail = tail.partition(";")
        assert (len(request_id), tail) == (32, " the log has the traceback")
        assert "secret" not in answer.body.decode()
        if isolation == "thread":  # a process has its own log
            assert f"request {request_id}: the model raised" in caplog.text
            assert "LookupError: secret" in caplog.text
        for bad, message in [
            ({"exit": 3}, "raised SystemExit"),
            ({"return": None}, "predict returned a NoneType, and not a list"),
            ({"return": [1, 2]}, "predict returned 2 outputs for a batch of 1 inputs"),
        ]:
            answer = await predict(server.port, model="model", input=bad)
            assert (answer.status, answer.error()["code"]) == (500, "model_failed")
            assert message in answer.error()["message"]
        answer = await predict(server.port, inputs=[1, {"raise": "x"}, 2])
        assert answer.error()["message"].startswith("inputs[1]: the model raised LookupError")
        assert (await predict(server.port, inputs=[1, 2])).json()["outputs"] == [1, 2]
        assert value(server, "rts_requests_total", model="model", outcome="model_failed") == 3
        assert value(server, "rts_worker_restarts_total", model="model") == 0


async def test_calls_in_process(server: InferenceServer) -> None:
    response = await server.predict(PredictRequest("r", "double", [1, np.arange(3), [2]]))
    assert [response.outputs[0], response.outputs[1].tolist(), response.outputs[2]] == [2, [0, 2, 4], [4]]
    assert (response.request_id, response.model, response.version) == ("r", "double", "1.0.0")
    with pytest.raises(ModelFailedError, match="raised LookupError for request r;"):
        await server.predict(PredictRequest("r", "obedient", [{"raise": "x"}]))
    with pytest.raises(InvalidRequestError, match="an input cannot be sent to the model: a object has no form as JSON"):
        await server.predict(PredictRequest("r", "echo", [1, object()]))
    with pytest.raises(InvalidRequestError, match="inputs must be a list of at least one input"):
        await server.predict(PredictRequest("r", "echo", []))


async def test_a_model_that_hangs_times_out_and_others_go_on() -> None:
    model = Held()
    async with calling(held=model.load, echo=callable_models.echo) as server:
        answer = await predict(server.port, model="held", input=1, timeout=0.05)
        assert (answer.status, answer.error()["code"], answer.error()["type"]) == (504, "timeout", "timeout_error")
        assert (await predict(server.port, model="held", input="late", timeout=0.05)).status == 504
        assert (await predict(server.port, model="echo", input=1)).json()["output"] == 1
        model.gate.set()
        assert (await predict(server.port, model="held", input=2)).json()["output"] == 2
        assert model.batches == [[1], [2]]
        assert value(server, "rts_requests_total", model="held", outcome="timeout") == 2


async def test_a_worker_that_hangs_is_started_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))
    settings = {"isolation": "process", "request_timeout": 0.5}
    async with calling(settings=settings, model=callable_models.obedient) as server:
        pid = worker_pid(server, "model")
        assert (await predict(server.port, input="pid", timeout=30)).json()["output"] == pid
        assert (await predict(server.port, input={"hang": 1})).status == 504
        worker = server.model_registry.get_model("model").worker
        await until(lambda: worker.restarts == 1 and worker.is_ready)
        assert (await predict(server.port, input="pid", timeout=30)).json()["output"] not in (pid, None)
        assert "the worker of model 1.0.0 hangs" in caplog.text


async def test_a_worker_that_is_only_slow_is_left_alone() -> None:
    settings = {"isolation": "process", "request_timeout": 0.05}
    async with calling(settings=settings, model=callable_models.obedient) as server:
        worker = server.model_registry.get_model("model").worker
        os.kill(worker.worker.pid, signal.SIGSTOP)
        patient = asyncio.ensure_future(predict(server.port, input=1, timeout=60))
        await until(lambda: server.stream_manager.open_count() == 1)
        assert (await predict(server.port, input=2, timeout=0.05)).status == 504
        await until(lambda: worker._probe is not None)
        assert (await predict(server.port, input=3, timeout=0.3)).status == 504  # several times request_timeout
        os.kill(worker.worker.pid, signal.SIGCONT)
        assert (await patient).json()["output"] == 1
        await until(lambda: worker._probe is None)
        assert (worker.restarts, worker.is_ready) == (0, True)


async def test_a_thread_that_hangs_is_not_restarted() -> None:
    model = Held()
    async with calling(settings={"request_timeout": 0.05}, held=model.load) as server:
        assert (await predict(server.port, input=1)).status == 504
        worker = server.model_registry.get_model("held").worker
        assert (await predict(server.port, input=1)).status == 504
        assert worker._probe is None
        model.gate.set()
        assert (await predict(server.port, input=2, timeout=30)).json()["output"] == 2
        assert worker.restarts == 0


@both_isolations
async def test_a_server_whose_model_hangs_stops(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_STOP_GRACE_S", 0.05)
    model = Held()
    settings = {"isolation": isolation, "graceful_shutdown_timeout": 0.05}
    loader = callable_models.obedient if isolation == "process" else model.load
    async with calling(settings=settings, model=loader) as server, await Connection.open(server.port) as connection:
        connection.send(request_bytes("POST", "/predict", {"input": {"hang": 1}}))
        await until(lambda: server.stream_manager.open_count() == 1)
        worker = server.model_registry.get_model("model").worker
        await until(lambda: worker.stats()["worker"]["running"] == 1)
        stopping = asyncio.ensure_future(server.stop())
        answer = await connection.answer()
        assert (answer.status, answer.error()["code"]) == (500, "worker_died")
        await stopping
        model.gate.set()
        await until(lambda: worker.worker is None)


async def test_a_worker_that_dies_in_a_predict_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))
    async with calling(settings={"isolation": "process"}, model=callable_models.obedient) as server:
        worker = server.model_registry.get_model("model").worker
        for count, how in enumerate(["itself", "killed"], 1):
            body = {"input": {"die": 3} if how == "itself" else {"hang": 1}}
            asking = asyncio.ensure_future(predict(server.port, **body))
            if how == "killed":
                await until(lambda: worker.stats()["worker"]["running"] == 1)
                os.kill(worker.worker.pid, signal.SIGKILL)
            answer = await asking
            assert (answer.status, answer.error()["code"]) == (500, "worker_died")
            await until(lambda count=count: worker.restarts == count and worker.is_ready)  # type: ignore[misc]
        assert (await predict(server.port, input=1)).json()["output"] == 1


@both_isolations
async def test_a_client_that_leaves_frees_its_place(isolation: str) -> None:
    async with calling(settings={"isolation": isolation}, model=callable_models.doubler) as server:
        async with await Connection.open(server.port) as connection:
            connection.send(request_bytes("POST", "/predict", {"inputs": [1] * 100}))
        await until(lambda: server.stream_manager.open_count() == 0)
        assert (await predict(server.port, input=1)).json()["output"] == 2


# Loading


@both_isolations
@pytest.mark.parametrize(
    ("loader", "metadata", "reason"),
    [
        (callable_models.raising, {}, "LookupError: no weights in this place"),
        (callable_models.raising_later, {}, "LookupError: no weights"),
        (callable_models.exiting, {}, "SystemExit: no licence"),
        (callable_models.returning_nothing, {}, "this one returned a NoneType"),
        (callable_models.returning_a_class, {}, "this one returned the class Doubler"),
        (callable_models.with_step, {}, "a model with step\\(batch\\) must also have"),
        (callable_models.unwell, {"what": "warmup"}, "LookupError: cold"),
        (callable_models.unwell, {"what": "unwell"}, "health_check says that it is not well"),
        (callable_models.unwell, {"what": "health raises"}, "LookupError: ill"),
    ],
)
async def test_a_load_that_fails_says_why_and_changes_nothing(
    isolation: str, loader: Any, metadata: dict[str, Any], reason: str
) -> None:
    async with serving(null_model(), isolation=isolation) as server:
        registry = server.model_registry
        registry.register_loader("model", loader)
        with pytest.raises(RuntimeError, match=reason):
            await registry.load_model(ModelConfig("model", device="cpu", metadata=metadata))
        assert registry.list_models() == {"null": ["1.0.0"]}
        assert (await predict(server.port, model="model", input=1)).status == 404
        assert (await infer(server.port, max_tokens=1)).status == 200


@pytest.mark.parametrize("isolation", ["process"])
async def test_a_loader_whose_module_cannot_be_imported_there(
    isolation: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text(
        "import os, sys\nassert os.getpid() == int(os.environ['ONLY_IN'])\ndef load(config): ...\n"
    )
    monkeypatch.setenv("ONLY_IN", str(os.getpid()))
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    async with serving(null_model(), isolation=isolation) as server:
        server.model_registry.register_loader("model", only_here.load)
        with pytest.raises(RuntimeError, match="importing only_here failed: AssertionError"):
            await server.model_registry.load_model(ModelConfig("model", device="cpu"))


@both_isolations
async def test_a_failed_load_leaves_the_version_before_it(isolation: str) -> None:
    async with calling(settings={"isolation": isolation}, model=callable_models.echo) as server:
        server.model_registry.register_loader("model", callable_models.raising)
        with pytest.raises(RuntimeError, match="no weights"):
            await server.model_registry.load_model(ModelConfig("model", "2", device="cpu"))
        assert server.model_registry.active_version("model") == "1.0.0"
        assert (await predict(server.port, input=1)).json()["version"] == "1.0.0"
        server.model_registry.register_loader("model", callable_models.doubler)
        await server.model_registry.load_model(ModelConfig("model", "2", device="cpu"))
        answer = (await predict(server.port, input=1)).json()
        assert (answer["version"], answer["output"]) == ("2", 2)


async def test_where_a_model_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    class Pid:
        def predict(self, inputs: list[Any]) -> list[int]:
            return [os.getpid()] * len(inputs)

    loaders = {"here": lambda config: Pid(), "there": callable_models.obedient}
    async with calling(settings={"isolation": "process"}, **loaders) as server:
        assert (await predict(server.port, model="here", input=1)).json()["output"] == os.getpid()
        there = (await predict(server.port, model="there", input="pid")).json()["output"]
        assert there == worker_pid(server, "there")
        lines = [record.getMessage() for record in caplog.records if "thread of this process" in record.getMessage()]
        assert lines == [
            "model here runs in a thread of this process: its loader cannot be imported by name from another one"
        ]


@both_isolations
async def test_a_loader_may_run_a_loop_of_its_own(isolation: str) -> None:
    async with calling(settings={"isolation": isolation}, model=callable_models.running_a_loop_of_its_own) as server:
        assert (await predict(server.port, input=1)).json()["output"] == 1


async def test_a_loader_that_cannot_be_called() -> None:
    server = InferenceServer()
    with pytest.raises(ValueError, match="the loader of model 'm' must be callable; it is a int"):
        server.register_model(ModelConfig("m", device="cpu"), loader=3)
    with pytest.raises(ValueError, match="must be callable"):
        server.model_registry.register_loader("m", None)


# Counts


async def test_what_is_counted() -> None:
    model = Held()
    async with calling(BatchConfig(max_batch_size=4), held=model.load, talker=callable_models.talker) as server:
        first = asyncio.ensure_future(predict(server.port, model="held", input=0))
        await until(lambda: model.batches)
        rest = asyncio.ensure_future(predict(server.port, model="held", inputs=[1, 2, 3, 4]))
        await until(lambda: server.stream_manager.open_count() == 5)
        labels = {"model": "held", "version": "1.0.0"}
        assert value(server, "rts_running_sequences", **labels) == 1
        model.gate.set()
        await first, await rest
        assert value(server, "rts_batches_total", release="full", **labels) == 1
        assert value(server, "rts_batches_total", release="idle", **labels) == 1
        assert value(server, "rts_batches_total", **labels) == 2
        assert value(server, "rts_batch_sequences_count", **labels) == 2
        assert value(server, "rts_batch_sequences_sum", **labels) == 5
        await until(lambda: value(server, "rts_step_seconds_count", **labels) == 2)
        assert value(server, "rts_requests_total", model="held", outcome="stop") == 2
        text = (await ask(server.port, "GET", "/metrics")).body.decode()
        assert 'rts_preempted_sequences_total{model="held",version="1.0.0"} 0.0' in text
        assert 'rts_batches_total{model="talker",release="full",version="1.0.0"} 0.0' in text
        await until(lambda: value(server, "rts_running_sequences", **labels) == 0)
        models = {model["name"]: model for model in (await ask(server.port, "GET", "/models")).json()["models"]}
        assert (models["held"]["kind"], models["talker"]["kind"]) == ("predict", "generate")
        assert models["held"]["inference_count"] == 2
        assert server.model_registry.model_stats("held")["healthy"]
        assert await server.model_registry.health_check("held")


async def test_a_models_own_refusal_is_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Picky:
        def predict(self, inputs: list[Any]) -> list[Any]:
            if "bad" in inputs:
                raise InvalidRequestError("want 4 numbers", "input")
            return inputs

    async with calling(model=lambda config: Picky()) as server:
        answer = await predict(server.port, input="bad")
        assert answer.status == 400
        assert (answer.error()["message"], answer.error()["param"]) == ("input: want 4 numbers", "input")
        assert (await predict(server.port, input="good")).json()["output"] == "good"
    assert "Traceback" not in caplog.text


async def test_versions_have_loaders_of_their_own() -> None:
    class Answers:
        def __init__(self, answer: str) -> None:
            self._answer = answer

        def predict(self, inputs: list[Any]) -> list[Any]:
            return [self._answer] * len(inputs)

    server = InferenceServer(ServerConfig(isolation="thread"))
    for version in ("1", "2"):
        config = ModelConfig("m", version=version, device="cpu")
        server.register_model(config, lambda config: Answers("loader " + config.version))
    with pytest.raises(ConfigError, match="registered already"):
        server.register_model(ModelConfig("m", version="2", device="cpu"), lambda config: Answers("another"))
    async with server:
        for version in ("1", "2"):
            assert server.model_registry.set_active_version("m", version)
            answer = await server.predict(PredictRequest("r", "m", ["x"]))
            assert (answer.version, answer.outputs) == (version, ["loader " + version])


async def test_bytes_without_a_type_are_told_what_to_do() -> None:
    async with calling(model=callable_models.echo) as server:
        form = "application/x-www-form-urlencoded"
        answer = await ask(server.port, "POST", "/predict", b"\x89PNG", Content_Type=form)
        assert answer.status == 400
        assert "-H 'Content-Type: application/octet-stream'" in answer.error()["message"]


async def test_a_request_for_more_than_there_is_room_for_takes_nothing() -> None:
    async with calling(settings={"max_queue": 3, "max_batch_size": 1}, model=callable_models.echo) as server:
        answer = await predict(server.port, inputs=list(range(5)))
        assert (answer.status, answer.error()["param"]) == (400, "inputs")
        assert "at most 4 here" in answer.error()["message"]
        assert server.stream_manager.open_count() == 0
        assert (await predict(server.port, inputs=[1, 2, 3, 4])).status == 200


async def test_a_prediction_that_is_cut_short_is_no_answer() -> None:
    class Endless:
        async def predict(self, inputs: list[Any]) -> list[Any]:
            await asyncio.Event().wait()
            return inputs

    async with calling(model=lambda config: Endless()) as server:
        asked = [asyncio.ensure_future(predict(server.port, **body)) for body in ({"input": 1}, {"inputs": [1, 2]})]
        await until(lambda: server.stream_manager.open_count() == 3)
        await server.model_registry.unload_model("model")
        for one in asked:
            answer = await one
            assert (answer.status, answer.error()["code"]) == (503, "model_unavailable")


async def test_pipelined_answers_wait_for_their_reader() -> None:
    class Large:
        def predict(self, inputs: list[Any]) -> list[Any]:
            return ["x" * 200_000] * len(inputs)

    async with (
        calling(model=lambda config: Large()) as server,
        await Connection.open(server.port, receive_buffer=4096) as connection,
    ):
        connection.writer.transport.pause_reading()
        for _ in range(50):
            connection.send(request_bytes("POST", "/predict", {"input": 1}))
        (held,) = server._listener._open
        await until(lambda: held.unsent > 0)
        assert (await predict(server.port, input=2)).status == 200  # meanwhile more answers could have been made
        assert held.unsent < 1_000_000
