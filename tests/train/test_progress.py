"""How far a run is and what is left: told from what was measured, on a terminal and in a log."""

import io

import pytest

from vllm_lexico.train import progress as module
from vllm_lexico.train.progress import Progress, Stage, in_words


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def two_rounds(clock, **more) -> Progress:
    stages = [Stage("read", "reading 1", 100, 1.0), Stage("learn", "learning 1", 50, 1.0)]
    stages += [Stage("read", "reading 2", 200, 1.0), Stage("learn", "learning 2", 50, 1.0)]
    return Progress(stages, clock=clock, started=clock.now, **more)


def test_time_left_is_guessed_then_measured(clock):
    progress = two_rounds(clock, shown=False)
    assert progress.left() == 400 and progress.share() == 0
    with progress.stage("read"):
        clock.now += 5
        progress.advance(5)  # too little to be believed
        assert progress.left() == 395
        clock.now += 5
        progress.advance(15)  # 0.5 s for each of the 80 that are left
        assert progress.left() == pytest.approx(40 + 50 + 200 + 50)
        clock.now += 40
    assert progress.left() == pytest.approx(50 + 200 * 0.5 + 50)  # as the round before
    assert progress.share() == pytest.approx(50 / 250)


def test_the_share_never_falls(clock):
    progress = two_rounds(clock, shown=False)
    with progress.stage("read"):
        clock.now += 100
        progress.advance(100)
    before = progress.share()
    with progress.stage("learn"):
        clock.now += 1000  # far slower than thought
        progress.advance(10)
        assert progress.share() >= before


def test_what_is_skipped_and_what_comes_instead(clock):
    progress = two_rounds(clock, shown=False)
    with progress.stage("read"):
        clock.now += 100
    progress.skip("learn", 1)
    assert [stage.words for stage in progress.stages] == ["reading 1", "reading 2", "learning 2"]
    progress.plan([Stage("finish", "measuring", 10, 2.0)])
    assert [stage.words for stage in progress.stages] == ["reading 1", "measuring"] and progress.left() == 20


def test_an_interrupted_stage_has_not_ended(clock):
    progress = two_rounds(clock, shown=False)
    with pytest.raises(KeyboardInterrupt), progress.stage("read"):
        raise KeyboardInterrupt
    assert not progress.stages[0].ended


def test_a_log_has_a_line_at_every_stage_and_now_and_then(clock, monkeypatch, capsys):
    monkeypatch.setattr(module, "LOG_SECONDS", 30.0)
    progress = two_rounds(clock)
    with progress.stage("read"):
        for _ in range(100):
            clock.now += 1
            progress.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  0 %  reading 1; 0 s gone, about 7 min left"
    assert lines[1] == "  8 %  reading 1; 30 s gone, about 6 min left"
    assert len(lines) == 4 and not any("\r" in line for line in lines)


def test_details_are_told_where_they_are_wanted(clock, capsys):
    for verbose, words in ((False, "mean\n"), (True, "layer 3\nmean\n")):
        progress = two_rounds(clock, verbose=verbose)
        progress.say("layer 3", detail=True)
        progress.say("mean")
        assert capsys.readouterr().out == words
    two_rounds(clock, shown=False).say("of another device")
    assert not capsys.readouterr().out


def test_a_terminal_has_one_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(module.sys, "stderr", screen)
    progress = two_rounds(clock)
    with progress.stage("read"):
        clock.now += 20
        progress.advance(20)
    progress.close()
    shown = screen.getvalue()
    assert "reading 1" in shown and "5%|" in shown and "about 6 min left" in shown and "\n" not in shown.strip()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")]
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words
