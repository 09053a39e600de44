"""Every error this library raises on purpose: one family, so that a caller can catch it whole."""


class RandLoraError(ValueError):
    """Something about an adapter, its configuration or its files is wrong."""


class ConfigError(RandLoraError):
    """A configuration asks for something impossible or contradictory."""


class TargetError(RandLoraError):
    """The layers an adapter names and the layers a model has do not fit together."""


class AdapterFileError(RandLoraError):
    """An adapter's files are missing, damaged, incomplete or not what they say."""
