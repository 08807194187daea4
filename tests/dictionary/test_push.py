"""Sharing a dictionary: pushed to a stand-in for the Hugging Face hub and loaded from it, by processes of their own."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean

import pytest
import torch

from vllm_lexico import cli
from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.push import model_card

TOKEN, COMMIT = "hf_stand_in", "c" * 40


class StandIn(ThreadingHTTPServer):
    """As much of the hub as is needed to make a repository, commit to it (LFS for .safetensors) and download."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.private, self.files, self.uploads = {}, {}, {}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: StandIn

    def log_message(self, *args):
        pass

    def answer(self, content=b"", status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.lstrip("/").replace(f"/resolve/{COMMIT}/", "/resolve/main/")
        repo, _, file = path.partition("/resolve/main/")
        info = self.path.removeprefix("/api/models/")
        if info in self.server.private:
            self.answer({"id": info, "private": self.server.private[info], "sha": COMMIT, "siblings": [], "tags": []})
        elif (repo, file) in self.server.files:
            content = self.server.files[repo, file]
            self.answer(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self):
        self.server.uploads[self.path.removeprefix("/upload/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self.create(json.loads(content))
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(content)["files"]]
            of_files = [
                {"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False} for p in files
            ]
            self.answer({"files": of_files})
        elif self.path.endswith("/lfs/objects/batch"):
            upload = {"href": f"{self.server.address}/upload/"}
            objects = json.loads(content)["objects"]
            for item in objects:
                item["actions"] = {"upload": upload | {"href": upload["href"] + item["oid"]}}
            self.answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/json"})
        elif "/commit/" in self.path:
            self.commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], content)
        else:
            self.answer(status=501)

    def create(self, wanted):
        repo = f"{wanted['organization']}/{wanted['name']}"
        existed = repo in self.server.private
        self.server.private.setdefault(repo, wanted.get("visibility") == "private")
        self.answer({"url": f"{self.server.address}/{repo}", "id": repo}, 409 if existed else 200)

    def commit(self, repo, content):
        for line in map(json.loads, content.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repo, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repo, value["path"]] = self.server.uploads[value["oid"]]
        self.answer({"commitUrl": f"{self.server.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})


@pytest.fixture
def hub():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def in_process(hub, tmp_path):
    """Run Python against the stand-in with an empty cache of its own; the hub's client reads its settings at import."""

    def run(*arguments: str, cache: str = "one", token: str = TOKEN, **more: str) -> subprocess.CompletedProcess:
        unset = {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}
        env = {name: value for name, value in os.environ.items() if name not in unset}
        env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / cache), "XDG_CACHE_HOME": str(tmp_path / cache)}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        env |= ({"HF_TOKEN": token} if token else {}) | more
        return subprocess.run([sys.executable, "-P", *arguments], env=env, capture_output=True, text=True, timeout=100)

    return run


@pytest.fixture(scope="module")
def dictionary(root) -> Dictionary:
    """A real one under another name, so that no search finds a bundled twin first."""
    bundled = load_dictionary(root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors")
    fingerprint = replace(bundled.info.fingerprint, hidden_size=577)
    return Dictionary(replace(bundled.info, model_name="some/Model-1", fingerprint=fingerprint), bundled.tensors)


PUSH = """
import json, os, sys
from vllm_lexico import cli
for token, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    print("status", cli.main(["push", *arguments]), flush=True)
    print("next", file=sys.stderr, flush=True)
"""

FIND = """
import json, sys
from pathlib import Path
from vllm_lexico.dictionary import search
from vllm_lexico.dictionary.file import read_info
info = read_info(Path(sys.argv[1]))
listed = {"repository": "vllm-lexico/some_Model-1", "revision": "c" * 40}
for setting in ("me/shared", "me/shared/dictionary.safetensors", None):
    print(search.find_dictionary(setting, info.model_name, info.fingerprint))
    search._listed_on_hub = lambda: {info.model_name: listed}
"""

FIND_ONE = """
from vllm_lexico.dictionary.search import find_dictionary
print(find_dictionary("me/shared", "some/Model-1", None))
"""


def test_pushed_and_loaded_again(hub, in_process, dictionary, tmp_path):
    path, local = tmp_path / "mine.safetensors", tmp_path / "local.safetensors"
    dictionary.save(path)
    replace(dictionary, info=replace(dictionary.info, model_name="/home/me/tiny")).save(local)
    hub.private["me/open"] = hub.private["me/model"] = False
    hub.files["me/model", "config.json"] = b"{}"
    refused = [["hf_wrong", str(path), "me/wrong"], [TOKEN, str(path), "me/open", "--private"]]
    refused.append([TOKEN, str(path), "me/model"])
    repos = ["me/shared", "vllm-lexico/some_Model-1"]
    commands = [[TOKEN, str(path), repo] for repo in repos]
    commands += [[TOKEN, str(local), "me/tiny"], [TOKEN, str(path), "me/secret", "--private"]]
    pushed = in_process("-c", PUSH, json.dumps(refused + commands))  # in one process, whose start takes seconds
    assert pushed.returncode == 0 and "Traceback" not in pushed.stderr, pushed.stderr
    assert re.findall(r"status (\d)", pushed.stdout) == ["2", "2", "2", "0", "0", "0", "0"]
    errors = pushed.stderr.split("next\n")
    assert "could not be pushed to me/wrong" in errors[0] and "me/wrong" not in hub.private
    assert "me/open exists and is public, so nothing was pushed" in errors[1]
    assert not [repo for repo, _ in hub.files if repo == "me/open"]
    assert "me/model holds a model" in errors[2] and "as in me/model-lexico" in errors[2]
    assert [file for repo, file in hub.files if repo == "me/model"] == ["config.json"]
    assert f"pushed to {hub.address}/me/shared" in pushed.stdout
    for repo in repos:
        assert not hub.private[repo] and hub.files[repo, "README.md"].startswith(b"---\nlibrary_name: vllm-lexico\n")
        assert hub.files[repo, "dictionary.safetensors"] == path.read_bytes()
    assert hub.private["me/secret"] and ("me/secret", "README.md") in hub.files
    (tmp_path / "tiny.safetensors").write_bytes(hub.files["me/tiny", "dictionary.safetensors"])
    assert load_dictionary(tmp_path / "tiny.safetensors").info.model_name == "tiny"
    assert not any(b"/home/me" in content for content in hub.files.values())
    found = in_process("-c", FIND, str(path), cache="fresh", token="")
    assert found.returncode == 0, found.stderr
    paths = found.stdout.split()
    assert len(paths) == 3 and "some_Model-1" in paths[2]
    for file in paths:
        assert f"{os.sep}fresh{os.sep}" in file and COMMIT in file
        loaded = load_dictionary(file)
        assert loaded.info == dictionary.info
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in dictionary.tensors.items())


def test_offline_the_cache_answers_and_nothing_is_pushed(hub, in_process, dictionary, tmp_path):
    path = tmp_path / "mine.safetensors"
    dictionary.save(path)
    assert in_process("-c", PUSH, json.dumps([[TOKEN, str(path), "me/shared"]])).returncode == 0
    online = in_process("-c", FIND_ONE, cache="fresh")
    hub.files.clear()
    offline = in_process("-c", FIND_ONE, cache="fresh", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout and "fresh" in offline.stdout, offline.stderr
    pushed = in_process("-c", PUSH, json.dumps([[TOKEN, str(path), "me/other"]]), HF_HUB_OFFLINE="1")
    assert "cannot be pushed while HF_HUB_OFFLINE is set; unset it" in pushed.stderr and "me/other" not in hub.private


def test_the_projects_own_repository_is_named_after_the_model(hub, in_process, dictionary, tmp_path, capsys):
    path, local = tmp_path / "mine.safetensors", tmp_path / "local.safetensors"
    dictionary.save(path)
    pushed = in_process("-c", PUSH, json.dumps([[TOKEN, str(path)]]))
    assert '"dictionary": "vllm-lexico/some_Model-1"' in pushed.stdout, pushed.stderr
    assert b"base_model: some/Model-1" in hub.files["vllm-lexico/some_Model-1", "README.md"]
    replace(dictionary, info=replace(dictionary.info, model_name="/home/me/tiny")).save(local)
    assert cli.main(["push", str(local)]) == 2
    assert "no model's id on the hub that a repository could be named after" in capsys.readouterr().err


def test_no_token(dictionary, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    dictionary.save(tmp_path / "mine.safetensors")
    assert cli.main(["push", str(tmp_path / "mine.safetensors"), "me/shared"]) == 2
    assert "there is no Hugging Face token; log in with `hf auth login`" in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["name", "org/name/file", "https://huggingface.co/org/name", "a b/c", ""])
def test_names_that_are_no_repository(repo, root, capsys):
    path = root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors"
    assert cli.main(["push", str(path), repo]) == 2
    assert f"{repo!r} is no name of a repository on the hub; allowed: org/name" in capsys.readouterr().err


def test_a_damaged_file_is_not_pushed(dictionary, tmp_path, capsys):
    path = tmp_path / "d.safetensors"
    dictionary.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["push", str(path), "me/shared"]) == 2
    assert "is damaged, cut short" in capsys.readouterr().err


def test_model_card(dictionary):
    card = model_card(dictionary.info, "me/shared")
    assert "\nbase_model: some/Model-1\n" in card
    assert "| atoms per vector | keys | values |\n|---|---|---|\n| 7 | " in card
    means = [fmean(dictionary.info.errors[part]["15"]) for part in ("key", "value")]
    assert "\n| 15 | {:.4f} | {:.4f} |\n".format(*means) in card
    assert (
        """--attention-backend LEXICO \\\n        --additional-config '{"lexico": {"dictionary": "me/shared"}}'"""
        in card
    )
    recipe = {"passes": 8, "own_text": {"writer": "vLLM 0.33", "tokens": {"chat": 90_000, "code": 70}}}
    made = model_card(replace(dictionary.info, recipe=recipe), "me/shared")
    assert "\n- passes: 8\n- own text: writer vLLM 0.33, tokens (chat 90,000, code 70)\n" in made
    assert "\n    vllm-lexico train some/Model-1 --continue-from dictionary.safetensors --data MY-TEXTS\n" in made
    local = model_card(replace(dictionary.info, model_name="/home/me/tiny", errors={}), "me/shared")
    assert "base_model" not in local and "/home/me" not in local and "It was not measured." in local
