"""Errors that a user can act on. Each message names the thing, shows the values and says what to do."""


class TaopdError(ValueError):
    """Base of every error caused by the user's input; bugs of ours raise other types."""


class ConfigError(TaopdError):
    """An option, or a combination of options, cannot be honoured."""


class DataError(TaopdError):
    """A prompt or rollout file cannot be used as it is."""


class RolloutError(TaopdError):
    """A server does not answer prompts, or not as it must."""


class ModelError(TaopdError):
    """A model directory is missing something, is unsupported or does not fit the layout."""


class CheckpointError(TaopdError):
    """A Megatron checkpoint cannot be read or written."""


class DamagedCheckpointError(CheckpointError):
    """A Megatron checkpoint is torn, or its bytes are not those that were written; an earlier one may be whole."""


class TokenizerMismatchError(TaopdError):
    """Student and teacher do not read or stop on the same token ids."""


class NonFiniteError(TaopdError):
    """The loss or the gradient of a training step is not finite."""
