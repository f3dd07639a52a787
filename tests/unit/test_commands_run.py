"""Ctrl-C while a study runs."""

import signal
import sys
import threading
import time
import weakref

import pytest

from fedmed.commands.run import listening


@pytest.fixture(autouse=True)
def handlers():
    """Give the signals back: after a request they stay ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Thing:
    """Something that can be referred to weakly."""


def ask() -> None:
    signal.raise_signal(signal.SIGINT)


def test_one_ctrl_c_asks_and_raises_nothing(capsys):
    with listening() as request:
        assert not request()
        ask()
        assert request()
    assert "press Ctrl-C again" in capsys.readouterr().err


def test_a_second_ctrl_c_raises():
    with listening():
        ask()
        with pytest.raises(KeyboardInterrupt):
            ask()


def test_a_second_ctrl_c_counts_where_python_drops_what_is_raised(capsys):
    """In a weakref's callback or a destructor an exception is printed and forgotten."""
    things = [Thing()]
    watch = weakref.ref(things[0], lambda _: ask())
    with listening():
        ask()
        things.clear()  # the second Ctrl-C falls into the callback
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5.0)
    assert watch() is None
    assert "Traceback" not in capsys.readouterr().err


def test_it_counts_also_if_it_comes_again_while_it_is_dealt_with(monkeypatch, capsys):
    """On a busy machine the thread that repeats it starts slowly."""
    start = threading.Timer.start
    late = []

    def start_slowly(timer):
        start(timer)
        if len(late) < 2:
            late.append(timer)
            timer.join(5.0)  # the signal is there before the hook is left
            time.sleep(0.05)

    monkeypatch.setattr(threading.Timer, "start", start_slowly)
    things = [Thing()]
    watch = weakref.ref(things[0], lambda _: ask())
    with listening():
        ask()
        things.clear()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5.0)
    assert watch() is None
    assert len(late) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_signals_and_the_hook_are_given_back():
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    with listening():
        assert sys.unraisablehook is not hook
    assert sys.unraisablehook is hook
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_on_the_way_out_of_an_asked_stop_is_ignored():
    with listening():
        ask()
    ask()
    signal.raise_signal(signal.SIGTERM)
