"""Building one step ahead."""

import threading

import pytest

from trainer.data.prefetch import Prefetcher


def test_steps_come_in_the_order_asked_for() -> None:
    with Prefetcher(lambda step: step * step) as ahead:
        assert [ahead.get(step) for step in (3, 4, 5, 9, 2, 3)] == [9, 16, 25, 81, 4, 9]


def test_the_next_step_is_built_while_this_one_runs() -> None:
    built = {step: threading.Event() for step in range(3)}
    with Prefetcher(lambda step: built[step].set(), stop=3) as ahead:
        ahead.get(0)
        assert built[1].wait(10)
        assert not built[2].is_set()


def test_nothing_behind_the_stop_is_built() -> None:
    asked: list[int] = []
    with Prefetcher(asked.append, stop=2) as ahead:
        ahead.get(0)
        ahead.get(1)
    assert asked == [0, 1]


def test_a_step_that_is_not_decided_yet_is_built_when_it_is_asked_for() -> None:
    asked: list[int] = []
    decided = threading.Event()

    def build(step: int) -> None:
        asked.append(step)
        if step == 2:
            assert decided.is_set()

    with Prefetcher(build, stop=4, undecided=lambda step: step == 2) as ahead:
        for step in range(4):
            if step == 2:
                ahead._thread.submit(lambda: None).result()  # type: ignore[union-attr]  # the thread is idle
                assert asked == [0, 1]
                decided.set()
            ahead.get(step)
    assert asked == [0, 1, 2, 3]


def test_an_error_appears_at_its_own_step() -> None:
    def build(step: int) -> int:
        if step == 1:
            raise ValueError("step 1 cannot be read")
        return step

    with Prefetcher(build) as ahead:
        assert ahead.get(0) == 0
        with pytest.raises(ValueError, match="step 1 cannot be read"):
            ahead.get(1)
        assert ahead.get(2) == 2


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    ahead = Prefetcher(lambda step: step)
    ahead.get(0)
    ahead.close()
    assert threading.active_count() == before
