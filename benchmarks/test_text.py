"""From a token's id to the bytes that go out."""


def test_detokenize(measure_stage) -> None:
    measure_stage("detokenize")


def test_stop_match(measure_stage) -> None:
    measure_stage("stop_match")


def test_publish(measure_stage) -> None:
    measure_stage("publish", budget_ns=25_000)


def test_frame(measure_stage) -> None:
    measure_stage("frame", budget_ns=80)
