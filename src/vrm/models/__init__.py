"""Networks: built by name, tapped for features, frozen as teachers, with weights and cards in files."""

from vrm.models.card import Card
from vrm.models.inputs import IMAGENET, LibraryInput, grey_statistics, input_channels, library_input
from vrm.models.preprocess import Preprocess
from vrm.models.registry import Description, create, created_as, describe, names
from vrm.models.taps import NetworkError, Tap, TappedNetwork, accepts, known_taps, probe
from vrm.models.teacher import FrozenTeacher, check_separate
from vrm.models.weights import SeveralWeights, load_weights, save_tensors, save_weights, weights_hash
from vrm.models.wrappers import unwrap

__all__ = [
    "IMAGENET",
    "Card",
    "Description",
    "FrozenTeacher",
    "LibraryInput",
    "NetworkError",
    "Preprocess",
    "SeveralWeights",
    "Tap",
    "TappedNetwork",
    "accepts",
    "check_separate",
    "create",
    "created_as",
    "describe",
    "grey_statistics",
    "input_channels",
    "known_taps",
    "library_input",
    "load_weights",
    "names",
    "probe",
    "save_tensors",
    "save_weights",
    "unwrap",
    "weights_hash",
]
