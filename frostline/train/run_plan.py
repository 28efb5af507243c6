"""The memory plan of a whole run, under its own settings and under others: what `--dry-run` and `memory.fit` go by."""

from __future__ import annotations

from collections.abc import Collection

from frostline.models.video_shape import Geometry, VideoShape
from frostline.rewards.build import JUDGES, make_builtin
from frostline.runtime.backends import TORCH
from frostline.train.memory.measurements import Measurements
from frostline.train.memory.memory_profile import Weights, judge_bytes
from frostline.train.memory.plan import MemoryPlan, memory_plan
from frostline.train.precompute.preview import Preview, preview
from frostline.train.settings import RunSettings


class RunPlanner:
    """Plans runs of one model with one set of rewards; what does not depend on other settings is measured once.

    Args:
        settings: of the run; rewards and judges are those of all that is planned.
        device_bytes: memory of one device; None where it is not known.
        on_cpu: whether the device is a CPU.
        samples: that the run trains on, and held-out starts.
        sizes: heights and widths of its videos as they are, before they are cut; where they are not known, a square of
            as many pixels as the settings allow stands for all of them.
    Raises:
        ConfigError: there is no such model.
    """

    def __init__(
        self,
        settings: RunSettings,
        device_bytes: int | None,
        on_cpu: bool,
        samples: tuple[int, int] = (0, 0),
        sizes: Collection[tuple[int, int]] = (),
    ) -> None:
        self.device_bytes, self.on_cpu = device_bytes, on_cpu
        self._samples, self._sizes = samples, sizes
        self._measurements = Measurements(settings.model)
        self._rewards = [reward for reward, _ in make_builtin(settings.rewards)]
        self._judges = dict(judge_bytes(*made) for made in make_builtin(settings.validation.judges, JUDGES))

    @property
    def geometry(self) -> Geometry:
        """Of the model."""
        return self._measurements.spec.geometry

    def shape(self, settings: RunSettings) -> VideoShape:
        """Return what a step of one process computes on, at most."""
        return settings.video_shape(self.geometry, self._sizes)

    def preview(self, settings: RunSettings) -> Preview:
        """Return what is precomputed."""
        model = self._measurements.model(settings.train.weight_dtype, settings.lora, settings)
        return preview(settings, model, self._samples, self.device_bytes)

    def weights(self, settings: RunSettings) -> Weights:
        """Return the bytes of the model's parameters."""
        return self._measurements.weights(settings.train.weight_dtype, settings.lora, settings)

    def cache_bytes(self, settings: RunSettings) -> int:
        """Return what precomputing needs of the frozen-output cache, at most."""
        return self.preview(settings).estimate.nbytes

    def plan(self, settings: RunSettings) -> MemoryPlan:
        """Plan the memory of one device."""
        return memory_plan(
            settings.model,
            settings,
            self.shape(settings),
            dtype=settings.train.weight_dtype,
            engines=() if settings.plan.backend == TORCH else "all",
            num_processes=settings.memory.num_processes,
            sharding=settings.memory.sharding,
            device_bytes=self.device_bytes,
            rewards=self._rewards,
            judges=self._judges,
            precomputed=self.preview(settings).stages,
            measurements=self._measurements,
            quantization=settings,
        )
