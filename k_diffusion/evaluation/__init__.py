"""Figures for samples: over any features, with no network at hand."""

from .classifier import Classifier, classify, share_of, train_classifier
from .frechet import frechet_distance, gaussian_frechet
from .neighbours import memorised_share, nearest, nearest_other

__all__ = [
    "Classifier",
    "classify",
    "frechet_distance",
    "gaussian_frechet",
    "memorised_share",
    "nearest",
    "nearest_other",
    "share_of",
    "train_classifier",
]
