"""What a model is told on the command line: a condition, and what guidance goes away from."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .problems import UsageError, as_usage

if TYPE_CHECKING:
    import torch

    from k_diffusion.training.checkpoint import CheckpointInfo
    from k_diffusion.training.dataset import Source
    from k_diffusion.training.told import Told


@dataclass
class Teller:
    """Reads the words of `--condition` and `--negative` as a checkpoint was trained to be told.

    Attributes:
        info: of the checkpoint.
        denoiser: of it.
        device: of the conditions.
    """

    info: CheckpointInfo
    denoiser: Any
    device: torch.device

    def condition(self, words: Sequence[str]) -> dict[str, torch.Tensor]:
        """What all images are told, as a batch of one; none where the checkpoint knows of none."""
        if words:
            return self._read("condition", words)
        conditioner = self._conditioner if self.info.config.get("conditioner") else None
        if conditioner is None:
            return {}
        try:
            nothing: dict[str, torch.Tensor] = conditioner.null(1)
        except ValueError:  # its shape is not known beforehand
            return {}
        return nothing

    def told(self, condition: Mapping[str, torch.Tensor], labels: Sequence[int]) -> Told:
        """What each image is told.

        Args:
            condition: what all are told, as a batch of one.
            labels: the class of each; empty: none.
        """
        from k_diffusion.training.told import Told

        network = self.denoiser.network
        return Told(
            network,
            self.device,
            labels=labels,
            common=condition,
            conditioner=None if hasattr(network, "drop_condition") else self._conditioner,
        )

    def told_as_data(
        self, words: Sequence[str], data: Source, counts: Sequence[int], number: int, seed: int
    ) -> Told:
        """What so many images are told, so that they can be held against those of the data.

        Args:
            words: of `--condition`; none: as `make_told` has it.
            data: the real images.
            counts: of each class.
            number: of images.
            seed: of the first.

        Raises:
            UsageError: these data do not hold what the model is told.
        """
        from k_diffusion.evaluation.measuring import class_labels
        from k_diffusion.models.registry import known_classes
        from k_diffusion.training.evaluating import in_shares, shares_of
        from k_diffusion.training.told import make_told

        network, device = self.denoiser.network, self.device
        if words:
            condition, labels = self.condition(words), list[int]()
            if (classes := known_classes(network)) and "class_label" not in condition:
                labels = class_labels(shares_of(counts, classes), number)
            return self.told(condition, labels)
        conditioner, lay = self._conditioner, in_shares(counts)
        told = make_told(network, conditioner, data, number, lay, seed=seed, device=device)
        try:
            told([0])
        except ValueError as error:
            raise UsageError(
                f"without --condition the samples are told what images of the data are, but {error}"
            ) from None
        return told

    def null(self, words: Sequence[str], told: Told) -> Any:
        """What guidance goes away from; None: what the network calls nothing.

        Args:
            words: of `--negative`.
            told: what the images are told.

        Raises:
            UsageError: that is nothing, or the model does not know how to be told nothing.
        """
        if not told.anything:
            raise UsageError(
                f"--guidance needs something that the model is told, but {self.info.path} was "
                "trained without: give --guide, a lesser checkpoint of it"
            )
        if words:
            return self._read("negative", words)
        if self.info.config.get("condition_dropout", 1) == 0:
            raise UsageError(
                f"--guidance compares with a model that is told nothing, but {self.info.path} was "
                "trained with condition_dropout = 0 and always told: give --negative, or --guide"
            )
        return told.null

    @functools.cached_property
    def _conditioner(self) -> Any:
        from k_diffusion.training.restore import load_conditioner

        return load_conditioner(self.info, self.device)

    def _read(self, option: str, words: Sequence[str]) -> dict[str, torch.Tensor]:
        conditioner = self._conditioner
        if conditioner is None:
            raise UsageError(
                f"--{option} is {words[0]!r}, but {self.info.path} was trained without any; leave "
                "the option away"
            )
        with as_usage():
            raws = [_one(conditioner, word, option) for word in words]
            if isinstance(raws[0], Mapping):
                raws = [{name: raw for part in raws for name, raw in part.items()}]
            elif len(raws) > 1:
                raise ValueError(
                    f"--{option} is given {len(raws)} times, but this model is told one thing"
                )
            condition: dict[str, torch.Tensor] = conditioner(raws[0])
            self.denoiser.check_condition(1, **condition)
        return condition


def _one(conditioner: Any, word: str, option: str) -> Any:
    try:
        return conditioner.read(word)
    except (ValueError, TypeError) as error:
        said = str(error).replace("--condition", f"--{option}")
        raise ValueError(said if f"--{option}" in said else f"--{option} {word}: {said}") from error
