"""An extractor trained on the data at hand, where there is no network to fetch one by.

With classes it learns to tell them apart; without, to know each image again after it was moved,
cropped and noised (Chen et al. 2020, arXiv:2002.05709, equation 1). Its figures say more of shapes
and strokes than of meaning, and hold only beside others of the very same extractor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from k_diffusion.evaluation.classifier import Classifier, _moved, train_classifier
from k_diffusion.evaluation.extractors import FeatureExtractor, load_tensors
from k_diffusion.evaluation.reading import LARGEST, smaller
from k_diffusion.utils.images import write_whole
from k_diffusion.utils.words import reason_of

IMAGES_SEEN = 60_000
BATCH = 64
TEMPERATURE = 0.2


class SmallExtractor(FeatureExtractor):
    """96 features: those of a `Classifier` before its last layer.

    Args:
        network: trained.
        facts: JSON data: how it was trained, "channels", "outputs" and "data" (a hash) among them.
        device: where it computes.
    """

    input = f"as they are, or antialiased to {LARGEST} pixels on the longer side"

    def __init__(
        self, network: Classifier, facts: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.network, self.trained = network, dict(facts)
        self.name = f"small-{facts['data'][:12]}"
        self.frozen(device)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(smaller(images.float()))

    def save(self, path: Path) -> None:
        """Write weights and facts into one safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: t.cpu().contiguous() for name, t in self.network.state_dict().items()}
        text = {"small_extractor": json.dumps(self.trained)}
        write_whole(path, lambda file: save_file(tensors, file, metadata=text))

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> SmallExtractor:
        """What `save` wrote.

        Args:
            path: the file.
            device: where it computes; "meta": nowhere, and the values are not read.

        Raises:
            ValueError: it is missing, damaged or something else.
        """
        from k_diffusion.utils.files import get_safetensors_metadata

        read = "meta" if str(device) == "meta" else "cpu"
        tensors = load_tensors(path, read)
        text = (get_safetensors_metadata(path) or {}).get("small_extractor")
        try:
            facts = json.loads(text or "")
            with torch.device(read):
                network = Classifier(int(facts["channels"]), int(facts["outputs"]))
            network.load_state_dict(tensors)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = reason_of(error)[:200]
            raise ValueError(f"{path} holds no small extractor: {reason}") from None
        return cls(network, facts, device)


def train_small(
    images: Tensor,
    labels: Tensor | None,
    data: str,
    *,
    images_seen: int = IMAGES_SEEN,
    seed: int = 0,
    device: torch.device | str = "cpu",
    look: Callable[[], None] = lambda: None,
) -> SmallExtractor:
    """Train one; the same arguments give the same weights on one machine.

    On the CPU one thread does it: sums that several share come out in other digits, and another
    network would follow from them.

    Args:
        images: values in [-1, 1], shape (count, channels, height, width).
        labels: class of each, shape (count,); None, or all alike: without classes.
        data: a hash of the data, which its name begins.
        images_seen: how long.
        seed: of the weights and everything drawn. The global generators are left alone.
        device: where it trains and then computes.
        look: called after each step; it may raise to end this.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; a small extractor is trained on (count, "
            "channels, height, width) with at least 2 images"
        )
    images = torch.cat([smaller(part.float()) for part in images.split(256)])
    told = labels is not None and bool((labels != labels[0]).any())
    epochs = max(1, round(images_seen / len(images)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if told:
            assert labels is not None
            network = train_classifier(
                images.to(device),
                labels.to(device),
                epochs=epochs,
                batch_size=BATCH,
                seed=seed,
                look=look,
            )
        else:
            network = _train_contrast(images.to(device), images_seen, seed, look)
    finally:
        torch.set_num_threads(threads)
    facts = {
        "data": data,
        "learned": "classes" if told else "instances",
        "images": len(images),
        "images_seen": epochs * len(images) if told else images_seen,
        "seed": seed,
        "channels": images.shape[1],
        "outputs": network.head.out_features,
        "torch": torch.__version__,
        "device": torch.device(device).type,
    }
    return SmallExtractor(network, facts, device)


def contrast(codes: Tensor) -> Tensor:
    """The mean over all views of how surely each finds the other view of its image.

    Args:
        codes: of length 1, the first views of all images, then the second: shape (2 B, D).

    Source: Chen et al. 2020, arXiv:2002.05709, equation 1.
    """
    own = torch.arange(len(codes), device=codes.device)
    likeness = codes @ codes.T / TEMPERATURE
    likeness[own, own] = -torch.inf
    return functional.cross_entropy(likeness, own.roll(len(codes) // 2))


def _train_contrast(
    images: Tensor, images_seen: int, seed: int, look: Callable[[], None]
) -> Classifier:
    """Two views of an image shall be nearer to one another than to those of others."""
    batch = min(BATCH, len(images))
    steps = max(1, images_seen // batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], 64).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        chosen = images[torch.randint(len(images), (batch,), generator=generator)]
        views = torch.cat([_view(chosen, generator), _view(chosen, generator)])
        loss = contrast(functional.normalize(model(views)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        look()
    model.eval()
    nn.Module.requires_grad_(model, False)
    return model


def _view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved, scaled in contrast, shifted in brightness and noised, each by its own draws."""
    shift = max(1, min(images.shape[-2:]) // 8)
    moved = _moved(images, shift, generator)
    draws = torch.rand(len(images), 2, 1, 1, 1, generator=generator).to(images)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return moved * (0.7 + 0.6 * draws[:, 0]) + 0.4 * (draws[:, 1] - 0.5) + 0.1 * noise
