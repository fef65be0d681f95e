"""Seeds from names: the random numbers for a purpose depend only on that purpose, not on other
draws or on the process.
"""

import hashlib


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any values whose repr is stable, equal in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
