"""What a user can cause, told in one line: what, where, found, expected, how to mend it."""


class DistillBevError(Exception):
    """Base of every error that a user can cause; the command line prints it without a traceback."""


class ConfigError(DistillBevError, ValueError):
    """A configuration that contradicts itself, or names something that does not exist."""


class DataError(DistillBevError):
    """A table, image, point file or calibration that is absent, damaged or inconsistent."""


class CheckpointError(DistillBevError):
    """Weights that are absent, damaged, or belong to another architecture."""


class RunError(DistillBevError):
    """A run that cannot start or go on: a folder that holds another run, a loss that is not finite."""
