"""What went wrong in words for the person who asked for it."""


class AdfqError(ValueError):
    """A mistake in what was asked for or given: one line that says what to change.

    The command line prints it without a traceback and exits with code 2.
    """
