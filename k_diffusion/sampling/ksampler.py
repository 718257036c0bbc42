"""KSampler: model + scheduler + solver, which is what most people call."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import DENOISERS, FunctionDenoiser, make_denoiser, model_device
from k_diffusion.sampling.adaptive import AdaptiveSolver, find_solver
from k_diffusion.sampling.advice import SamplingAdvice, advice
from k_diffusion.sampling.auto_steps import make_auto
from k_diffusion.sampling.enhance import Enhance, make_enhance
from k_diffusion.sampling.finish import Normalise, make_finish, with_known
from k_diffusion.sampling.many import Many, as_keywords
from k_diffusion.sampling.masks import Resample, make_resample, make_stages
from k_diffusion.sampling.noise import NoiseSource
from k_diffusion.sampling.passes import Passes
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.preview import Preview
from k_diffusion.sampling.registry import Solver
from k_diffusion.sampling.settings import described, described_model
from k_diffusion.sampling.start import Start, make_start, whole
from k_diffusion.sampling.walk import NOISES, NoiseSampler, Walk, noise_maker
from k_diffusion.sampling.watch import Flag, Recorder, Result, Watchers
from k_diffusion.utils.levels import FLOW, Levels, Path
from k_diffusion.utils.scheduler import (
    FlowScheduler,
    KarrasScheduler,
    Scheduler,
    make_scheduler,
)

__all__ = ["NOISES", "KSampler"]

Callback = Callable[[int, Tensor, Tensor, Tensor], None]


class KSampler:
    """Draws samples from a diffusion or flow model.

    Args:
        model: a Denoiser; a network that carries its conventions, such as `UNet` (its `prediction`,
            `time_convention` and perhaps `process`); or a plain function
            `(x, sigma, **condition) -> x0`, taken to be variance exploding. It is called as it is:
            put a network with dropout into `eval()` first. For a solver of two outputs (CFG++) it
            must return a pair: the guided and the unconditional estimate of x0.
        scheduler: lays the noise levels: a Scheduler or its name. A network that carries no process
            yet takes it as its process too, if it is in the coordinates of the network's kind
            (variance preserving for eps, v and x0). None: the model's own process.
        solver: a registered solver or its name; `k-diffusion samplers` lists them. Or one with
            adaptive step control: dpm_adaptive, dpm_adaptive_12, bogacki_shampine, dormand_prince,
            for which the scheduler gives the range alone (see `AdaptiveSolver`).
        churn: noise added at the start of each step (Karras et al. 2022, algorithm 2).
        options: the solver's own, `eta=0.5` say.

    Raises:
        ValueError: an unknown scheduler, solver or option, by name.

    Example:
        >>> sampler = KSampler(lambda x, sigma: x / (1 + sigma[0] ** 2), "karras", "heun")
        >>> sampler.sample(torch.randn(2, 3, 8, 8), steps=10).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: Any,
        scheduler: Scheduler | str | None = None,
        solver: Solver | AdaptiveSolver | str = "dpmpp_2m",
        *,
        churn: Churn | None = None,
        **options: Any,
    ) -> None:
        chosen = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        if chosen is not None and not isinstance(chosen, Scheduler):
            raise TypeError(f"scheduler must be a Scheduler or a name, got {type(chosen).__name__}")
        self.model = model
        # A schedule in another kind's coordinates (Karras levels for a noise-predicting network)
        # lays levels, but is no process that such a network can have been trained on.
        kind = DENOISERS.get(str(getattr(model, "prediction", "")))
        own = None if chosen is None else chosen.own_process
        if own is not None and (kind is None or own.path is not kind.path):
            own = None
        made = make_denoiser(model, own)
        process = getattr(made, "process", None)
        if not isinstance(process, Scheduler):  # a program's own attribute of that name
            process = None
        self.denoiser = made if isinstance(made.path, Path) else FunctionDenoiser(made)
        usual = FlowScheduler() if self.denoiser.path is FLOW else KarrasScheduler()
        if chosen is None:
            chosen = process or usual
        self.scheduler: Scheduler = chosen.within(usual if process is None else process)
        self.solver: Solver | AdaptiveSolver = find_solver(solver)
        self.solver.check_options(options)
        self.options = options
        self.churn = churn
        self._advised: set[str] = set()
        if churn is not None and isinstance(self.solver, AdaptiveSolver):
            raise ValueError(f"{self.solver.name} has no plan to churn: give it eta instead")

    @staticmethod
    def from_pipeline(
        pipeline: Any,
        scheduler: Scheduler | str | None = None,
        solver: Solver | AdaptiveSolver | str | None = None,
        **options: Any,
    ) -> Any:
        """A `external.PipelineSampler`: a diffusers pipeline, texts to images, by our solvers.

        Args:
            pipeline: of diffusers, with its modules where and as they are to compute.
            scheduler, solver: None: what the pipeline's own scheduler stands for.
            options: the solver's own, and churn.
        """
        # Resolved here: sampling knows nothing of what comes from elsewhere.
        module = importlib.import_module("k_diffusion.external.pipelines")
        return module.PipelineSampler(pipeline, scheduler, solver, **options)

    def levels(self, steps: int) -> Levels:
        """The `steps + 1` levels of a run, in the denoiser's coordinates.

        Raises:
            ValueError: steps is not a whole number of at least 1, or the model cannot begin where
                the scheduler does.
        """
        steps = whole(steps)
        if not isinstance(steps, int) or type(self.scheduler).__hash__ is None:
            levels = self.scheduler.levels(steps).on(self.denoiser.path)
        else:
            levels = _lay(self.scheduler, steps, self.denoiser.path)
        eps = getattr(self.denoiser, "prediction", None) == "eps"
        if eps and self.denoiser.alpha(levels[0].sigma) == 0:
            raise ValueError(
                f"{type(self.scheduler).__name__} begins at pure noise (alpha = 0), where a "
                "noise-predicting network says nothing of the data: begin lower (CosineScheduler "
                "has time_max), or use a v, x0 or flow network"
            )
        return levels

    def plan(self, steps: int, *, intervals: bool = False) -> Plan:
        """What `sample` would do, as data; print it to read it.

        Args:
            steps: number of steps.
            intervals: draw noise as for a caller's own noise sampler; see `make_plan`.
        """
        if isinstance(self.solver, AdaptiveSolver):
            raise ValueError(f"{self.solver.name} lays its steps as it goes: it has no plan")
        return make_plan(
            self.solver,
            self.levels(steps),
            churn=self.churn,
            intervals=intervals,
            **self.options,
        )

    @torch.no_grad()
    def sample(
        self,
        x: Tensor | None = None,
        steps: Any = 50,
        condition: Tensor | Mapping[str, Any] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        init: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        resample: Resample | int | None = None,
        noise: str | NoiseSampler | NoiseSource = "independent",
        noise_on_cpu: bool = False,
        progress: bool = False,
        callback: Callback | None = None,
        preview: Preview | Callable[[int, Tensor], object] | None = None,
        trajectory: bool = False,
        details: bool = False,
        cancel: Flag | None = None,
        enhance: Enhance | float | bool | None = None,
        normalise: Normalise = None,
        to: str | None = None,
        on_nan: str = "raise",
        step_count: Any = None,
    ) -> Any:
        """Draws samples from noise, or from images.

        Args:
            x: unit Gaussian noise, shape (B, C, ...), as from `torch.randn` or `unit_noise`; it is
                scaled to the first level here. It decides dtype and device of the result; the state
                between calls is float32 or better. None: `unit_noise` of `shape` and `seeds`.
            steps: number of steps; a second-order one-step method calls the model about twice in
                each. "auto" or an `AutoSteps`: as many as each sample needs.
            condition: class labels (integers, shape (B,)), an embedding (floats, shape (B, D)), or
                a mapping of the model's keyword arguments.
            seed: for solvers that draw noise: one number per sample, or one number for all, where
                sample i takes seed + i. A sample depends on its own seed alone, not on the batch.
                None: from torch's global generator.
            seeds: the same as `seed`, but always one per sample: without x they say how many.
            shape: of one sample, (C, H, W) say, without x; None: that of init.
            init: images to begin from, in the data's scale, one or B of them.
            strength: how far init is noised, in [0, 1]: of `steps` steps the last round(strength ·
                steps) are walked, one at least (`Levels.start_at`; diffusers' convention). 0 gives
                init back, 1 a plain run, in which init has no part but where the mask keeps it.
                Needed with init; with a mask, 1.
            mask: 1 where to repaint, 0 where to keep init, exactly; between, the model's estimate
                is that share of the way from init's. It broadcasts to init: (H, W), say.
            resample: jumps back, with a mask: a `Resample`, or its number of times. More calls,
                and a better fit of what is drawn to what is kept.
            noise: where a stochastic solver's noise comes from. "independent": drawn anew at each
                step, the cheapest. "path": from a Brownian path that belongs to the seed, the same
                for any number of steps and any levels, so that a sample converges as its steps are
                refined. Or a function `noise_sampler(sigma, sigma_next)`, called with two numbers
                in the solver's order, that returns unit noise of x's shape; noise that lies between
                no two levels (churn) still comes from the seeds. Or a noise source, an object
                with `draw(interval)`, which gives unit noise of x's shape, dtype and device.
            noise_on_cpu: make that noise on the CPU, so that seeds give the same on every device.
            progress: show a progress bar on standard error.
            callback: called as `callback(k, x, sigma, denoised)` after the k-th call of the model,
                with its input, noise level (shape (B,)) and answer (of two, the guided one); by an
                adaptive solver with the samples alone that the call was about. Each pass counts
                from 0.
            preview: small pictures of the estimate: a `Preview`, or a function (k, pictures).
            trajectory: return a `Result` with the states and estimates, two tensors of the batch's
                size a step; not with an adaptive solver or steps="auto".
            details: return a `Result`.
            cancel: a `threading.Event`; once set, `Cancelled` is raised after the current call.
            enhance: an `Enhance`, or its scale: a second pass over the enlarged result.
            normalise: of the result: "clamp" to [-1, 1]; "dynamic", see `finish.dynamic`; or a
                function of samples. What a mask keeps stays as it is.
            to: "uint8": the result's [-1, 1] as 0..255.
            on_nan: the result is read once, at its end. If it is not finite, the run is done again,
                callback included, to find the first call and module that were not. "raise":
                FloatingPointError says so. "report": a RuntimeWarning does, and the result is
                returned; from an adaptive solver there is none.
            step_count: another word for `steps`, which it goes before.

        Returns:
            Samples, shape (B, C, ...), in the scale of the data that the model was trained on; or a
            `Result` that holds them.

        Raises:
            TypeError: something of a wrong type; no pair where the solver takes two outputs.
            ValueError: x or init that isn't finite, a shape, strength, mask or condition that does
                not fit, bad steps, an unknown name.
            FloatingPointError: the result is not finite.
            Cancelled: `cancel` was set; it holds the last estimate.
        """
        steps = steps if step_count is None else step_count
        start = make_start(
            x,
            shape=shape,
            seed=seed,
            seeds=seeds,
            init=init,
            strength=strength,
            mask=mask,
            home=model_device(self.model),
        )
        finish = make_finish(normalise, to, start.noise.dtype)
        if enhance is not None and enhance is not False:
            enhance = make_enhance(enhance)
        repeats = make_resample(resample, start.mask is not None)
        adaptive = isinstance(self.solver, AdaptiveSolver)
        noise_maker(noise, noise_on_cpu)
        if adaptive and noise != "independent":
            raise ValueError(
                f"{self.solver.name} draws noise for the steps it finds: leave noise alone"
            )
        if trajectory and (adaptive or make_auto(steps) is not None):
            what = self.solver.name if adaptive else 'steps="auto"'
            raise ValueError(f"{what} has no steps in common for a trajectory: use callback")
        keywords = self._keywords(condition, len(start))
        self._advise(start, steps)
        watchers = Watchers(callback, preview, trajectory, cancel)

        def make_walk(start: Start, steps: Any, keywords: Mapping[str, Any]) -> Walk:
            return Walk(
                self.denoiser,
                self.solver,
                self.options,
                self.churn,
                start,
                make_stages(start.tail(self.levels(steps)), repeats),
                keywords,
                noise,
                noise_on_cpu,
            )

        seeds_used = tuple(start.seeds)
        passes = Passes(make_walk, watchers, progress, on_nan)
        drawn = passes.draw(start, steps, keywords)
        if isinstance(enhance, Enhance):
            start = enhance.start(start, with_known(drawn.x, start.init, start.mask))
            told = condition if enhance.condition is None else enhance.condition
            again = enhance.steps or steps
            drawn = passes.draw(start, again, self._keywords(told, len(start)))
        for warning in passes.warnings:
            warnings.warn(warning, stacklevel=3)  # past torch's no_grad, at the caller's line
        samples = finish(drawn.x, start.init, start.mask)
        if not (trajectory or details):
            return samples
        seen = watchers.recorder or Recorder()
        return Result(
            samples,
            seeds_used,
            drawn.steps,
            passes.calls,
            drawn.changes,
            tuple(seen.levels),
            tuple(seen.states),
            tuple(seen.estimates),
        )

    def _advise(self, start: Start, steps: Any) -> None:
        """Warn of what will hardly give what is wanted, once for each sampler."""
        if make_auto(steps) is not None:
            return
        lines = advice(
            self.denoiser,
            self.solver,
            self.levels(steps),
            scheduler=self.scheduler,
            calls=lambda: self.plan(steps).evaluations,
            init=start.init,
            whole=start.init is None,
        )
        for line in lines:
            if line not in self._advised:
                self._advised.add(line)
                warnings.warn(line, SamplingAdvice, stacklevel=4)

    def sample_many(
        self,
        n: int,
        *,
        steps: Any = 50,
        shape: Sequence[int] | None = None,
        condition: Any = None,
        seed: int | Sequence[int] = 0,
        batch_size: int | str = "auto",
        rank: int | None = None,
        world: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Many:
        """More samples than fit into memory at once; nothing is drawn before they are asked for.

        Where memory runs out the batch is halved, and the samples that did not fit are drawn in
        smaller ones. The samples are the same in whatever batches, and by whatever processes.

        Args:
            n: how many, in all processes together.
            steps, condition: see `sample`. A condition's tensors have n rows, one per sample, or
                one for all; lists of length n an item per sample. Or a function that is given a
                list of samples' numbers.
            shape: of one sample, (C, H, W) say; None: that of init.
            seed: sample i has seed + i; or n seeds.
            batch_size: samples at a time, at first. "auto": 64.
            rank, world: the number of this process and how many there are, each of which draws
                every world-th sample. None: as torch.distributed or torchrun's variables say.
            progress: show a bar with the samples drawn and the time left.
            options: those of `sample`; init and mask with n rows or one; a mask of
                fewer dimensions than init is one for all.

        Example:
            >>> sampler = KSampler(lambda x, sigma: x / (1 + sigma[0] ** 2), "karras", "heun")
            >>> sampler.sample_many(5, steps=4, shape=(3, 8, 8), batch_size=2).collect().shape
            torch.Size([5, 3, 8, 8])
        """
        return Many(
            self,
            n,
            steps=steps,
            shape=shape,
            condition=condition,
            seed=seed,
            batch_size=batch_size,
            rank=rank,
            world=world,
            progress=progress,
            options=options,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for one without parameters."""
        return model_device(self.model) or torch.device("cpu")

    def settings(self, each: Sequence[Tensor] = ()) -> dict[str, str]:
        """What a sample depends on beside the weights, by name, as text; each: see
        `described_model`."""
        return {
            "model": described_model(self.model, each),
            "scheduler": described(self.scheduler),
            "solver": self.solver.name,
            "options": str(dict(sorted(self.options.items()))),
            "churn": str(self.churn),
        }

    def _keywords(self, condition: Any, batch: int) -> dict[str, Any]:
        keywords = as_keywords(condition)
        check = getattr(self.denoiser, "check_condition", None)
        if check is not None:
            check(batch, **keywords)
        return keywords


@functools.lru_cache(maxsize=256, typed=True)  # typed: steps=True must not find what 1 left
def _lay(scheduler: Scheduler, steps: int, path: Path) -> Levels:
    return scheduler.levels(steps).on(path)
