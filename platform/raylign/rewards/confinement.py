"""Walls around a process without root or containers: Landlock for files, seccomp for the rest.

Landlock (Linux 5.13 and later) lets a process give up all files but some, and where the kernel has
it TCP (ABI 4), device ioctls (5), and signals and abstract sockets to processes outside (6). What
it leaves open (sockets of other kinds, chmod, fork, kill, io_uring, ptrace, ...) a seccomp list
closes: only the calls that a Python program needs to compute are let through, so a call that
nobody thought of, or that a later kernel brings, is refused.

The rules are made here, by the process that will judge; the one that is confined applies them to
itself before it has seen a line of foreign code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# include/uapi/linux/landlock.h; these numbers are the same on every architecture.
_CREATE_RULESET, _ADD_RULE = 444, 445
_WRITE_FILE, _READ_FILE, _READ_DIR = 2, 4, 8
_REMOVE_FILE, _MAKE_REG, _TRUNCATE, _IOCTL_DEV = 1 << 5, 1 << 8, 1 << 14, 1 << 15
# All rights to files that an ABI knows; the attribute's size grows with the ABI, too.
_FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_CONNECT_AND_BIND, _SIGNALS_AND_SOCKETS = 3, 3

# include/uapi/linux/{seccomp,filter,audit}.h
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

# Calls that are let through, by architecture, and some that are looked at more closely below.
# fmt: off
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18,
    "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35,
    "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "clone": 56, "exit": 60,
    "uname": 63, "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77,
    "getdents": 78, "getcwd": 79, "chdir": 80, "rename": 82, "unlink": 87, "readlink": 89,
    "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217, "set_tid_address": 218,
    "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "openat": 257,
    "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "prlimit64": 302, "renameat2": 316,
    "seccomp": 317, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "clone3": 435,
    "faccessat2": 439,
}
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22,
    "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29, "flock": 32, "unlinkat": 35, "renameat": 38,
    "ftruncate": 46, "faccessat": 48, "chdir": 49, "openat": 56, "close": 57, "pipe2": 59,
    "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
    "pread64": 67, "pwrite64": 68, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
    "fstat": 80, "fsync": 82, "fdatasync": 83, "exit": 93, "exit_group": 94, "set_tid_address": 96,
    "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103,
    "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
    "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163,
    "getrusage": 165, "umask": 166, "gettimeofday": 169, "getpid": 172, "getppid": 173,
    "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
    "brk": 214, "munmap": 215, "mremap": 216, "clone": 220, "mmap": 222, "fadvise64": 223,
    "mprotect": 226, "madvise": 233, "prlimit64": 261, "renameat2": 276, "seccomp": 277,
    "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "clone3": 435,
    "faccessat2": 439,
}
# fmt: on
_EXAMINED = {"clone", "clone3", "fcntl", "ioctl", "prlimit64", "seccomp"}
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
# What a C library asks for when it starts a thread: never a process, never a namespace.
_THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
# Duplicates, flags and locks of descriptors, and not F_SETOWN and F_SETSIG, which send signals.
_DESCRIPTOR_CALLS = (*range(8), 36, 37, 38, 1030, 1032)
# FIOCLEX, FIONCLEX, FIONBIO, FIONREAD, TCGETS, TIOCGWINSZ
_QUESTIONS = (0x5451, 0x5450, 0x5421, 0x541B, 0x5401, 0x5413)


@dataclass(frozen=True, slots=True)
class Walls:
    """What this kernel can do."""

    landlock: int
    """Version of its interface; 0 when there is none."""
    seccomp: bool

    @property
    def complete(self) -> bool:
        return self.landlock > 0 and self.seccomp

    def __str__(self) -> str:
        files = f"Landlock {self.landlock}" if self.landlock else "no Landlock"
        return f"{files}, {'seccomp' if self.seccomp else 'no seccomp'}"


@cache
def survey_walls() -> Walls:
    """Ask the kernel."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return Walls(0, False)
    version = _call(_CREATE_RULESET, None, 0, 1)
    action = ctypes.c_uint32(_ERRNO)
    number = _MACHINES[platform.machine()][1]["seccomp"]
    return Walls(max(version, 0), _call(number, 2, 0, ctypes.byref(action)) == 0)


