"""Exceptions that frostline raises deliberately; the command line prints each as one message."""


class FrostlineError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(FrostlineError):
    """A setting, a flag or a combination of them is invalid."""


class DocumentError(FrostlineError, ValueError):
    """A YAML or JSON document is invalid; the caller adds the file name."""


class DataError(FrostlineError):
    """A sample, a video, a metadata row or a file is invalid or cannot be written; the message names it."""


class CheckpointError(FrostlineError):
    """A training checkpoint or a run folder is damaged, missing or not writable, or another run is using the folder."""


class TrainingError(FrostlineError):
    """Training cannot continue because of non-finite values."""


class EngineError(FrostlineError):
    """An engine cannot be built, loaded, verified or run."""


class InputError(EngineError):
    """An input has a name, type or device that the engine does not accept. The engine itself is not at fault."""


class ShapeError(InputError):
    """An input has a shape that the engine does not support."""


class EngineMemoryError(EngineError):
    """An engine ran out of memory. The engine itself is not at fault."""


class SharedFolderError(EngineError):
    """Other users could replace an engine's files while it is loaded. The engine itself is not at fault."""


class ParityError(EngineError):
    """The outputs of an engine differ from those of the PyTorch stage by more than the tolerance."""
