"""What can go wrong, as a user sees it: what was expected, what was found, where, and what to do.

    AdaConvError                 exit code 1
    ├── UsageError               exit code 2: what was asked for cannot be: a flag, a path, a configuration
    │   └── ConfigError          every problem of a configuration at once
    ├── DatasetError             a dataset version contradicts its own books, or cannot be read
    │   └── QuarantineBudgetError    more images were refused than the budget allows
    ├── WeightsError             encoder weights are missing, damaged or of another network
    ├── CheckpointError          a checkpoint is incomplete, damaged, or not the one that was asked for
    ├── NonFiniteError           a loss or gradient is not finite; names the step and the samples
    ├── ClusterError             the cluster cannot be reached or lacks what the job needs
    ├── TrackingError            the tracking server or registry refuses or cannot be reached
    ├── JobError                 a job ended with failed parts; the parts that succeeded stand
    └── Interrupted              exit code 143: asked to stop, and stopped where it can go on

ImageError, of one picture, is in images.py; sharding and stylization write its reason into their books
and go on.
Storage failures stay what Python calls them: FileNotFoundError, PermissionError, OSError. A PermissionError that is
about whoever asks, not about what is asked for, is a CredentialsError.
"""


class AdaConvError(Exception):
    """Root of every error that is meant to be read by a user: one message, no traceback."""

    exit_code = 1


class UsageError(AdaConvError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DatasetError(AdaConvError):
    pass


class QuarantineBudgetError(DatasetError):
    pass


class WeightsError(AdaConvError):
    pass


class CheckpointError(AdaConvError):
    pass


class NonFiniteError(AdaConvError):
    pass


class ClusterError(AdaConvError):
    pass


class TrackingError(AdaConvError):
    pass


class JobError(AdaConvError):
    pass


class Interrupted(AdaConvError):
    exit_code = 143


class CredentialsError(PermissionError):
    """An object store does not know or believe who asks: every file is refused alike."""


def of_storage(error: OSError) -> str:
    """In one line, by the system's own words, which name the path."""
    message = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, PermissionError) and not isinstance(error, CredentialsError):
        message += "; choose another folder or change its permissions"
    return message
