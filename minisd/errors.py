"""The errors that minisd defines; all of them are a `MinisdError`.

Python's own errors stay what they are: TypeError for an argument of a wrong type, ValueError for
one of a wrong value, FileNotFoundError, MemoryError, and ArithmeticError where values are not
finite.
"""


class MinisdError(Exception):
    """What every error that minisd defines is, so that one ``except`` catches them all."""


class WeightError(MinisdError, ValueError):
    """Weights that are damaged, of another model, or not what they claim to be."""


class ImageError(MinisdError, ValueError):
    """An image that cannot be read or used; the message is one sentence that names it."""


class HubError(MinisdError, RuntimeError):
    """A download that did not happen, and why, in one sentence."""
