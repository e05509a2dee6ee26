"""A step without its model: submit, schedule, assemble, sample."""


def test_submit(measure_stage) -> None:
    measure_stage("submit", budget_ns=300)


def test_schedule(measure_stage) -> None:
    measure_stage("schedule")


def test_assemble(measure_stage) -> None:
    measure_stage("assemble", budget_ns=8_000)


def test_step(measure_stage) -> None:
    measure_stage("step")


def test_sample_greedy(measure_stage) -> None:
    measure_stage("sample_greedy")


def test_sample_default(measure_stage) -> None:
    measure_stage("sample_default")
