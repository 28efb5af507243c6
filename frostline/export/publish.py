"""Copy an engine's ONNX files out of the store, with a script that runs them without frostline."""

from __future__ import annotations

import shutil
from pathlib import Path
from pprint import pformat
from string import Template
from uuid import uuid4

from frostline.errors import ConfigError, EngineError
from frostline.runtime.backends import DEFAULT_BACKEND
from frostline.runtime.engines.manifest import Manifest
from frostline.runtime.engines.store import VerifiedEngine
from frostline.runtime.hints import export_command

SCRIPT = "run.py"
_TEMPLATE = Path(__file__).with_name("run_onnx.py.template")
# The dtypes of inputs and outputs that numpy supports; bf16 is not one of them.
_DTYPES = {"float32", "float16", "int64", "int32", "bool"}


def publish(engine: VerifiedEngine, folder: Path) -> list[Path]:
    """Write the ONNX files of a verified engine and `run.py` to a new folder.

    The files are hashed again while they are copied, and the folder is created atomically.

    Returns:
        The written files.
    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written.
        EngineError: the engine has no ONNX files, or types that numpy does not have, or a file was changed.
    """
    manifest = engine.manifest
    _check_portable(manifest)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: choose another")
    part = folder.absolute().with_name(f".{folder.absolute().name}.{uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        for name in manifest.artifacts:
            (part / name).write_bytes(engine.read(name))
        (part / SCRIPT).write_text(_script(manifest), "utf-8")
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [folder / name for name in (*manifest.artifacts, SCRIPT)]


def _check_portable(manifest: Manifest) -> None:
    files = {network.artifact for network in manifest.networks}
    if not all(file.endswith(".onnx") for file in files):
        raise EngineError(
            f"{manifest.backend} engine {manifest.key} has no ONNX files and only runs with "
            f"{manifest.backend}: build another with "
            f"`{export_command(manifest.stage, DEFAULT_BACKEND)}`"
        )
    tensors = (tensor for network in manifest.networks for tensor in (*network.inputs, *network.outputs))
    if missing := {tensor.dtype for tensor in tensors} - _DTYPES:
        raise EngineError(
            f"engine {manifest.key} has inputs or outputs of type {', '.join(sorted(missing))}, "
            "which numpy does not have: export the model with --precision fp32 or fp16"
        )


def _script(manifest: Manifest) -> str:
    networks = {
        network.name: {
            "file": network.artifact,
            "inputs": {spec.name: [list(spec.opt), spec.dtype] for spec in network.inputs},
        }
        for network in manifest.networks
    }
    template = Template(_TEMPLATE.read_text("utf-8"))
    return template.substitute(
        model=manifest.model, stage=manifest.stage, networks=pformat(networks, width=110, sort_dicts=False)
    )
