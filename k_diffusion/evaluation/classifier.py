"""A small image classifier, trained on the data at hand: a judge of samples with no download."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class Classifier(nn.Module):
    """Three convolutions, a pooled feature vector, and a linear layer.

    Args:
        channels: channels of the images.
        num_classes: classes to tell apart.
        width: channels of the first convolution; features are four times as many.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.SiLU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, 4 * width),
            nn.SiLU(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The penultimate layer of images (count, channels, height, width): (count, features)."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of shape (count, classes)."""
        return self.head(self.body(images))


def train_classifier(
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int = 40,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    shift: int = 1,
    seed: int = 0,
    look: Callable[[], None] = lambda: None,
) -> Classifier:
    """Train a `Classifier`; the same arguments give the same weights on one machine.

    Args:
        images: values in [-1, 1], shape (count, channels, height, width).
        labels: class of each image from 0, shape (count,).
        epochs: passes over the images.
        batch_size: images a step.
        learning_rate: the peak of a one-cycle schedule.
        shift: each image is moved by up to this many pixels a side, at random.
        seed: of the weights, the order and the shifts. The global generator is left alone.
        look: called after each step; it may raise to end this.

    Returns:
        The classifier in evaluation mode.
    """
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(images) < 2:
        raise ValueError(
            f"images of shape {tuple(images.shape)} do not go with labels of shape "
            f"{tuple(labels.shape)}; (count, channels, height, width) and (count,) fit"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], int(labels.max()) + 1).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps)
    for _ in range(epochs):
        # Equal parts, so that no batch is a single image (its variance would be nothing).
        for batch in torch.randperm(len(images), generator=generator).tensor_split(steps):
            moved = _moved(images[batch], shift, generator)
            loss = functional.cross_entropy(model(moved), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            look()
    return model.eval()


@torch.no_grad()
def classify(
    model: Classifier, images: torch.Tensor, *, batch_size: int = 500
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest class of each image, shape (count,), and its features (count, features)."""
    features = torch.cat([model.features(part) for part in images.split(batch_size)])
    return model.head(features).argmax(1), features


def share_of(found: torch.Tensor, asked: torch.Tensor) -> float:
    """The share of equal entries of two class vectors of shape (count,)."""
    if found.shape != asked.shape or not len(found):
        raise ValueError(f"classes of shapes {tuple(found.shape)} and {tuple(asked.shape)} differ")
    return float((found == asked).double().mean())


def _moved(images: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by its own whole number of pixels; the edge is repeated."""
    if not shift:
        return images
    height, width = images.shape[-2:]
    padded = functional.pad(images, [shift] * 4, mode="replicate")
    offsets = torch.randint(0, 2 * shift + 1, (2, len(images)), generator=generator)
    rows = (offsets[0, :, None] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1, :, None] + torch.arange(width))[:, None, None, :]
    which = torch.arange(len(images))[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[which, channels, rows, columns]
