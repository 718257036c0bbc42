"""Noise schedules: how noisy the data is at each time, and which levels a sampler visits.

A scheduler has two uses. In training it is the *process* that the network learns: it tells the
network's time for any level. In sampling it *lays levels*: `steps + 1` of them, noisy to clean; a
spacing does that alone, over another scheduler's process.
Everything is float64 on the host; `time` and `half_log_snr` also take tensors.

Time is in [0, 1], 0 nearest to the clean data. A network that counts discrete timesteps sees
`time * timesteps`.
"""

from k_diffusion.utils.schedules.base import SCHEDULERS, Scheduler, make_scheduler
from k_diffusion.utils.schedules.continuous import (
    CosineScheduler,
    InterpolatedCosineScheduler,
    ShiftedCosineScheduler,
    SigmoidScheduler,
    VPScheduler,
)
from k_diffusion.utils.schedules.custom import CustomScheduler
from k_diffusion.utils.schedules.discrete import (
    LinearScheduler,
    ScaledLinearScheduler,
    SquaredCosScheduler,
    ZeroTerminalScheduler,
)
from k_diffusion.utils.schedules.flow import (
    DynamicFlowScheduler,
    FlowScheduler,
    LinearDynamicFlowScheduler,
)
from k_diffusion.utils.schedules.sigma import (
    ALIGN_YOUR_STEPS,
    AlignYourStepsScheduler,
    ExponentialScheduler,
    KarrasScheduler,
    KLOptimalScheduler,
    LaplaceScheduler,
    PolyexponentialScheduler,
    RectifiedScheduler,
)
from k_diffusion.utils.schedules.spacing import (
    BetaScheduler,
    DDIMUniformScheduler,
    LeadingScheduler,
    LinearQuadraticScheduler,
    LinspaceScheduler,
    NormalScheduler,
    SGMUniformScheduler,
    SimpleScheduler,
    Spacing,
    TrailingScheduler,
)

__all__ = [
    "ALIGN_YOUR_STEPS",
    "SCHEDULERS",
    "AlignYourStepsScheduler",
    "BetaScheduler",
    "CosineScheduler",
    "CustomScheduler",
    "DDIMUniformScheduler",
    "DynamicFlowScheduler",
    "ExponentialScheduler",
    "FlowScheduler",
    "InterpolatedCosineScheduler",
    "KLOptimalScheduler",
    "KarrasScheduler",
    "LaplaceScheduler",
    "LeadingScheduler",
    "LinearDynamicFlowScheduler",
    "LinearQuadraticScheduler",
    "LinearScheduler",
    "LinspaceScheduler",
    "NormalScheduler",
    "PolyexponentialScheduler",
    "RectifiedScheduler",
    "SGMUniformScheduler",
    "ScaledLinearScheduler",
    "Scheduler",
    "ShiftedCosineScheduler",
    "SigmoidScheduler",
    "SimpleScheduler",
    "Spacing",
    "SquaredCosScheduler",
    "TrailingScheduler",
    "VPScheduler",
    "ZeroTerminalScheduler",
    "make_scheduler",
]
