"""Figures for samples: over any features, with no network at hand."""

from .classifier import Classifier, classify, share_of, train_classifier
from .established import compute_features, fid, kid, sqrtm_eig, squared_mmd
from .extractors import FeatureExtractor
from .frechet import frechet_distance, gaussian_frechet, moments_frechet
from .inception import FIDInception, InceptionV3FeatureExtractor
from .kernel import (
    KernelDistance,
    kernel_distance,
    kernel_distance_of_subsets,
    polynomial_kernel,
)
from .making import make_extractor
from .manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from .measuring import Figures, Reference, features_of, figures_of, make_reference
from .moments import Moments
from .neighbours import Memorised, memorisation, memorised_share, nearest, nearest_other
from .pretrained import CLIPFeatureExtractor, DINOv2FeatureExtractor
from .small import SmallExtractor, train_small
from .statistics import Statistics, measure_data

__all__ = [
    "CLIPFeatureExtractor",
    "Classifier",
    "DINOv2FeatureExtractor",
    "DensityCoverage",
    "FIDInception",
    "FeatureExtractor",
    "Figures",
    "InceptionV3FeatureExtractor",
    "KernelDistance",
    "Memorised",
    "Moments",
    "PrecisionRecall",
    "Reference",
    "SmallExtractor",
    "Statistics",
    "classify",
    "compute_features",
    "density_coverage",
    "features_of",
    "fid",
    "figures_of",
    "frechet_distance",
    "gaussian_frechet",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "kid",
    "make_extractor",
    "make_reference",
    "measure_data",
    "memorisation",
    "memorised_share",
    "moments_frechet",
    "nearest",
    "nearest_other",
    "polynomial_kernel",
    "precision_recall",
    "share_of",
    "sqrtm_eig",
    "squared_mmd",
    "train_classifier",
    "train_small",
]
