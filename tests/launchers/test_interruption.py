import os
import signal
import subprocess
import sys

import pytest

from launchers import interruption
from launchers.interruption import Interrupted, held_back, noted, signals_raise


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_raises_with_the_exit_code_that_a_shell_reports(signum: int, code: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught, signals_raise():
        os.kill(os.getpid(), signum)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt)  # so the MLflow run is KILLED
    assert signal.getsignal(signum) is before


def test_a_signal_that_nobody_looked_at_is_raised_when_the_work_is_done() -> None:
    done = False
    with pytest.raises(Interrupted, match="SIGTERM"), signals_raise(), noted():
        os.kill(os.getpid(), signal.SIGTERM)
        done = True
    assert done


def test_work_that_can_end_in_good_order_is_told_of_the_first_signal_and_cut_by_the_second() -> (
    None
):
    with signals_raise():
        with pytest.raises(Interrupted, match="SIGTERM"), noted() as notice:
            notice.raise_it()
            os.kill(os.getpid(), signal.SIGTERM)
            assert notice.signum == signal.SIGTERM
            with pytest.raises(Interrupted, match="SIGTERM"):
                notice.raise_it()
            with pytest.raises(Interrupted, match="SIGINT"):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_program_that_has_ended_in_order_leaves_with_its_lines_and_without_exit_handlers() -> (
    None
):
    program = (
        "import atexit; from launchers.interruption import Ended\n"
        "atexit.register(print, 'handler'); print('line')\n"
        "try: raise Ended(130)\n"
        "except Ended as ended: ended.leave()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"line\n", b"")


def test_a_handler_of_a_librarys_is_replaced() -> None:
    with signals_raise():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interruption.take_signals_back()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    interruption.take_signals_back()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("signum", interruption.SIGNALS)
def test_a_library_that_starts_neither_takes_a_signal_nor_is_cut_by_it(signum: int) -> None:
    done = False
    with pytest.raises(Interrupted) as caught, signals_raise(), held_back():
        signal.signal(signum, lambda *_: sys.exit(15))
        os.kill(os.getpid(), signum)
        done = True
    assert done
    assert caught.value.signum == signum


def test_what_a_library_raises_after_a_signal_is_its_consequence() -> None:
    with signals_raise():
        with pytest.raises(Interrupted, match="SIGTERM"), held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                os.kill(os.getpid(), signal.SIGINT)  # a second one
            except Interrupted:
                raise AttributeError("partially initialized module") from None
        with pytest.raises(AttributeError), held_back():
            raise AttributeError("a mistake")


def test_a_librarys_handlers_are_its_own_where_we_have_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with held_back():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
