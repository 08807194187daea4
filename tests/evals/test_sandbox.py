"""Programs that hang, fork, write, eat memory or lie do no harm, whichever of the sandbox's layers stops them."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_lexico.evals.sandbox import child, run
from vllm_lexico.evals.sandbox.run import Limits, find_layers, run_program

MIB = 1 << 20
# The guard alone and the kernel alone have to hold what they name; layers that a system lacks are skipped.
ALONE = {"guard": {"namespaces": False}, "kernel": {"guard": False}, "limits": {"guard": False, "namespaces": False}}


@pytest.fixture(scope="module")
def layers():
    return find_layers().names


def tried(action):
    """A program that passes where `action` could be done."""
    return f"import os, signal, sys, threading, time\n{action}"


def test_right_and_wrong_programs():
    program = "import heapq, math\nfrom collections import Counter\ndef double(x):\n    return 2 * x"
    assert run_program(program, ["", "assert double(2) == 4", "assert double(0) == 0"]).passed
    for wrong, tests, reason in (
        (program, ["assert double(2) == 5"], "AssertionError"),
        (program, ["assert triple(2) == 6"], "NameError"),
        ("def f(:", ["assert True"], "SyntaxError"),
        ("def f(n):\n    return f(n + 1)", ["f(0)"], "RecursionError"),
        ("x = input()", [], "EOFError"),
    ):
        outcome = run_program(wrong, tests)
        assert not outcome.passed and outcome.reason == reason


def test_programs_share_nothing():
    """Not the module, not the file system, not the environment; but sets come in the same order every time."""
    assert run_program("import builtins\nbuiltins.seen = 1", []).passed
    assert run_program("try:\n    seen\nexcept NameError:\n    pass\nelse:\n    raise ValueError", []).passed
    allowed = ["HOME", "LANG", "LC_CTYPE", "PATH", "PYTHONHASHSEED", "TMPDIR"]
    os.environ["SECRET"] = "secret"
    try:
        assert run_program(f"import os\nassert set(os.environ) <= set({allowed}), sorted(os.environ)", []).passed
    finally:
        del os.environ["SECRET"]
    order = "x = list({'one', 'two', 'three', 'four', 'five', 'six'})"
    words = ("one", "two", "three", "four", "five", "six")
    first = next(word for word in words if run_program(order, [f"assert x[0] == '{word}'"]).passed)
    assert all(run_program(order, [f"assert x[0] == '{first}'"]).passed for _ in range(3))


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "os.abort()", "os.write(5, b'{}'); os._exit(0)"])
def test_a_program_that_ends_by_itself_has_not_passed(end):
    assert not run_program(tried(end), ["assert False"], Limits(cpu_seconds=2)).passed


def test_a_program_that_says_much_costs_no_memory():
    write = "try:\n        while True: os.write(fd, b'x' * 65536)\n    except OSError: pass"
    flood = f"import os\nfor fd in range(3, 20):\n    {write}"
    started = time.monotonic()
    assert not run_program(flood, [], Limits(cpu_seconds=20, seconds=60)).passed
    assert time.monotonic() - started < 50  # not the limit: what it said was too much


@pytest.mark.parametrize("way", ALONE)
def test_a_program_that_computes_for_ever_is_ended_by_the_processor_s_clock(way):
    outcome = run_program("while True: pass", [], Limits(cpu_seconds=1, seconds=120), **ALONE[way])
    assert outcome.reason == "ended without a verdict"


@pytest.mark.parametrize("way", ALONE)
def test_a_program_that_sleeps_is_ended_by_the_wall_s_and_nothing_of_it_is_left(way, tmp_path, monkeypatch):
    path = tmp_path / "child-of-this-test.py"
    path.write_text(Path(child.__file__).read_text())
    monkeypatch.setattr(run, "CHILD", path)
    tmp_path.chmod(0o755)
    outcome = run_program(tried("time.sleep(600)"), [], Limits(seconds=5), **ALONE[way])
    assert outcome.reason == "took more than 5 s"
    until = time.monotonic() + 20
    while time.monotonic() < until and str(path) in processes():
        time.sleep(0.1)
    assert str(path) not in processes()


RUNNING = """
    import signal, sys
    from pathlib import Path
    from vllm_lexico.evals.sandbox import run
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run.CHILD = Path(sys.argv[1])
    run.run_program("import time; time.sleep(600)", [], namespaces=sys.argv[2] == "kernel")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("way", ["kernel", "guard"])
