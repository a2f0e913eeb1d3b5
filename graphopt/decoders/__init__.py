"""Language models: which input is what, writing text, calibration on it, cross-entropy, and what is recalled."""

from graphopt.decoders.driver import Driver
from graphopt.decoders.generate import generate, logits, stream
from graphopt.decoders.interface import Interface, Memory
from graphopt.decoders.perplexity import Score, cross_entropy
from graphopt.decoders.recall import Recall, key_value_recall, recall
from graphopt.decoders.sample import self_calibration, text_batches

__all__ = [
    "Driver",
    "Interface",
    "Memory",
    "Recall",
    "Score",
    "cross_entropy",
    "generate",
    "key_value_recall",
    "logits",
    "recall",
    "self_calibration",
    "stream",
    "text_batches",
]
