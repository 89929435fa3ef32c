"""Models: one decoder driven by ModelSpec, and the loader of its weights."""

from penstock.layers import Placement
from penstock.models.decoder import Block, Decoder
from penstock.models.encoder import Encoder
from penstock.models.encoder_weights import load_encoder, open_encoder
from penstock.models.weights import load_decoder, numerics_id, open_tensors

__all__ = [
    "Block",
    "Decoder",
    "Encoder",
    "Placement",
    "load_decoder",
    "load_encoder",
    "numerics_id",
    "open_encoder",
    "open_tensors",
]