def test_a_program_ends_with_what_started_it(way, number, tmp_path):
    """Both processes of it, and its folder too where what started it was not killed."""
    path = tmp_path / "child-of-this-test.py"
    path.write_text(Path(child.__file__).read_text())
    tmp_path.chmod(0o755)
    command = [sys.executable, "-P", "-c", textwrap.dedent(RUNNING), str(path), way]
    parent = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, start_new_session=True)
    try:
        assert wait_for(lambda: f"-B {path}" in processes())
        time.sleep(1)  # until it sleeps
        assert list(tmp_path.glob("vllm-lexico-program-*"))
    finally:
        parent.send_signal(number)
        parent.wait()
    assert wait_for(lambda: f"-B {path}" not in processes())
    if number == signal.SIGTERM:
        assert not list(tmp_path.glob("vllm-lexico-program-*"))


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


def processes():
    return subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("way", ALONE)
def test_memory_is_limited(way):
    outcome = run_program(f"x = bytearray({512 * MIB})", [], Limits(memory_bytes=256 * MIB), **ALONE[way])
    assert outcome.reason == "MemoryError"
    assert run_program(f"x = bytearray({64 * MIB})", [], Limits(memory_bytes=256 * MIB), **ALONE[way]).passed


@pytest.mark.parametrize("way", ALONE)
@pytest.mark.parametrize(
    "start",
    ["os.fork()", "import subprocess; subprocess.run(['/bin/true'])", "os.posix_spawn('/bin/true', ['true'], {})"],
)
def test_no_program_starts_another_process(start, way, layers):
    if "user" not in layers and way != "guard":
        pytest.skip("root that cannot be another user has no limit of processes")
    outcome = run_program(tried(start), [], **ALONE[way])
    refused = "PermissionError" if way == "guard" else "BlockingIOError"
    assert outcome.reason in (refused, "ModuleNotFoundError")  # the latter where another user cannot read Python


def test_no_program_starts_a_thread():
    assert run_program(tried("threading.Thread(target=print).start()"), []).reason == "RuntimeError"


WRITES = [
    "open('{place}/new', 'w').close()",
    "os.close(os.open('{place}/new', os.O_WRONLY | os.O_CREAT))",
    "os.mkdir('{place}/folder')",
    "os.symlink('a', '{place}/link')",
    "os.chmod('{place}/own', 0o777)",
    "os.truncate('{place}/kept', 0)",
    "os.rename('{place}/kept', '{place}/gone')",
    "os.remove('{place}/gone')",
]


@pytest.fixture
def shared_folder():
    """A folder that everyone may write in, with a file for everyone."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o777)
        for name in ("kept", "own"):
            (place / name).write_text("kept")
            (place / name).chmod(0o666)
        if os.geteuid() == 0:
            os.chown(place / "own", child.NOBODY, child.NOBODY)
        yield place


@pytest.mark.parametrize("way", ALONE)
def test_nothing_is_written_renamed_or_deleted_outside_the_folder(way, shared_folder, layers):
    """By Python alone, and by the kernel alone; without both each of these can be done."""
    if way == "kernel" and "files" not in layers:
        pytest.skip("this system lets no user have a file system")
    (shared_folder / "gone").write_text("kept")
    program = f"""import os
done = []
for write in {[write.format(place=shared_folder) for write in WRITES]}:
    try:
        exec(write)
        done.append(write)
    except OSError:
        pass
