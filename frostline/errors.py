"""The errors that frostline raises on purpose; the command line turns each into one clear message."""


class FrostlineError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(FrostlineError):
    """A setting, a flag or a combination of them is not usable."""


class DocumentError(FrostlineError, ValueError):
    """A YAML or JSON document cannot be read; whoever knows which file it is says so."""


class DataError(FrostlineError):
    """A sample, a video or a metadata row is not usable; the message names sample, file and field."""


class CheckpointError(FrostlineError):
    """A checkpoint of a training run is damaged, missing or cannot be written, or the run's folder is taken."""


class TrainingError(FrostlineError):
    """Training cannot go on: its numbers are no longer finite."""


class EngineError(FrostlineError):
    """An engine cannot be built, loaded, trusted or run."""


class InputError(EngineError):
    """An input is not what the engine takes: its name, type or device. It says nothing about the engine."""


class ShapeError(InputError):
    """An input has a shape that the engine was not built for."""


class EngineMemoryError(EngineError):
    """An engine ran out of memory: no verdict on the engine itself."""


class SharedFolderError(EngineError):
    """Others could exchange an engine's files while it is loaded. It says nothing about the engine."""


class ParityError(EngineError):
    """An engine does not compute what the PyTorch stage computes."""
