"""The memory plan of a run with its own or with other settings, for `--dry-run` and `memory.fit`."""

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
    """Plans runs of one model and one set of rewards; values that do not depend on other settings are measured once.

    Args:
        settings: settings of the run; its rewards and judges are used in all plans.
        device_bytes: memory of one device; None if unknown.
        on_cpu: whether the device is a CPU.
        samples: number of training samples, and of validation samples.
        sizes: heights and widths of its videos before cropping; if unknown, a square with the maximum number of pixels
            in the settings is used.
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
        """Return the geometry of the model."""
        return self._measurements.spec.geometry

    def shape(self, settings: RunSettings) -> VideoShape:
        """Return the largest shape of a step in one process."""
        return settings.video_shape(self.geometry, self._sizes)

    def preview(self, settings: RunSettings) -> Preview:
        """Return what is precomputed."""
        model = self._measurements.model(settings.train.weight_dtype, settings.lora, settings)
        return preview(settings, model, self._samples, self.device_bytes)

    def weights(self, settings: RunSettings) -> Weights:
        """Return the size of the model's parameters in bytes."""
        return self._measurements.weights(settings.train.weight_dtype, settings.lora, settings)

    def cache_bytes(self, settings: RunSettings) -> int:
        """Return the maximum size of precomputed outputs in the cache, in bytes."""
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
