"""Any solver on any schedule as a scheduler of diffusers' pipelines.

    pipe.scheduler = PlanScheduler.from_config(
        pipe.scheduler.config, solver="dpmpp_3m_sde", schedule="karras"
    )

It runs in the coordinates of the network's kind, with the config of the scheduler in whose place
it stands: what the network predicts is read there and never changed.

Saved pipelines name this module and the class; diffusers loads them where the program has imported
it before (`from k_diffusion import PlanScheduler`), and looks here for `SchedulerMixin` too: so
neither can be moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from k_diffusion.external.networks import limit
from k_diffusion.external.noise import GeneratorNoise, Generators
from k_diffusion.external.process import KNOWN, OURS, config_of, read_conventions
from k_diffusion.external.settle import renoised
from k_diffusion.external.visits import Visit, at_timestep, fixed_solver, formulas, named, visited
from k_diffusion.sampling.engine import Run
from k_diffusion.utils import maths
from k_diffusion.utils.levels import VE, Level, Levels
from k_diffusion.utils.scheduler import make_scheduler


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """What a call of `PlanScheduler.step` gives.

    Attributes:
        prev_sample: what the network is to see next, shape (B, ...).
        pred_original_sample: the estimate of x0.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """A solver of this library in the place of a diffusers scheduler; see `from_config`.

    The state between steps is float32 or better, whatever the pipeline computes in. Solvers of
    several calls a step have as many timesteps: `order` of them in most steps.

    Latents are in the coordinates of the network's kind (alpha x0 + sigma eps for one of betas), as
    DDIM's are, where Euler's and its kin's are x0 + sigma eps. Where one pipeline hands unfinished
    latents to another (`denoising_end` to `denoising_start`), either both have a `PlanScheduler` or
    none. `DDIMPipeline` makes a DDIMScheduler of any scheduler that it is built or loaded with:
    there, put this one in by `pipe.scheduler =` each time.

    Args:
        config: of the scheduler in whose place it stands, or that scheduler, or the config of a
            `PlanScheduler`.
        solver: name of a registered solver of fixed steps and one output.
        schedule: name of a registered schedule; None: the levels of the scheduler that it replaces.
        options: the solver's own.
        schedule_options: the schedule's own.

    Raises:
        ValueError: an unknown name, key or value; a solver that cannot be stepped from outside.
    """

    order = 1
    _compatibles: ClassVar[list[str]] = list(KNOWN)

    def __init__(
        self,
        config: Any,
        solver: str | None = None,
        schedule: str | None = None,
        options: Mapping[str, Any] | None = None,
        schedule_options: Mapping[str, Any] | None = None,
    ) -> None:
        plain = named(config)
        known = config_of(plain)
        kept = {k: v for k, v in plain.items() if not k.startswith("_")}
        if plain["_class_name"] != "PlanScheduler":  # keys that one left there decide nothing
            kept = {k: v for k, v in kept.items() if k not in OURS}
        keys = {k: v for k, v in known.items() if not k.startswith("_")}
        ours = {
            "lays": known["_class_name"],
            "solver": solver or kept.get("solver") or "dpmpp_2m",
            "schedule": schedule or kept.get("schedule"),
            "options": dict(kept.get("options") or {} if options is None else options),
            "schedule_options": dict(
                kept.get("schedule_options") or {} if schedule_options is None else schedule_options
            ),
        }
        if solver is not None and options is None and solver != kept.get("solver"):
            ours["options"] = {}  # those of another solver
        if schedule is not None and schedule_options is None and schedule != kept.get("schedule"):
            ours["schedule_options"] = {}
        self._chosen = fixed_solver(ours["solver"])
        self._chosen.check_options(ours["options"])
        if ours["schedule"] is not None:
            make_scheduler(ours["schedule"], **ours["schedule_options"])
        elif ours["schedule_options"]:
            raise ValueError(f"schedule_options {ours['schedule_options']} need a schedule")
        self.register_to_config(_class_name="PlanScheduler", **{**kept, **keys, **ours})
        self._said = read_conventions(self.config)
        self._formulas = formulas(self._said)
        self.timesteps = torch.empty(0)
        self._times: list[float] = []
        self.sigmas = torch.empty(0)
        self.num_inference_steps: int | None = None
        self._visit: Visit | None = None
        self._forget()

    def _forget(self) -> None:
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._run: Run | None = None
        self._taken: frozenset[int] = frozenset()
        self._noise: GeneratorNoise | None = None

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """A scheduler with the config of another, in a pipeline of which it may take its place.

        Args:
            config: as for the class.
            return_unused_kwargs: return a pair, of which the second is empty: nothing is ignored.
            options: solver, schedule, options and schedule_options, as for the class; or other
                values for keys of the config.

        Raises:
            ValueError: as the class; an unknown key.
        """
        if config is None:
            raise ValueError("from_config needs the config of a scheduler: pipe.scheduler.config")
        config = named(config)
        own = {k: options.pop(k) for k in OURS if k in options and k != "lays"}
        if options:
            known = config_of(config)
            for key in options:
                if key not in known:
                    what = f"option of PlanScheduler for {known['_class_name']},"
                    raise ValueError(maths.unknown(what, key, [*OURS[1:], *known]))
            config = {**config, **options}
        made = cls(config, **own)
        return (made, {}) if return_unused_kwargs else made

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", self._said.process.timesteps))

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies its unit noise by."""
        visit, process = self._visit, self._said.process
        first = process.level(process.time_max) if visit is None else visit.levels[0]
        if self._said.unit_start:
            return float((first.sigma**2 + 1) ** 0.5) if process.path is VE else 1.0
        return first.sigma

    @property
    def begin_index(self) -> int | None:
        """The timestep that a run begins at; None: found by the first one that `step` is told."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The timestep that the next `step` is for; None before the first."""
        return self._step_index

    @property
    def levels(self) -> Levels | None:
        """What the run visits, on the path of the network's kind; None before `set_timesteps`."""
        return None if self._visit is None else self._visit.levels

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Has the run begin at a later timestep, as image to image does.

        Inside a step of several calls it begins with the next step: the calls before go unused.
        exp_ab, exp_ab_noise and exp_ab_velocity have one or two timesteps more than steps, all in
        the first, and so begin as many levels earlier than others; there is no room for such a
        start later, and they go on as exp_ab_low, deis and exp_ab_velocity_low. `restart` cannot
        begin inside its loop, since what is left of it is no plan of its own.

        Raises:
            ValueError: there is no such timestep.
        """
        count = 0 if self._visit is None else len(self._visit.calls)
        if self._visit is not None and not 0 <= begin_index < count:
            raise ValueError(f"begin_index {begin_index} is none of the {count} timesteps")
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lays the levels of the next run.

        Args:
            num_inference_steps: number of steps.
            device: of `timesteps`.
            sigmas: own levels instead, noisy to clean; as the replaced scheduler takes them where
                no schedule was chosen, else sigma / alpha (of a flow: sigma). A flow pipeline's
                even ones, 1 to 1 / n, only count the steps of a chosen schedule.
            timesteps: own levels instead, by the network's time.
            mu: logarithm of a flow's shift, where it depends on the size of the image.

        Raises:
            ValueError: levels that this network or solver cannot take, or not one of the three.
        """
        self._said = read_conventions(self.config)  # pipelines amend configs
        self._formulas = formulas(self._said)
        levels = visited(self.config, num_inference_steps, sigmas, timesteps, mu)
        if self._said.prediction == "eps" and levels[0].alpha == 0:
            raise ValueError(
                f"{self.config['lays']} begins at pure noise (alpha = 0), where a noise-predicting "
                "network says nothing of the data: choose a schedule that begins lower, karras say"
            )
        steps = renoised(self._chosen, self.config["options"], self._said)
        visit = Visit(*steps, levels, num_inference_steps)
        places = range(len(visit.calls))
        times = [float(self._formulas.time(visit.level(i).half_log_snr)) for i in places]
        self.timesteps = torch.tensor(times, dtype=torch.float32)
        self._times = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)
        self.sigmas = torch.tensor([visit.level(i).sigma for i in (*places, len(times))])
        # Where pipelines give the levels, they count the timesteps as their steps.
        self.order = visit.order if sigmas is None and timesteps is None else 1
        self.num_inference_steps = visit.steps
        self._visit = visit
        self._forget()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is to see: of EDM networks, sample / sqrt(sigma² + sigma_data²)."""
        if self._said.prediction != "edm":
            return sample
        visit = self._laid()
        place = self._place(timestep) if self._step_index is None else self._step_index
        total = visit.level(place).sigma ** 2 + self._said.sigma_data**2
        return sample * total**-0.5

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
    ) -> PlanSchedulerOutput | tuple[Tensor, Tensor]:
        """Takes the network's answer and goes on to its next input.

        Args:
            model_output: of shape (B, C, ...), or (B, 2C, ...) where variances follow, which have
                no use here.
            timestep: which of `timesteps` it is for; read for the first one alone.
            sample: what the network saw (before `scale_model_input`), shape (B, C, ...). Where its
                values are not those that were returned last, it was edited.
            generator: of a stochastic solver's noise; one, or one per sample. None: torch's global.
            return_dict: return a `PlanSchedulerOutput`, instead of a pair of the same.
            eta, use_clipped_model_output: what some pipelines hand to every scheduler; only what
                does nothing is taken.

        Returns:
            In the sample's dtype.

        Raises:
            RuntimeError: `set_timesteps` was not called, or the run is over.
            ValueError: it cannot begin here; an edited sample of a solver that would undo edits.
        """
        if eta or use_clipped_model_output:
            raise ValueError(
                f"a pipeline's eta ({eta}) and use_clipped_model_output do nothing here: choose a "
                'solver, and its options, options={"eta": 0.5} say'
            )
        visit = self._laid()
        if self._step_index is None:
            self._step_index = self._place(timestep)
        place = self._step_index
        if place >= len(visit.calls):
            raise RuntimeError(
                f"{self._chosen.name} has made its {len(visit.calls)} calls: call set_timesteps "
                "for another run"
            )
        run = self._run
        if run is None:
            if visit.start(place) > place:
                self._step_index = place + 1
                return self._output(sample, sample, return_dict)
            run = self._begin(visit, place, sample, generator)
        elif self._noise is not None:
            self._noise.generators = generator
        self._step_index = place + 1
        if place not in self._taken:
            return self._output(sample, sample, return_dict)
        x = self._state(run, sample)
        estimate = self._estimate(model_output, x, run)
        denoised = limit(estimate, self._said)
        run.advance(*(denoised, estimate)[: run.plan.outputs])
        x = run.x
        if run.done:
            self._run = None
            x = x / self._said.handed(visit.levels[-1])
        prev = x.to(sample.dtype, copy=True)
        return self._output(prev, denoised.to(sample.dtype), return_dict)

    @staticmethod
    def _output(prev: Tensor, denoised: Tensor, named: bool) -> Any:
        return PlanSchedulerOutput(prev, denoised) if named else (prev, denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean data at the level of timesteps, in this scheduler's coordinates.

        Args:
            original_samples: shape (B, ...).
            noise: unit noise of that shape.
            timesteps: shape (B,) or (); those of this run, or others of the process.
        """
        levels = [self._level(float(t)) for t in torch.as_tensor(timesteps).reshape(-1).tolist()]
        shape = (-1, *[1] * (original_samples.ndim - 1))
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        alpha, sigma = (
            torch.tensor([getattr(level, name) for level in levels], dtype=wide)
            .to(original_samples.device)
            .reshape(shape)
            for name in ("alpha", "sigma")
        )
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name and in the order of flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def _laid(self) -> Visit:
        if self._visit is None:
            raise RuntimeError("PlanScheduler has no levels yet: call set_timesteps first")
        return self._visit

    def _place(self, timestep: Any) -> int:
        """Where a run begins that is first told of this timestep."""
        if self._begin_index is not None:
            return self._begin_index
        visit = self._laid()
        told = torch.as_tensor(timestep).flatten()[:1].cpu()
        dtype = told.dtype if told.is_floating_point() else torch.float32
        known = torch.tensor(self._times, dtype=dtype)  # as a pipeline in low precision rounds it
        for place, (time, start) in enumerate(zip(known, visit.starts, strict=True)):
            if start and time == told:
                return place
        raise ValueError(
            f"timestep {float(told):g} begins no step of this run: hand over scheduler.timesteps "
            "as they are, or call set_begin_index"
        )

    def _level(self, timestep: float) -> Level:
        """The level of one of this run's timesteps, or of any of the process."""
        now = self._step_index or self._begin_index or 0
        if self._run is None and self._times[now : now + 1] == [timestep]:
            return self._laid().level(self._laid().start(now))
        for place in (*range(now, len(self._times)), *range(now)):
            if self._times[place] == timestep:  # levels beyond the process share its ends' times
                return self._laid().level(place)
        process = self._said.process
        if self._said.time_convention == "log_sigma":
            return process.path.at(-4 * timestep)
        if self._said.time_convention == "unit":
            return process.level(timestep)
        return at_timestep(timestep, process)

    def _begin(self, visit: Visit, place: int, sample: Tensor, generator: Generators) -> Run:
        plan, self._taken = visit.plan_from(place)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype, copy=True)  # the pipeline may write into its own
        self._noise = GeneratorNoise(generator, x) if plan.stochastic else None
        self._run = Run(plan, x, self._noise, torch.float64)
        return self._run

    def _state(self, run: Run, sample: Tensor) -> Tensor:
        """What the network saw, in the run's dtype; what was edited of it goes into the run."""
        if sample.shape != run.x.shape:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}, but the run began with "
                f"{tuple(run.x.shape)}: call set_timesteps for another run"
            )
        same = sample == run.x.to(sample.dtype)  # as it was handed over
        edited = torch.where(same, run.x, sample.to(run.dtype))
        if not run.plan.steps[run.k].start:
            return edited  # an inner stage: only the estimate is made from it
        if not (run.plan.predictor and bool(same.all())):
            run.x = edited
        return run.x

    def _estimate(self, output: Tensor, x: Tensor, run: Run) -> Tensor:
        """x0 from the network's output, not limited, in the run's dtype."""
        if x.ndim > 1 and output.ndim == x.ndim and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(
                f"model_output has shape {tuple(output.shape)}, sample {tuple(x.shape)}: they must "
                "be the same, or model_output have twice the channels"
            )
        output = output.to(run.dtype)
        said, sigma = self._said, run.sigma
        answer = -output if said.negated else output
        return self._formulas.estimate(x, said.process.path.alpha(sigma), sigma, lambda _: answer)
