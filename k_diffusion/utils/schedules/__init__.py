"""The noise schedules, by kind; `k_diffusion.utils.scheduler` offers them all."""
