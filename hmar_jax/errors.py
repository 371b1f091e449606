"""The one exception for input a person can put right; commands turn it into one sentence and exit code 2."""


class InputError(ValueError):
    """Bad input. The message is one sentence: the value, what was expected, what to do."""
