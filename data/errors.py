"""The one exception that means: the input is wrong, not the program. Here, because data/ needs it and imports nothing of the rest."""


class UserError(ValueError):
    """Something that a user can mend, in one sentence: what was found, what was expected, what to do. Scripts show it in one line;
    every other exception is a mistake in the program and keeps its traceback."""
