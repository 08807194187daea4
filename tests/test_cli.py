"""The command itself: version, help, and how it ends when it is interrupted or nobody reads on."""

import subprocess
import sys

import pytest

from vllm_lexico import __version__, cli


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"vllm-lexico {__version__}\n"


@pytest.mark.parametrize("command", [[], ["train"], ["inspect"], ["eval"], ["push"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    words = capsys.readouterr().out
    assert end.value.code == 0 and f"examples:\n  vllm-lexico {' '.join(command)}" in words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "some/model"], "interrupted; the same command goes on from the last finished round"),
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
    monkeypatch.setattr("vllm_lexico.evals.run.run_evaluation", interrupt)
    assert cli.main(command) == 130
    assert words in capsys.readouterr().err


def test_as_a_module_with_a_reader_that_has_seen_enough(root):
    path = root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors"
    command = [sys.executable, "-P", "-u", "-m", "vllm_lexico.cli", "inspect", str(path), "--no-plot"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
