"""What can be told of a run's settings before its model is loaded, which takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from frostline.config import AUTO
from frostline.errors import ConfigError, FrostlineError
from frostline.export.shapes import parse_shapes
from frostline.models.faces.detectors import load_detector
from frostline.models.faces.embedders import load_embedder
from frostline.models.lora import check_targets
from frostline.models.skeleton import read_skeleton
from frostline.models.weights import FROZEN_PARTS
from frostline.runtime.backends import TORCH, check_backend
from frostline.train.reward import find_reward
from frostline.train.runfolder import refuse_or_clear
from frostline.train.settings import RunSettings
from frostline.train.trackers import check_trackers

_STAGES = (*FROZEN_PARTS, "denoiser", "vae_decoder", "face_detector", "face_embedder")


def problems(settings: RunSettings, fresh: bool) -> Iterator[FrostlineError]:
    """All that is wrong, one by one.

    Args:
        fresh: whether the run starts anew, so that its folder must hold no other.
    """
    checks: list[Callable[[], object]] = [
        lambda: _check_plan(settings),
        lambda: _check_rewards(settings),
        lambda: check_trackers(settings.train.report_to),
    ]
    if fresh and not settings.overwrite_output_dir:
        checks.append(lambda: refuse_or_clear(settings.output_dir, overwrite=False))
    checks.append(lambda: check_targets(read_skeleton(settings.model).build("denoiser"), settings.lora.target_modules))
    for check in checks:
        try:
            check()
        except FrostlineError as error:
            yield error


def _check_plan(settings: RunSettings) -> None:
    plan = settings.plan
    for stage in plan.stages:
        if stage not in _STAGES:
            raise ConfigError(f"plan.stages: there is no stage {stage!r}, only {', '.join(_STAGES)}")
    for backend in {plan.backend, *plan.stages.values()} - {AUTO, TORCH}:
        check_backend(backend)
    parse_shapes(plan.min_shapes, plan.opt_shapes, plan.max_shapes)


def _check_rewards(settings: RunSettings) -> None:
    for term in settings.reward.terms:
        if term.is_face_identity:
            load_detector(term.detector, term.min_face_size)
            load_embedder(term.embedder)
        else:
            find_reward(term.type)
