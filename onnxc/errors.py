"""Errors that a user can act on: one plain sentence each, and exit code 2 on the command line."""

import re

_SHORT = re.compile(r"\d+ requested and \d+ written")


class OnnxcError(Exception):
    """Bad input. The message names the file, node or key, and says what to do."""


class ModelError(OnnxcError):
    """The model cannot be read, is invalid, or holds something that onnxc cannot carry."""


class DataError(OnnxcError):
    """The data is missing, unreadable, or does not fit the inputs of the model."""


class OptionError(OnnxcError):
    """An option, recipe key or node selector does not make sense for this model."""


class ClusterError(OnnxcError):
    """Workers on other processors cannot be reached, or do not live long enough to work."""


def why(error: OSError) -> str:
    """What the system refused, in one line; NumPy tells only that less was written than asked."""
    told = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return "No space left on device" if _SHORT.fullmatch(told) else told
