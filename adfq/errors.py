"""What went wrong in words for the person who asked for it."""


class AdfqError(ValueError):
    """A mistake in what was asked for or given: one line that says what to change.

    The command line prints it without a traceback and exits with code 2.
    """


class NonFiniteError(AdfqError):
    """Weights, activations or outputs that hold NaN or infinity: one model's failure under one method.

    In a table it costs this cell alone.
    """
