"""Plan the memory of a run with its own or with other settings, for `--dry-run` and `memory.fit`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from frostline.config import AUTO
from frostline.models.block_offload import WINDOW
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
        sizes: heights and widths of the training videos before cropping; if unknown, a square with the maximum number
            of pixels in the settings is used.
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
        self._previews: dict[str, Preview] = {}
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
        """Return the preview of precomputing with these settings."""
        # Without `offload`: the search tries many numbers of blocks, and each preview counts the parameters of all
        # stages.
        key = f"{self.device_bytes} {settings.model_dump_json(exclude={'offload'})}"
        if key not in self._previews:
            model = self._measurements.model(settings.train.weight_dtype, settings.lora, settings)
            self._previews[key] = preview(settings, model, self._samples, self.device_bytes)
        return self._previews[key]

    def weights(self, settings: RunSettings) -> Weights:
        """Return the size of the model's parameters in bytes."""
        return self._measurements.weights(settings.train.weight_dtype, settings.lora, settings)

    def cache_bytes(self, settings: RunSettings) -> int:
        """Return the maximum size of precomputed outputs in the cache, in bytes."""
        return self.preview(settings).estimate.nbytes

    def num_blocks(self, settings: RunSettings, without_lora: bool = False) -> int:
        """Return the number of blocks of the largest denoiser, or of the largest without a LoRA; 0 if there is none."""
        model = self._measurements.model(settings.train.weight_dtype, settings.lora, settings)
        counts = [len(each.module.blocks) for each in model.experts if not (without_lora and each.trained)]
        return max(counts, default=0)

    def plan(self, settings: RunSettings) -> MemoryPlan:
        """Plan the memory of one device; with `offload.blocks: auto`, offload the fewest blocks with which it fits."""
        if settings.offload.blocks != AUTO:
            return self._plan(settings, settings.offload.blocks)
        plan = self._plan(settings, 0)
        if self.device_bytes is None or self.on_cpu:
            return plan
        for count in range(WINDOW + 1, self.num_blocks(settings) + 1):
            if plan.fits:
                break
            plan = self._plan(settings, count)
        return plan

    def _plan(self, settings: RunSettings, offload_blocks: int) -> MemoryPlan:
        plan = memory_plan(
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
            offload_blocks=offload_blocks,
        )
        # The memory of a CPU is main memory.
        offloads = settings.offload_saved_tensors and not self.on_cpu
        return replace(plan, offloaded_activations=sum(stage.kept for stage in plan.stages)) if offloads else plan
