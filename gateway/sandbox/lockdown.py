"""Drops the privileges of the calling process that rendering a template or compiling a grammar never needs.

A template that escapes Jinja's sandbox, or a grammar that exploits a native library, can then only compute and answer:
no files, sockets, other processes, signals, or memory beyond its limit.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # _REFUSE: the call fails with EPERM
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of classic BPF
_AT_NUMBER, _AT_ARCHITECTURE = 0, 4  # offsets in the kernel's struct seccomp_data

_CALLS = {
    # Memory, open files, locks, its own signal handlers, clocks, random numbers, exit.
    # brk mmap munmap mremap mprotect madvise · read write pread64 close fstat lseek · futex sched_yield
    # sched_getaffinity · rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack · clock_gettime gettimeofday · getrandom
    # · exit exit_group getpid gettid
    "x86_64": (0xC000003E, (
        12, 9, 11, 25, 10, 28, 0, 1, 17, 3, 5, 8, 202, 24, 204, 13, 14, 15, 131, 228, 96, 318, 60, 231, 39, 186,
    )),
    "aarch64": (0xC00000B7, (
        214, 222, 215, 216, 226, 233, 63, 64, 67, 57, 80, 62, 98, 124, 123, 134, 135, 139, 132, 113, 169, 278, 93, 94,
        172, 178,
    )),
}  # fmt: skip
"""Machine -> its number in the kernel's audit.h, and the allowed system calls."""


def lock_down(parent: int, max_memory_bytes: int) -> bool:
    """Restrict this process permanently; return whether the kernel filters its system calls.

    It keeps its open files, and dies with `parent`, the process id of the one that started it. max_memory_bytes: limit
    of additional address space.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.setpgid(0, 0)  # no signals from the terminal; a separate session would get as much CPU as the whole gateway
    memory = address_space_bytes() + max_memory_bytes
    num_files = 1 + max(map(int, os.listdir("/proc/self/fd")))
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NOFILE: num_files,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    if sys.platform != "linux":
        return False
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3):
            raise OSError(ctypes.get_errno(), f"prctl {option}")
    if os.getppid() != parent:  # the parent ended before PR_SET_PDEATHSIG
        os._exit(1)
    return _filter_calls(libc)


def address_space_bytes() -> int:
    """Return this process's address space in bytes, as counted by RLIMIT_AS."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Make all system calls but the allowed ones fail. Return whether kernel and machine support it."""
    if platform.machine() not in _CALLS:
        return False
    architecture, calls = _CALLS[platform.machine()]
    program = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    program += [(_IF_EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls)]  # jumps to the last line
    program += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    return not libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(fprog), ctypes.c_ulong(0), ctypes.c_ulong(0))
