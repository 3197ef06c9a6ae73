"""What can be set of anchors, wherever it is set. Torch-free."""

from typing import Annotated

from pydantic import AfterValidator

from onelayer.compiler.factors.stored_forms import EXACT_BITS

ANCHOR_BITS = (1, 2, 4, EXACT_BITS)
BITS_RULE = "be 1, 2, 4 or 32"
# Steps between renewals of anchors, if nobody says otherwise: renewing twice as often, or half as often, changed the
# result by no more than the noise (manifests/LOG.md).
ANCHOR_EVERY = 10


def _known_bits(bits: int) -> int:
    if bits not in ANCHOR_BITS:
        raise ValueError(f"must {BITS_RULE}")
    return bits


AnchorBits = Annotated[int, AfterValidator(_known_bits)]
