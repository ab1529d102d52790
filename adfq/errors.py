"""Errors with a message for the user."""


class AdfqError(ValueError):
    """Mistake in a user's input; its message is one line that says what to change.

    The command line prints the message without a traceback and exits with code 2.
    """


class NonFiniteError(AdfqError):
    """NaN or infinity in weights, activations or outputs: the failure of one model under one method.

    In a table it costs one cell.
    """


class NotApplicableError(AdfqError):
    """Method that cannot be applied to the model; the message is the reason."""
