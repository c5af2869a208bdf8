"""What training keeps between the forward and the backward pass: scopes around anyone's training step."""

from pintpot.activations._base import ActivationMethod
from pintpot.activations.chunked_cross_entropy import ChunkedCrossEntropy
from pintpot.activations.sublinear_checkpointing import SublinearCheckpointing

TECHNIQUES = ("sublinear_checkpointing", "chunked_cross_entropy")

__all__ = ["TECHNIQUES", "ActivationMethod", "ChunkedCrossEntropy", "SublinearCheckpointing"]
