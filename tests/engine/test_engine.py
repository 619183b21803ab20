"""Continuous batching on a simulated model runner gives each request the tokens of a lone one."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.engine_driver import STOPS, Case, Driver, Setup

setups = st.builds(
    Setup,
    windows=st.sampled_from([(0,), (0,), (6,), (21,), (48,), (0, 7), (30, 0), (9, 40)]),
    spare_pages=st.tuples(*[st.just(0) | st.integers(0, 12)] * 2),
    block_size=st.sampled_from([4, 4, 16, 1]),
    max_num_seqs=st.integers(1, 6),
    spare_tokens=st.sampled_from([0, 1, 4, 11, 30, 60]),
    max_model_len=st.sampled_from([61, 80, 100]),
    smaller_buckets=st.none() | st.lists(st.integers(1, 60), max_size=3).map(tuple),
    apart=st.booleans(),
    sharing=st.booleans(),
    states=st.sampled_from([False, False, True]),
)


cases = st.builds(
    Case,
    length=st.integers(1, 60),
    shared=st.just(60) | st.integers(0, 60),
    beginning=st.integers(0, 1),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 40),
    min_tokens=st.sampled_from([0, 0, 3, 20]),
    stops=st.sampled_from(sorted(STOPS)),
    sampling=st.sampled_from(["greedy", "greedy", "random", "host"]),
    scored=st.sampled_from([False, False, False, True]),
    streaming=st.booleans(),
    priority=st.sampled_from([0, 0, 0, -1, 1]),
    arrival=st.integers(0, 25),
    abort_after=st.none() | st.none() | st.integers(0, 25),
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    setup=setups,
    cases=st.lists(cases, min_size=1, max_size=12),
    forget_at=st.none() | st.integers(0, 40),
)
def test_each_request_gets_what_it_gives_alone(
    setup: Setup, cases: list[Case], forget_at: int | None
) -> None:
    Driver(setup, cases, forget_at).run()


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("windows", [(0,), (21,), (0, 7)])
def test_many_requests_in_few_pages(windows: tuple[int, ...], apart: bool) -> None:
    rng = random.Random(0)
    cases = [
        Case(
            length=rng.randint(1, 60),
            shared=rng.choice([0, 30, 60]),
            seed=number,
            max_tokens=rng.randint(1, 40),
            stops=rng.choice(["none", "two"]),
            sampling=rng.choice(["greedy", "random"]),
            arrival=rng.randint(0, 100),
        )
        for number in range(80)
    ]
    driver = Driver(Setup(windows=windows, max_num_seqs=6, apart=apart), cases)
    driver.run()
    stats = driver.model_runner.report.scheduling
    assert stats.preemptions > 0
    assert stats.cached_tokens > 200
    assert stats.decode_steps > 50 or not apart


@pytest.mark.parametrize("window", [12, 20, 28])
def test_shared_pages_of_a_window_leave_room_for_the_rest(window: int) -> None:
    """The blocks of one sequence suffice for it, for any number of shared ones."""
    cases = [Case(length=window + 1, shared=60), Case(length=60, shared=60, arrival=30)]
    driver = Driver(Setup(windows=(window,), max_num_seqs=1, spare_tokens=3), cases)
    driver.run()
    assert driver.requests[1].num_cached_tokens >= window
