"""The exceptions that commands turn into one sentence and an exit code."""


class InputError(ValueError):
    """Bad input, exit code 2. The message is one sentence: the value, what was expected, what to do."""


class TransientError(InputError):
    """What another try may not meet again, such as a machine that is late: exit code 1."""
