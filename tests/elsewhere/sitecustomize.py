"""Python on Linux, as unwilling as Windows is: put this folder into PYTHONPATH, and every process that is started
refuses to our package what Windows would. Its own drive letters and its threads are beyond this.

refused  modules that only POSIX has; text read or written in an encoding that was not named; names of files that
         Windows has not; deleting, replacing or renaming a file that this process holds open or mapped; renaming onto
         a file; handlers of signals in an event loop; processes that are forked
"""

import asyncio
import builtins
import os
import re
import signal
import sys
import warnings
from contextlib import suppress

POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "uvloop"}
GONE = ("fork", "forkpty", "getloadavg", "getpgid", "killpg", "nice", "posix_fadvise", "setsid")
GONE += ("sched_getaffinity", "sched_setaffinity")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?")
ours = re.compile(r"lanting(\.|$)")
imported = builtins.__import__


def import_(name, *rest, **more):
    place = (rest[0] if rest else more.get("globals")) or {}
    if name.split(".")[0] in POSIX and ours.match(str(place.get("__name__", ""))):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return imported(name, *rest, **more)


def unix_only(*arguments):
    raise NotImplementedError


def held(path):
    """Whether this process has a file open or mapped."""
    real = os.path.realpath(path)
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{number}") == real:
                    return True
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return any(line.rstrip("\n").endswith(f" {real}") for line in maps)
    return False


def whole(path, folder):
    """A path from its name in an open folder."""
    path = os.fsdecode(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if folder not in (-1, None) else path


def possible(path):
    """Raises the OSError of a name that Windows has not."""
    name = os.path.basename(path.rstrip("/"))
    if re.search(r'[<>:"|?*\\\x00-\x1f]', name) or name.endswith((".", " ")) or RESERVED.fullmatch(name):
        raise OSError(22, "The filename, directory name, or volume label syntax is incorrect", path)


def free(path):
    """Raises the PermissionError for a file that is in use."""
    if held(path):
        raise PermissionError(13, "The process cannot access the file because it is being used", path)


def heard(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes):
        path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            possible(path)
    elif event == "os.mkdir":
        possible(whole(arguments[0], arguments[2]))
    elif event == "os.remove":
        free(whole(*arguments))
    elif event == "os.rename":
        old, new = whole(arguments[0], arguments[2]), whole(arguments[1], arguments[3])
        possible(new)
        free(old)
        free(new)
    elif event in ("os.fork", "os.forkpty"):
        raise OSError(40, "no fork here")


def rename(old, new):
    if os.path.exists(new):
        raise FileExistsError(17, "Cannot create a file when that file already exists", old, 183, new)
    os.replace(old, new)


builtins.__import__ = import_
for name in GONE:
    delattr(os, name)
os.rename = rename
parent = os.getppid()
os.getppid = lambda: parent  # on Windows it stays whatever becomes of the parent
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "pthread_sigmask"):
    with suppress(AttributeError):
        delattr(signal, name)
for loop in (asyncio.BaseEventLoop, asyncio.SelectorEventLoop):
    loop.add_signal_handler = loop.remove_signal_handler = unix_only
sys.modules["uvloop"] = None  # for its libraries, too
if sys.flags.warn_default_encoding:
    warnings.filterwarnings("ignore", category=EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module=ours.pattern)
sys.addaudithook(heard)
