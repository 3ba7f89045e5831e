"""The one exception that means: the input is wrong, not the program.
It is defined here, because data/ needs it and imports nothing from the rest of the project."""


class UserError(ValueError):
    """Something that a user can correct, in one sentence: what was found, what was expected, what
    to do. Scripts show it in one line; every other exception is a mistake in the program and keeps
    its traceback."""
