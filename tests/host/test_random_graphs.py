"""Random graphs of our nodes and stock ones give a picture, or an error that says what to do."""

import pytest
from semantic_style.benchmarks.random_graphs import Trial

GRAPHS = 25


@pytest.fixture(scope="module")
def trial(comfy_server):
    from semantic_style.runner.client import Client

    with Client(comfy_server.address) as client:
        yield Trial(client, comfy_server.base)


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_a_random_graph_gives_a_picture_or_an_error_of_a_check(trial: Trial, comfy_server, seed: int) -> None:
    outcome = trial.run(trial.graph(seed))
    assert outcome.kind != "fault", outcome.text


def test_random_graphs_leave_the_stock_sampler_as_it_was(trial: Trial, comfy_server) -> None:
    outcomes = [trial.run(trial.graph(seed)).kind for seed in range(GRAPHS)]
    assert outcomes.count("picture") >= 5, "most of what is checked above would be refusals"
    assert trial.is_stock_unchanged()
