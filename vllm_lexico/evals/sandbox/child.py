"""The process that a program runs in: a job comes on standard input, the verdict goes to its output.

It takes from itself what a program could do harm with, and only then runs it. A file of its own that imports nothing of
this package, since the process has no site-packages. Layers, from the kernel's to Python's:

  limits      processor seconds, memory, sizes of files, open files, no core dumps, no further processes or threads
  network     a network namespace without any interface
  files       a mount namespace in which everything is read-only but the folder, which is a small file system in memory
  processes   a process namespace, in which no other process can be seen or signalled
  user        another user than root, without capabilities
  guard       an audit hook, which refuses to start processes, signal them, open sockets, and load libraries; where the
              layer `files` is missing, also to write, rename and delete

Namespaces are had by root, and by others where the system lets a user have namespaces of its own. The guard stops what
a model writes by mistake; a program that wants out of it could get out, and then meets the other layers.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What programs import: loaded before another user takes over, who may not be able to read where Python lies.
MODULES = (
    "array base64 bisect calendar cmath collections.abc contextlib copy dataclasses datetime decimal difflib enum "
    "fractions functools hashlib heapq html io itertools keyword math numbers operator pprint queue random re "
    "statistics string struct textwrap threading time timeit types typing unicodedata uuid"
)
NOBODY = 65534
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_NODEV, MS_NOSUID, MS_NOEXEC, MS_REC, MS_PRIVATE = 4, 2, 8, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1  # the call has this number on every machine
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CAPABILITIES_3 = 1, 38, 0x20080522
NEVER = (
    *("subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system", "os.kill", "os.startfile", "pty.", "socket."),
    *("ctypes.", "signal.pthread_kill", "sys.addaudithook", "sys.setprofile", "sys.settrace"),
)
WRITING = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.utime", "os.setxattr", "os.removexattr", "os.chflags", "shutil.", "tempfile."),
)


def main() -> None:
    """Read a job, run its program, and write a line of JSON: token, passed, reason, layers."""
    job = json.load(sys.stdin)
    end_with_parent(job["parent"])
    for name in MODULES.split():
        __import__(name)
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    layers = isolate(job)
    limit(job, "files" in layers)
    layers.append("limits")
    if job["guard"]:
        sys.addaudithook(guard("files" in layers))
        layers.append("guard")
    write, dumps, token = os.write, json.dumps, job["token"]
    reason = run(job["program"], job["tests"])
    write(verdict, dumps({"token": token, "passed": reason == "", "reason": reason, "layers": layers}).encode())


def isolate(job: dict[str, Any]) -> list[str]:
    """Leave the network, the file system, the other processes and the user, as far as the system allows it.

    Returns:
        The layers that are there now. With the layer `processes` a child of this process returns; this one waits for
        it and ends with it.
    """
    if sys.platform != "linux" or not job["namespaces"]:
        layers = drop_user() if sys.platform == "linux" else []
        end_with_parent(job["parent"])  # after the user has changed, which clears it
        return layers
    libc = ctypes.CDLL(None, use_errno=True)
    layers = []
    parent, held = job["parent"], None
    if may_unshare(libc) and unshare(libc):
        layers.append("network")
        if only_folder_writable(libc, job["folder_bytes"]):
            layers.append("files")
        end_with_parent(parent)  # once more: a new user namespace may have cleared it
        parent, held = 0, os.pipe()
        if child := os.fork():
            os.closerange(3, held[1])  # the verdict's end is the child's alone; its end of the pipe stays
            os.waitpid(child, 0)
            os._exit(0)
        os.close(held[1])
        layers.append("processes")
    layers += drop_user()
    end_with_parent(parent)
    if held:  # from here a parent's number is 0 whether it lives or not, but the pipe's other end closes with it
        if select.select([held[0]], [], [], 0)[0]:
            os._exit(1)
        os.close(held[0])
    return layers


def unshare(libc: Any) -> bool:
    """Enter namespaces of this process's own; false where it cannot, which may leave it in some without a user."""
    wanted = NEW_MOUNTS | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(wanted if user == 0 else wanted | NEW_USER):
        return False
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        try:
            for name, words in maps.items():
                Path("/proc/self", name).write_text(words, encoding="utf-8")
        except OSError:
            return False
    return True


def may_unshare(libc: Any) -> bool:
    """Whether `unshare` succeeds, tried by a child: AppArmor lets a user enter namespaces and then map nobody there."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    os._exit(0 if unshare(libc) else 1)


def end_with_parent(parent: int) -> None:
    """Be killed as soon as the process of this number ends, and end now where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def only_folder_writable(libc: Any, folder_bytes: int) -> bool:
    """Make all mounts read-only in this mount namespace, and a small file system of the working folder."""
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        return False
    read_only = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)  # set, clear, propagation, namespace
    call = (MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), ctypes.c_size_t(32))
    folder = Path.cwd()
    options = f"size={folder_bytes},nr_inodes=256,mode=1777".encode()
    flags = MS_NODEV | MS_NOSUID | MS_NOEXEC
    if libc.syscall(*call) or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options):
        return False
    os.chdir(folder)
    return True


def drop_user() -> list[str]:
    """Be nobody where this is root, and have no capability; the layer `user` where that worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:  # in a container that has no other user
            return []
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    return ["user"] if libc.capset(header, none) == 0 else []


def limit(job: dict[str, Any], may_write: bool) -> None:
    """Set the kernel's limits on this process, never above those that it has."""
    seconds = job["cpu_seconds"]
    limits = {
        "CPU": (seconds, seconds + 1),
        "AS": (job["memory_bytes"],) * 2,
        "FSIZE": (job["file_bytes"] if may_write else 0,) * 2,
        "NOFILE": (64, 64),
        "NPROC": (0, 0),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    for name, wanted in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
        hard = resource.getrlimit(which)[1]
        soft, most = (value if hard == resource.RLIM_INFINITY else min(value, hard) for value in wanted)
        resource.setrlimit(which, (soft, most))


def guard(may_write: bool) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what no program of the evaluation needs."""
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, arguments: tuple[Any, ...], refused: type[Exception] = PermissionError) -> None:
        if event.startswith(NEVER):
            raise refused(f"{event} is not allowed here")
        if may_write:
            return
        if event.startswith(WRITING) or (event == "open" and arguments[2] & write_flags):
            raise refused(f"{event} is not allowed here")

    return hook


def run(program: str, tests: list[str]) -> str:
    """Run a program, then its tests in its module; returns why it failed, nothing where it did not."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
        for test in tests:
            exec(compile(test, "test", "exec"), module.__dict__)
    except BaseException as error:
        return type(error).__name__[:80] or "failed"
    return ""


if __name__ == "__main__":
    main()
