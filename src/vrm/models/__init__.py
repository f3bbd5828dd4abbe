"""Networks: built by name, tapped for features, frozen as teachers, with weights and cards in files."""

from vrm.models.card import Card
from vrm.models.preprocess import Preprocess
from vrm.models.registry import Description, create, created_as, describe, names
from vrm.models.taps import NetworkError, Tap, TappedNetwork, known_taps, probe
from vrm.models.teacher import FrozenTeacher, check_separate
from vrm.models.weights import SeveralWeights, load_weights, save_tensors, save_weights, weights_hash
from vrm.models.wrappers import unwrap

__all__ = [
    "Card",
    "Description",
    "FrozenTeacher",
    "NetworkError",
    "Preprocess",
    "SeveralWeights",
    "Tap",
    "TappedNetwork",
    "check_separate",
    "create",
    "created_as",
    "describe",
    "known_taps",
    "load_weights",
    "names",
    "probe",
    "save_tensors",
    "save_weights",
    "unwrap",
    "weights_hash",
]
