"""What is shown of an evaluation that runs: lines in a log, a bar on a terminal."""

import sys

import pytest

from vllm_lexico.evals.bar import Bar, Position


@pytest.fixture
def now():
    """Seconds that the clock of a bar shows, in a list."""
    return [100.0]


def test_a_log_has_a_line_at_each_step_and_every_half_minute(now, capsys):
    def line():
        return capsys.readouterr().err

    with Bar(4, 1, clock=lambda: now[0]) as bar:
        bar.show([Position("bf16 starts")])
        assert line() == "1 of 4 results; bf16 starts; 0 s gone\n"
        now[0] = 129.5
        bar.show([Position("bf16 starts")])
        assert line() == ""
        now[0] = 130
        bar.show([Position("bf16 starts")])
        assert line() == "1 of 4 results; bf16 starts; 30 s gone\n"
        bar.show([Position("bf16 gsm8k", "0/20")])
        assert line() == "1 of 4 results; bf16 gsm8k 0/20; 30 s gone\n"
        for now[0], count in ((140, 3), (150, 9), (159.5, 12)):
            bar.show([Position("bf16 gsm8k", f"{count}/20")])
        assert line() == ""
        now[0] = 160
        bar.show([Position("bf16 gsm8k", "13/20"), Position("fp8 starts")])
        assert line() == "1 of 4 results; bf16 gsm8k 13/20; fp8 starts; 60 s gone\n"
        now[0] = 170
        bar.update(1)
        bar.show([Position("fp8 starts")])
        assert line() == "2 of 4 results; fp8 starts; 70 s gone, about 2 min left\n"
        bar.update(2)
        bar.show([])
        bar.show([])
        assert line() == "4 of 4 results; 70 s gone\n"
    assert line() == ""


def test_a_terminal_has_a_bar(monkeypatch, now, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar(4, 1, clock=lambda: now[0]) as bar:
        bar.update(2)
        bar.show([Position("bf16 gsm8k", "7/20")])
    shown = capsys.readouterr().err
    assert "3/4" in shown and "bf16 gsm8k 7/20" in shown and "\r" in shown and "gone" not in shown
