"""Whole diffusers pipelines, sampled by our solvers.

    sampler = KSampler.from_pipeline(pipe, "karras", "dpmpp_2m")
    images = sampler.sample("a red fox", negative="grey", steps=20, guidance=7, seeds=[1, 2])

The pipeline's own modules are used as they are, with all that was loaded into them; it is not
changed. Without a scheduler and a solver, the levels are the pipeline's own, and the solver is the
one that its scheduler stands for: docs/foreign-names.md says how near they come.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external import codec, families
from k_diffusion.external.asked import Asked, Told
from k_diffusion.external.begin import begin_from
from k_diffusion.external.codec import Codec
from k_diffusion.external.lays import ForeignScheduler
from k_diffusion.external.networks import BothLimits, foreign_denoiser, limited
from k_diffusion.external.noise import GeneratorNoise
from k_diffusion.external.process import config_of, read_conventions
from k_diffusion.external.prompted import joined, prompted, refined
from k_diffusion.external.settle import (
    generators,
    own_solver,
    renoised,
    repeated,
    rows_of,
    settle_seeds,
    texts,
)
from k_diffusion.external.visits import shifted
from k_diffusion.sampling import Churn, KSampler, Solver
from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW
from k_diffusion.utils.scheduler import Scheduler, make_scheduler

OUTPUTS = ("pil", "tensor", "latent")
CFG_PP = 0.6
"""The usual scale of CFG++, from 0 to 1 (Chung et al. 2024, arXiv:2406.08070, section 4)."""


class PipelineSampler:
    """Draws from a diffusers pipeline; final.

    Args:
        pipeline: of a kind in `families.FAMILIES`. Its scheduler is read now: make another sampler
            for another.
        scheduler: lays the noise levels: a Scheduler or its name. None: the levels of the
            pipeline's own scheduler.
        solver: a registered solver or its name. None: what the pipeline's own scheduler stands for,
            by `foreign_name`.
        churn, options: see `KSampler`.

    Attributes:
        denoiser: the network as a Denoiser, without guidance.
        codec: draws noise, encodes images and decodes latents.

    Raises:
        TypeError: a pipeline or a network of an unknown class.
        ValueError: a missing component; an unknown key or value in a config, or option.
    """

    def __init__(
        self,
        pipeline: Any,
        scheduler: Scheduler | str | None = None,
        solver: Any = None,
        *,
        churn: Churn | None = None,
        **options: Any,
    ) -> None:
        self.pipeline = pipeline
        self.family = families.find_family(pipeline)
        self.codec = Codec(pipeline, self.family)
        self._own: Any = pipeline.scheduler
        self.conventions = read_conventions(self._own)
        network = getattr(pipeline, self.family.network)
        self.denoiser: Any = foreign_denoiser(network, self.conventions)
        self.scheduler = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        if solver is None:
            solver, own = own_solver(self._own)
            options = {**own, **options}
        # Checks what is given; the runs, whose levels may depend on the size, make their own.
        self._checked = KSampler(self.denoiser, None, solver, churn=churn, **options)

    @property
    def solver(self) -> Any:
        return self._checked.solver

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return torch.device(self.pipeline._execution_device)

    @property
    def _pair(self) -> bool:
        """Whether the solver takes both estimates of guidance."""
        return getattr(self.solver, "outputs", 1) == 2

    @property
    def usual_guidance(self) -> float:
        """The scale where none is asked for: of this kind of pipeline, or of CFG++."""
        return CFG_PP if self._pair else self.family.guidance

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | None = None,
        *,
        guidance: float | None = None,
        labels: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        seconds: float | None = None,
        pair: bool | None = None,
        **options: Any,
    ) -> Told:
        """What the network is told: one row for each prompt, or label.

        Args:
            prompt, negative: texts; one negative serves all.
            guidance: scale; None: the usual one of this kind of pipeline, or of CFG++.
            labels: classes, of a DiT.
            height, width: in pixels, for networks that are told them.
            seconds: of sound.
            pair: whether both estimates are wanted at scales up to 1, too; None: where the solver
                has two outputs.
            options: the pipeline's own names: `prompt_embeds`, `prompt_2`, `clip_skip`...

        Raises:
            ValueError: an unknown option, a wrong length, or what the pipeline refuses.
        """
        pair = self._pair if pair is None else pair
        scale = self.usual_guidance if guidance is None else guidance
        if not maths.is_number(scale):
            raise ValueError(f"guidance must be a number, 1 for none, got {scale!r}")
        prompts = texts("prompt", prompt)
        classes = [labels] if isinstance(labels, int) else labels
        embeds = options.get("prompt_embeds")
        counts = [len(v) for v in (prompts, classes, embeds) if v is not None]
        count = counts[0] if counts else 1
        if len(set(counts)) > 1:
            raise ValueError(f"prompts, labels or embeds of {counts} rows: give one kind of them")
        negatives = texts("negative", negative)
        if negatives is not None and len(negatives) not in (1, count):
            raise ValueError(
                f"{len(negatives)} negatives for {count} prompts: give one, or as many"
            )
        if negatives is not None and len(negatives) == 1:
            negatives = negatives * count
        high, wide = self.codec.size(height, width)
        asked = Asked(
            count,
            float(scale),
            prompts,
            negatives,
            None if classes is None else [int(c) for c in classes],
            high,
            wide,
            seconds=self._seconds(seconds),
            options=options,
            pair=pair,
        )
        return families.tell(self.pipeline, asked)

    def latents(
        self,
        seeds: Sequence[int],
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int = 1,
    ) -> Tensor:
        """Unit noise of each seed: what the pipeline draws from CPU generators of these seeds."""
        return self.codec.noise(
            generators(seeds), self.codec.shape(*self.codec.size(height, width), frames)
        )

    def encode_images(self, images: Any) -> Tensor:
        """Latents of PIL images, or of tensors in [-1, 1], shape (B, 3, H, W)."""
        pixels = codec.as_images(images)
        if self.family.kind == "image":
            self.codec.size(int(pixels.shape[-2]), int(pixels.shape[-1]))
        return self.codec.encode(pixels).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], float32; see `Codec.decode`."""
        return self.codec.decode(latents)

    def ksampler(
        self,
        shape: Sequence[int],
        *,
        guidance: float = 1.0,
        guidance_rescale: float = 0.0,
        refiner: PipelineSampler | None = None,
        refine_at: float | None = None,
        refiner_guidance: float = 1.0,
    ) -> KSampler:
        """The KSampler of a run; its condition is what `prompted.joined` makes of `encode`'s.

        Args:
            shape: of one sample's latents, on which levels may depend.
            guidance, guidance_rescale: see `sample`.
            refiner, refine_at, refiner_guidance: see `sample`.
        """
        self.denoiser.network.stand_at(self.device)
        model = prompted(self.denoiser, guidance, guidance_rescale, self._pair)
        if refiner is not None:
            if refine_at is None:
                raise ValueError("refine_at says where the refiner takes over: sigma / alpha")
            second = prompted(refiner.denoiser, refiner_guidance, guidance_rescale, self._pair)
            model = refined(model, second, refine_at)
        mu, even = families.shift(self.pipeline, self._own, tuple(shape))
        if self.scheduler is None:
            scheduler: Scheduler = ForeignScheduler(self._own, mu, even)
        else:
            scheduler = self.scheduler.within(shifted(config_of(self._own), mu))
        made = self._checked
        steps, options = renoised(made.solver, made.options, self.conventions)
        limits = limited if steps is made.solver else BothLimits
        return KSampler(
            limits(model, self.conventions), scheduler, steps, churn=made.churn, **options
        )

    @torch.no_grad()
    def sample(
        self,
        prompt: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | None = None,
        *,
        steps: int = 20,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        n: int | None = None,
        labels: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        seconds: float | None = None,
        init: Any = None,
        strength: float | None = None,
        mask: Any = None,
        latents: Tensor | None = None,
        refiner: PipelineSampler | None = None,
        refine_at: float | None = None,
        refiner_options: Mapping[str, Any] | None = None,
        to: str | None = None,
        run: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Images, videos or sound of texts.

        Args:
            prompt, negative: a text, or one for each; see `encode`.
            steps: see `KSampler.sample`.
            guidance: scale of classifier-free guidance; up to 1: none, as in pipelines, but with
                CFG++, whose scale is from 0 to 1. Networks that are told their scale (latent
                consistency models, Flux) are told it. None: `usual_guidance`.
            guidance_rescale: see `guidance.Rescaled`; it is done on the estimate of x0.
            seed: image i has seed + i. Of a number of steps, noise is what the pipeline would draw
                from a CPU generator of that seed.
            seeds: one for each image. One prompt is drawn once for each seed.
            n: images for each prompt.
            labels: classes, of a DiT.
            height, width: in pixels. None: those of init, or the network's own.
            frames, seconds: of a video, of sound.
            init: images to begin from: PIL, or tensors in [-1, 1].
            strength: how far init is noised, from 0 to 1; needed with init alone.
            mask: white or 1 where to repaint. A network for inpainting is told it; with others the
                rest is kept at each step.
            latents: unit noise to begin from, shape (B, ...); None: `latents` of the seeds.
            refiner: a sampler of another pipeline with the same latents, whose network takes over
                at the level refine_at.
            refine_at: sigma / alpha.
            refiner_options: those of the refiner's `encode`, which hears none of the others.
            to: "pil", "tensor" (in [-1, 1]) or "latent". None: pictures for images and videos, a
                tensor for sound.
            run: more keywords of `KSampler.sample`: progress, callback, preview, noise...
            options: those of `encode`.

        Returns:
            A list of PIL images (of lists of frames), or a tensor.

        Raises:
            TypeError, ValueError: see `encode` and `KSampler.sample`.
        """
        to = self._output(to)
        pixels = None if init is None else codec.as_images(init)
        if pixels is not None and self.family.kind == "image":
            height, width = height or int(pixels.shape[-2]), width or int(pixels.shape[-1])
        high, wide = self.codec.size(height, width)
        if frames is None:
            frames = 81 if self.family.kind == "video" else 1
        elif self.family.kind != "video":
            raise ValueError(f"frames are of videos, and {type(self.pipeline).__name__} draws none")
        told = self.encode(
            prompt,
            negative,
            guidance=guidance,
            labels=labels,
            height=height,
            width=width,
            seconds=seconds,
            **options,
        )
        rows = rows_of(told)
        chosen = settle_seeds(seed, seeds, n, rows, latents)
        repeat = len(chosen) // (rows or 1)
        shape = self.codec.shape(high, wide, frames)
        condition = joined(repeated(told, repeat))
        extra: dict[str, Any] = {}
        if refiner is None and (refine_at is not None or refiner_options):
            raise ValueError("refine_at and refiner_options are of a refiner: give it")
        if refiner is not None:
            heard: dict[str, Any] = {"guidance": guidance, "height": height, "width": width}
            heard["pair"] = self._pair
            if "prompt_embeds" not in (refiner_options or {}):
                heard |= {"prompt": prompt, "negative": negative}
            second = refiner.encode(**{**heard, **(refiner_options or {})})
            condition |= joined(repeated(second, repeat), "refiner_")
            extra = {
                "refiner": refiner,
                "refine_at": refine_at,
                "refiner_guidance": second.scale,
            }
        sampler = self.ksampler(
            shape, guidance=told.scale, guidance_rescale=guidance_rescale, **extra
        )
        drawers = generators(chosen)
        own = self.codec.noise(drawers, shape)  # drawn even if unused: what follows is other noise
        x = own if latents is None else latents.float()
        if tuple(x.shape) != (len(chosen), *shape):
            raise ValueError(
                f"latents have shape {tuple(x.shape)}, but {(len(chosen), *shape)} is drawn"
            )
        x = x.to(self.device)
        begin = begin_from(self.codec, pixels, strength, mask, x, condition)
        if "init" not in begin:
            x = x * self._start(sampler, steps)
        how = dict(run or {})
        if isinstance(sampler.solver, Solver) and isinstance(steps, int) and not how.get("enhance"):
            how.setdefault("noise", GeneratorNoise(drawers, x))
        try:
            drawn = sampler.sample(x, steps, condition, seed=chosen, **begin, **how)
            if isinstance(steps, int) and begin.get("strength") != 0:
                drawn /= self.conventions.handed(sampler.levels(steps)[-1])
            if to == "latent":
                return drawn
            made = self._checked_for_safety(self.decode(drawn))
        finally:
            self.pipeline.maybe_free_model_hooks()  # offloaded modules go back
        if self.family.kind == "sound":
            return made[..., : int(self._seconds(seconds) * self.pipeline.vae.config.sampling_rate)]
        return codec.to_pil(made) if to == "pil" else made

    def _checked_for_safety(self, images: Tensor) -> Tensor:
        """Black images for those that the pipeline's own safety checker objects to."""
        if getattr(self.pipeline, "safety_checker", None) is None:
            return images
        _, flagged = self.pipeline.run_safety_checker(
            images.clone(), self.device, self.codec.network.dtype
        )
        for i in (i for i, objects in enumerate(flagged or ()) if objects):
            images[i] = -1
            warnings.warn(
                f"the pipeline's safety checker objects to image {i}, which is black now",
                RuntimeWarning,
                stacklevel=4,
            )
        return images

    def _start(self, sampler: KSampler, steps: Any) -> float:
        """By what unit noise is multiplied before KSampler multiplies it by the first sigma.

        Most pipelines begin at unit variance: what is missing there is the signal, of which nothing
        is known.
        """
        if not (self.conventions.unit_start and isinstance(steps, int)):
            return 1.0
        first = sampler.levels(steps)[0]
        if sampler.denoiser.path is FLOW:
            return float(1 / first.sigma)
        return float((first.alpha**2 + first.sigma**2) ** 0.5 / first.sigma)

    def _seconds(self, seconds: float | None) -> float:
        if self.family.kind != "sound":
            if seconds is not None:
                raise ValueError(f"{type(self.pipeline).__name__} draws no sound: leave seconds")
            return 0.0
        vae = self.pipeline.vae
        longest = self.codec.network.config.sample_size * vae.hop_length / vae.config.sampling_rate
        if seconds is None:
            return float(longest)
        if not maths.is_number(seconds) or not 0 < seconds <= longest:
            raise ValueError(f"seconds must be above 0 and at most {longest:g}, got {seconds!r}")
        return float(seconds)

    def _output(self, to: str | None) -> str:
        sound = self.family.kind == "sound"
        if to is None:
            return "tensor" if sound else "pil"
        known = OUTPUTS[sound:]
        if to not in known:
            raise ValueError(maths.unknown("output", to, known))
        return to
