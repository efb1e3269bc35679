"""Signals are noted, told once, and given back; a second ^C is not waited for."""

import os
import signal
import subprocess
import sys

import pytest
from steptron.train.signals import NAMES, Signals


@pytest.mark.parametrize("name", NAMES)
def test_each_is_noted_by_name_and_what_was_before_comes_back(name: str, capfd: pytest.CaptureFixture[str]):
    before = signal.getsignal(getattr(signal, name))
    with Signals() as signals:
        assert signals.came == [0, 0, 0]
        os.kill(os.getpid(), getattr(signal, name))
        assert signals.came == [int(name == one) for one in NAMES]
        if name != "SIGINT":
            os.kill(os.getpid(), getattr(signal, name))
            assert signals.came == [int(name == one) for one in NAMES], "once, however often it came"
    assert signal.getsignal(getattr(signal, name)) is before
    assert capfd.readouterr().err.count(f"{name}: the run saves and ends after this step") == 1


def test_only_rank_0_tells(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.came == [1, 0, 0]
    assert capfd.readouterr().err == ""


TWICE = """
import os, signal
from steptron.train.signals import Signals
with Signals():
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not here", flush=True)
"""


def test_a_second_interrupt_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.stdout == "still here\n"
    assert done.returncode == -signal.SIGINT
