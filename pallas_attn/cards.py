"""What is known of a GPU before anything is compiled: a program's shared memory."""

from __future__ import annotations

import re


# KiB that one program may use, by compute capability (CUDA C++ Programming Guide,
# technical specifications per compute capability: maximum per thread block).
LARGEST = 227
LARGE = 160  # from here on a card takes the blocks that were timed on an H200
KIB = {
    "8.0": 163,
    "8.6": 99,
    "8.7": 163,
    "8.9": 99,
    "12.0": 99,
    "12.1": 99,
}

# An abstract device has a name alone. These are names of cards with 99 KiB: 8.6 (A10
# and its like, RTX 30, RTX A6000), 8.9 (L4 and its like, RTX 40, Ada) and 12 (RTX 50,
# RTX PRO, GB10).
SMALL = re.compile(r"\b(A2|A10|A10G|A10M|A16|A40|L4|L20|L40|L40S|RTX|GB10)\b")


def shared_kib(capability: str | None, kind: str = "") -> int:
    """KiB of shared memory that one program may use.

    Args:
        capability: Of the device, such as "9.0"; None where its name alone is known.
        kind: The device's name, as `jax.Device.device_kind` has it.

    Returns:
        That of the card; the most there is where neither says.

    >>> shared_kib("8.6"), shared_kib("9.0"), shared_kib(None, "NVIDIA L40S")
    (99, 227, 99)
    """
    if capability is not None:
        return KIB.get(capability, LARGEST)
    return KIB["8.6"] if SMALL.search(kind) else LARGEST