def list_readable(packages: bool) -> list[Path]:
    """What a Python program reads: the standard library, shared libraries, time zones; with
    `packages` what is installed beside them."""
    names = ["stdlib", "platstdlib"] + (["purelib", "platlib"] if packages else [])
    # Of the interpreter itself: in a virtual environment the standard library is elsewhere.
    own = [Path(sysconfig.get_path(name)) for name in names]
    libraries = [Path(sys.base_prefix) / "lib"]
    system = [Path(p) for p in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")]
    devices = [Path("/dev/urandom"), Path("/dev/null")]
    paths = dict.fromkeys(path.resolve() for path in (*own, *libraries, *system, *devices))
    return [path for path in paths if path.exists()]


@contextlib.contextmanager
def open_rules(readable: Iterable[Path], writable: Path) -> Iterator[int]:
    """A Landlock rule set as a file descriptor, to be inherited: files below `readable` may be
    read, regular files in `writable` made, changed and removed, and nothing else.

    Raises `OSError` when the kernel refuses.
    """
    version = survey_walls().landlock
    known = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]
    fields = [known]
    if version >= 4:
        fields.append(_CONNECT_AND_BIND)
    if version >= 6:
        fields.append(_SIGNALS_AND_SOCKETS)
    attribute = struct.pack(f"={len(fields)}Q", *fields)
    rules = _call(_CREATE_RULESET, attribute, len(attribute), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | (_READ_DIR if path.is_dir() else 0))
        if writable:
            rights = _READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE_REG | _REMOVE_FILE | _TRUNCATE
            _allow(rules, writable, rights & known)
            _allow(rules, Path("/dev/null"), (_READ_FILE | _WRITE_FILE) & known)
        yield rules
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, place)
        if _call(_ADD_RULE, rules, 1, rule, 0) < 0:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    finally:
        os.close(place)


@cache
def compile_filter() -> bytes:
    """The seccomp list as a classic BPF program, for this machine's architecture."""
    architecture, numbers = _MACHINES[platform.machine()]
    code = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
    ]
    for name in sorted(numbers.keys() - _EXAMINED):
        code += _when(numbers[name], [_step(_RETURN, _ALLOW)])
    code += _when(numbers["clone3"], [_step(_RETURN, _ERRNO | _ENOSYS)])  # falls back to clone
    code += _when(numbers["clone"], _if_argument(0, _THREAD_FLAGS))
    code += _when(numbers["fcntl"], _if_argument(1, _DESCRIPTOR_CALLS))
    code += _when(numbers["ioctl"], _if_argument(1, _QUESTIONS))
    # Limits may be asked for and not set: the pointer to new ones must be null.
    halves = [_step(_LOAD, _ARGUMENTS_AT + 8 * 2 + 4), _step(_EQUAL, 0, 1, 0)]
    code += _when(
        numbers["prlimit64"], [*halves, _step(_RETURN, _ERRNO | _EPERM), *_if_argument(2, (0,))]
    )
    code.append(_step(_RETURN, _ERRNO | _EPERM))
    return b"".join(code)


def _step(operation: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, then, otherwise, value)


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """`body`, which returns, when the number just loaded is this one."""
    return [_step(_EQUAL, number, 0, len(body)), *body]


def _if_argument(index: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow when the lower half of an argument is one of `values`."""
    code = [_step(_LOAD, _ARGUMENTS_AT + 8 * index)]
    for value in values:
        code += [_step(_EQUAL, value, 0, 1), _step(_RETURN, _ALLOW)]
    return [*code, _step(_RETURN, _ERRNO | _EPERM)]


def _call(number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return int(library.syscall(ctypes.c_long(number), *arguments))