raise type(f"Done{{len(done)}}", (Exception,), {{}})"""
    done = run_program(program, [], **ALONE[way]).reason
    if way == "limits":
        assert done == f"Done{len(WRITES)}"
    else:
        assert done == "Done0" and sorted(path.name for path in shared_folder.iterdir()) == ["gone", "kept", "own"]
        assert (shared_folder / "kept").read_text() == "kept"


def test_the_folder_takes_little_and_is_gone_afterwards(layers):
    if "files" not in layers:
        pytest.skip("this system lets no user have a file system")
    before = set(Path("/tmp").glob("vllm-lexico-program-*"))
    assert run_program("open('x', 'w').write('x' * 1000)", ["assert open('x').read() == 'x' * 1000"]).passed
    assert run_program(f"open('x', 'w').write('x' * {2 * MIB})", []).reason == "OSError"  # a file
    assert run_program(f"for i in range(8): open(str(i), 'w').write('x' * {MIB})", []).reason == "OSError"  # all files
    assert run_program("for i in range(1000): open(str(i), 'w')", []).reason == "OSError"  # empty ones
    assert set(Path("/tmp").glob("vllm-lexico-program-*")) <= before
    assert run_program("open('x', 'w').write('x')", [], guard=False, namespaces=False).reason in ("", "OSError")
    assert run_program("f = open('x', 'w')\nf.write('x')\nf.flush()", [], **ALONE["limits"]).reason == "OSError"


def test_no_network(layers):
    assert run_program("import socket\nsocket.socket()", []).reason in ("PermissionError", "ModuleNotFoundError")
    if "network" not in layers:
        pytest.skip("this system lets no user have a network")
    there = Path("/proc/self/net/dev").read_text().count(":")
    count = "lines = open('/proc/self/net/dev').read().count(':')"
    assert run_program(count, ["assert lines == 1"], guard=False).passed  # the loopback, which is down
    assert run_program(count, [f"assert lines == {there}"], guard=False, namespaces=False).passed


@pytest.mark.parametrize("way", ["guard", "kernel"])
def test_no_other_process_is_signalled(way, layers):
    if way == "kernel" and not layers & {"processes", "user"}:
        pytest.skip("this system has neither namespaces nor another user")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        outcome = run_program(tried(f"os.kill({victim.pid}, signal.SIGKILL)"), [], **ALONE[way])
        assert outcome.reason in ("PermissionError", "ProcessLookupError")
        time.sleep(0.2)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_what_a_system_lacks_is_said(monkeypatch):
    real = run.run_program
    monkeypatch.setattr(run, "run_program", lambda *args: real(*args, namespaces=False))
    found = find_layers()
    assert not found.names & {"network", "files", "processes"} and {"limits", "guard"} <= found.names
    said = " ".join(found.missing())
    assert "without a network namespace" in said and "without a file system of their own" in said
    assert run.Layers(frozenset({"network", "files", "user"})).missing() == []


def test_root_of_a_namespace_that_has_no_other_user_runs_programs():
    unshare = ["unshare", "-r", sys.executable, "-P", "-c"]
    if os.geteuid() or subprocess.run(["unshare", "-r", "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user have a namespace")
    program = "open('x', 'w').write('x')\nassert open('x').read() == 'x'"
    code = f"from vllm_lexico.evals.sandbox.run import *; x = find_layers(); o = run_program({program!r}, []); "
    check = "assert 'user' not in x.names and (o.passed or 'files' not in x.names), o"
    subprocess.run([*unshare, code + check], check=True)


def test_a_sandbox_that_does_not_run_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "child.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(run, "CHILD", tmp_path / "child.py")
    with pytest.raises(RuntimeError, match="does not run in the sandbox here: ended without a verdict"):
        find_layers()


@pytest.mark.parametrize("refused", [True, False])
def test_namespaces_without_a_user_are_not_entered(refused, tmp_path, monkeypatch):
    """As AppArmor has it on Ubuntu: a user may enter them, and may then map nobody there."""

    class Place:
        def __init__(self, *names):
            self.path = tmp_path / names[-1]

        def write_text(self, words, encoding):
            if refused:
                raise PermissionError(1, "Operation not permitted")
            self.path.write_text(words, encoding=encoding)

    monkeypatch.setattr(child, "Path", Place)
    monkeypatch.setattr(child.os, "geteuid", lambda: 1000)
    libc = SimpleNamespace(unshare=lambda flags: 0)
    assert child.may_unshare(libc) != refused
    assert child.may_unshare(SimpleNamespace(unshare=lambda flags: -1)) is False
    assert (tmp_path / "uid_map").exists() != refused
