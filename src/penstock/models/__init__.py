"""Models: one decoder driven by ModelSpec, and the loader of its weights."""

from penstock.layers import Placement
from penstock.models.decoder import Block, Decoder
from penstock.models.weights import load_decoder, numerics_id

__all__ = ["Block", "Decoder", "Placement", "load_decoder", "numerics_id"]
