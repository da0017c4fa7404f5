"""Every error that a user of the package can meet. All of them are ``F2CError``."""


class F2CError(ValueError):
    """Base class. The message names the key or file, the value found and what to do."""


class ConfigError(F2CError):
    """A config that cannot be trained with. One line for each problem."""


class InputError(F2CError):
    """A batch, a backbone or an argument that the head, the pool or a sampler cannot use."""


class RecordError(F2CError):
    """A pack that cannot be read. Names the file, the place and what was found."""


class VerificationSetError(F2CError):
    """A verification set that cannot be read, or lacks what such a set needs."""


class CheckpointError(F2CError):
    """A file that is not a whole checkpoint, or a checkpoint that cannot be written."""


class PoolStateError(F2CError):
    """The state of a Dynamic Class Pool breaks one of its invariants."""


class TrainingDiverged(F2CError):
    """A training whose loss or gradient is no longer finite and will not recover."""


class ExportError(F2CError):
    """A model that cannot be exported, or whose export does not embed as the original does."""


class ReportError(F2CError):
    """A folder that holds no run to report on."""


class CheckoutError(F2CError):
    """A checkout of arcface_torch that cannot be patched. It was left as it was."""


class UnknownPlugin(F2CError):
    """No installed package offers a head, a loader or a backbone of that name."""


class BrokenPlugin(ConfigError):
    """A head, a loader or a backbone of an installed package that cannot be used."""


class OverwriteError(F2CError, FileExistsError):
    """A file that exists and is not overwritten."""
