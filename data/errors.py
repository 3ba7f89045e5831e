"""What a user sees: the one exception that means that the input is wrong, not the program, and text
that is safe to show. Both are defined here, because data/ needs them and imports nothing from the
rest of the project.
"""
import re
import sys
from pathlib import Path

# what a terminal obeys, but for line ends and tabs: such characters clear the screen, rename its
# window, overwrite a line or turn its direction round
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")


class UserError(ValueError):
    """Something that a user can correct, in one sentence: what was found, what was expected, what
    to do. Scripts show it in one line; every other exception is a mistake in the program and keeps
    its traceback."""

    def __str__(self):
        # of a file's name, or another program's error
        return super().__str__().replace("\n", "\\n")


def printable(text, stream=None):
    """Text of unknown origin (generated, or with a file's name) as it can be printed to a stream
    (default: stdout). On a terminal control characters come as escapes such as \\x1b; everywhere
    else the text stays as it is."""
    stream = stream or sys.stdout
    if stream is None or not stream.isatty():  # None: pythonw has no output
        return text
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def show(text, **options):
    """print() for text of unknown origin."""
    print(printable(text), **options)


def check_kind(path, flag, suffix=".svg"):
    """Raise UserError where write_file would refuse this path."""
    if Path(path).is_file() and Path(path).suffix != suffix:
        raise UserError(f"{path} exists, and is not what {flag} writes (*{suffix}): give another "
                        "file with it")


def write_file(path, text, flag, suffix=".svg"):
    """Write a file that the user named with this flag, and make its folder. One of the same kind
    that is there is replaced; anything else is a slip of the hand."""
    check_kind(path, flag, suffix)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(
            f"could not write {path} ({error}); give another file with {flag}") from None
