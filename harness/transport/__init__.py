"""The wire between devices: authenticated connections, typed frames, received straight into where they belong."""

from harness.transport.frames import DTYPES, HEADER_BYTES, ITEM_BYTES, MAX_DIMENSIONS, Frame, PeerLost, TransportError
from harness.transport.receiver import Inbox
from harness.transport.tls import TLS, make_certificate
from harness.transport.transport import Transport

__all__ = [
    "DTYPES",
    "HEADER_BYTES",
    "ITEM_BYTES",
    "MAX_DIMENSIONS",
    "TLS",
    "Frame",
    "Inbox",
    "PeerLost",
    "Transport",
    "TransportError",
    "make_certificate",
]
