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
    """A method that cannot be applied to a model, or a model that has no form in ONNX; the message is the reason.

    In a table the cell is "n/a", and the table goes on.
    """


def one_line(error: Exception, length: int = 300) -> str:
    """Return an error's message as one line.

    Args:
        error: the error.
        length: number of characters that a longer message is cut after.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]} …"
