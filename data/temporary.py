"""Temporary names beside a file or a folder: each process has its own, so that two runs never write
the same one, and the next run finds what a killed one left.
"""
import os
import platform
import re
import time

HOST = re.sub(r"\W", "", platform.node())  # computers may share a disk, and then have equal ids


def temporary(path, word):
    """The name for this process: text.txt -> text.txt.part-HOST-PID."""
    return path.with_name(f"{path.name}.{word}-{HOST}-{os.getpid()}")


def is_running(host, pid, path):
    """Whether the process that made a path may still be at work."""
    if pid == os.getpid() and host == HOST:
        return False  # of an earlier process with this id, or of an earlier call
    if host != HOST or os.name == "nt":  # os.kill would end the process there
        return time.time() - path.stat().st_mtime < 86400
    try:
        os.kill(pid, 0)  # asks, and changes nothing
    except ProcessLookupError:
        return False
    except OSError:  # there, but another user's
        pass
    return True


def leftovers(path, word):
    """What processes that run no more left beside a path under temporary(path, word). Where it
    can't be told (another computer's, Windows), a day without a change must have passed."""
    pattern = re.escape(f"{path.name}.{word}-") + r"(?:(\w*)-)?(\d{1,9})"
    found = []
    for left in path.parent.glob("*-*"):
        match = re.fullmatch(pattern, left.name)
        try:
            if match and not is_running(match[1] or HOST, int(match[2]), left):
                found.append(left)
        except FileNotFoundError:  # another run has just cleared it
            pass
    return found
