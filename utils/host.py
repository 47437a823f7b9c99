"""What the host's memory allocator can be told before a program starts."""

import os
import platform
import sys

_TUNABLE = "glibc.malloc.hugetlb=1"


def huge_pages_environment() -> dict[str, str]:
    """Environment variables under which large buffers come in huge pages; empty where there is no such thing.

    XLA's CPU backend takes its buffers anew at every call, so a training step in pages of 4 KiB spends a tenth of its
    time and more on page faults. glibc reads the variable when a process starts.
    """
    if platform.libc_ver()[0] != "glibc":
        return {}
    own = [part for part in os.environ.get("GLIBC_TUNABLES", "").split(":") if part]
    if not any(part.startswith("glibc.malloc.hugetlb=") for part in own):
        own.append(_TUNABLE)
    return {"GLIBC_TUNABLES": ":".join(own)}


def restart_with_huge_pages() -> None:
    """Start this program again with `huge_pages_environment`, unless it already runs with it.

    For entry scripts, before anything has happened: the process is replaced.
    """
    wanted = huge_pages_environment()
    if sys.executable and sys.orig_argv and any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
