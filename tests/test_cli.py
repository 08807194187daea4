"""The command itself: version, help, and how it ends when it is interrupted or nobody reads on."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vllm_lexico import __version__, cli


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"vllm-lexico {__version__}\n"


@pytest.mark.parametrize("command", [[], ["check"], ["train"], ["inspect"], ["eval"], ["push"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    words = capsys.readouterr().out
    assert end.value.code == 0 and f"examples:\n  vllm-lexico {' '.join(command)}" in words
    assert "%%" not in words and "%(" not in words  # argparse formats the help of options, and no description


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "some/model"], "interrupted; the same command goes on from the last finished round"),
        (["check", "some/model"], "interrupted; nothing was changed"),
        (["inspect", "file"], "interrupted; nothing was changed"),
        (["eval", "m", "--data", "d", "--out", "o"], "interrupted; the same command goes on with what is not finished"),
        (["push", "file", "org/name"], "interrupted; the same command starts the upload again"),
    ],
)
def test_interrupted(command, words, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for place in ("train.train_dictionary", "inspect.load_dictionary", "push.push_dictionary"):
        monkeypatch.setattr(f"vllm_lexico.cli.{place}", interrupt)
    monkeypatch.setattr("vllm_lexico.check.source.config_folder", lambda model: None)
    monkeypatch.setattr("vllm_lexico.evals.run.run_evaluation", interrupt)
    monkeypatch.setattr("vllm_lexico.check.report.make_report", interrupt)
    assert cli.main(command) == 130
    assert words in capsys.readouterr().err


def test_sigterm_ends_as_an_interrupt_does(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("vllm_lexico.cli.train.train_dictionary", terminate)
    assert cli.main(["train", "some/model"]) == 143
    assert "terminated; the same command goes on from the last finished round" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_training_ends_with_its_parent(monkeypatch, capsys):
    """The end of standard input is the parent's end."""
    ours, theirs = os.pipe()
    read = os.read
    monkeypatch.setattr("vllm_lexico.cli.train.os.read", lambda _, count: read(ours, count))
    monkeypatch.setattr("vllm_lexico.cli.train.EXIT_SECONDS", 1e6)  # this process goes on

    def wait(*_, **__):
        threading.Timer(0.1, os.close, [theirs]).start()
        time.sleep(30)

    monkeypatch.setattr("vllm_lexico.cli.train.train_dictionary", wait)
    started = time.monotonic()
    assert cli.main(["train", "some/model", "--end-with-parent"]) == 143 and time.monotonic() - started < 20
    assert "terminated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\n  second"), "vllm-lexico: error: first second\n"),
        (ValueError("red \x1b[31m\x07 and half \ud800"), "vllm-lexico: error: red \\x1b[31m\\x07 and half \\ud800\n"),
        (OSError(28, "No space left on device", "f"), "vllm-lexico: error: [Errno 28] No space left on device: 'f'\n"),
    ],
)
def test_an_error_is_one_line_that_no_terminal_obeys(error, line, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("vllm_lexico.cli.train.train_dictionary", fail)
    assert cli.main(["train", "some/model"]) == 2
    assert capsys.readouterr().err == line


def test_a_mistyped_argument_is_not_obeyed_either(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "some/model", "\x1b[31mmore"])
    words = capsys.readouterr().err
    assert end.value.code == 2 and "unrecognized arguments: \\x1b[31mmore" in words and "\x1b" not in words


@pytest.mark.parametrize(
    ("command", "status"),
    [(["train", "some/model"], 141), (["inspect", "file"], 0), (["eval", "--report", "folder"], 0)],
)
def test_a_reader_that_goes_away_ends_what_is_not_done_with_a_status(command, status, monkeypatch, capsys):
    def prints(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("vllm_lexico.cli.train.train_dictionary", prints)
    monkeypatch.setattr("vllm_lexico.cli.inspect.load_dictionary", prints)
    monkeypatch.setattr("vllm_lexico.cli.eval.report", prints, raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    if command[0] == "eval":
        monkeypatch.setattr("vllm_lexico.cli.eval.run", prints)
    assert cli.main(command) == status
    assert ("nobody reads what it prints any more; " in capsys.readouterr().err) == bool(status)


def test_as_a_module_with_a_reader_that_has_seen_enough(root):
    path = root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors"
    command = [sys.executable, "-P", "-u", "-m", "vllm_lexico.cli", "inspect", str(path), "--no-plot"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
