from __future__ import annotations

import os
import signal
import threading

import pytest

from iexact_runner.runs.interrupts import Interrupts


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def sent(request):
    previous = signal.signal(request.param, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), request.param)
    signal.signal(request.param, previous)


def test_first_waits_and_second_does_not(sent):
    with Interrupts() as interrupts:
        interrupts.wait = True
        sent()
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt):
            sent()


def test_nothing_to_wait_for(sent):
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            sent()
        assert interrupts.pending


def test_while_a_file_is_written_all_wait(sent):
    with Interrupts() as interrupts:
        with interrupts.held():
            for _ in range(3):
                sent()
        assert interrupts.pending
        with pytest.raises(KeyboardInterrupt):
            sent()


def test_handlers_are_as_before_afterwards(sent):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) != before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_of_others_are_left_alone():
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [1] and not interrupts.pending
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_other_threads_change_nothing():
    before, errors = signal.getsignal(signal.SIGINT), []

    def enters():
        with Interrupts():
            errors.append(signal.getsignal(signal.SIGINT) is not before)

    thread = threading.Thread(target=enters)
    thread.start()
    thread.join()
    assert errors == [False]
