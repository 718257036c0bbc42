"""The established module `config`: from a JSON config to a model, its Denoiser, its noise levels.

    config = load_config("config.json")                 # or the .safetensors of a trained model
    model = make_model(config)
    denoiser = make_denoiser_wrapper(config)(model)     # has a loss, too
    sample_density = make_sample_density(config["model"])

    denoiser = load_model("model.safetensors")          # all in one, with the weights

A config is plain data, from which no code runs. What cannot work is refused in one line, which
names the key, its value and the way out.
"""

from k_diffusion.config.density import make_sample_density
from k_diffusion.config.making import load_model, make_denoiser_wrapper, make_model
from k_diffusion.config.reading import load_config, round_to_power_of_two

__all__ = [
    "load_config",
    "load_model",
    "make_denoiser_wrapper",
    "make_model",
    "make_sample_density",
    "round_to_power_of_two",
]
