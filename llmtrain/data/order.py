"""Which sample comes next: a pure function of (seed, epoch, position), in O(1) memory and without state.

The order of an epoch is a keyed pseudo-random permutation of the window indices, computed and never stored: a Feistel
network (Luby and Rackoff 1988) on the smallest power-of-two domain that holds them, with cycle walking (Black and
Rogaway 2002, section 3) back into range. So any position of any epoch is known at once, on any rank, and raising the
number of steps cannot change the past.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_ROUNDS = 8  # four make a strong permutation in theory; small domains need more to look uniform (see the tests)
_MIN_BITS = 6  # on 4 bits some orders of four windows came too often (chi-square 104 at 23 degrees of freedom)
_MASK64 = (1 << 64) - 1


def sample_ids(positions: Int64s, windows: int, seed: int) -> Int64s:
    """Map positions in the endless stream of samples to window indices.

    Args:
        positions: (n,) positions ≥ 0; position // windows is the epoch.
        windows: number of windows in one epoch.
        seed: of the run.

    Returns:
        (n,) window indices in [0, windows); each epoch visits every window exactly once, in an order of its own.
    """
    epochs, offsets = np.divmod(positions, windows)
    distinct, epoch_of = np.unique(epochs, return_inverse=True)
    keys = np.array([_epoch_key(seed, epoch) for epoch in distinct.tolist()], dtype=np.uint64)
    return _permute(offsets, windows, _round_keys(keys if len(keys) < 2 else keys[epoch_of]))


def seed_of_source(seed: int, source: int) -> int:
    """The seed for one source of a mixture; the first source has that of the run."""
    return seed if source == 0 else _mix_int(_mix_int(seed + 0x8CB92BA72F3D8DD7) ^ _mix_int(source))


def permute(offsets: Int64s, size: int, key: int) -> Int64s:
    """Apply the permutation of [0, size) named by the 64-bit `key` to `offsets`, shape (n,)."""
    return _permute(offsets, size, _round_keys(np.array([key], dtype=np.uint64)))


def _permute(offsets: Int64s, size: int, round_keys: UInt64s) -> Int64s:
    """`round_keys` are (rounds, n), one column for each offset, or (rounds, 1) for all."""
    bits = max(_MIN_BITS, (size - 1).bit_length())
    values = _feistel(offsets.astype(np.uint64), bits, round_keys)
    while (outside := np.flatnonzero(values >= size)).size:  # expected: fewer than two walks, the domain is < 2 × size
        keys = round_keys if round_keys.shape[1] == 1 else round_keys[:, outside]
        values[outside] = _feistel(values[outside], bits, keys)
    return values.astype(np.int64)


def _round_keys(keys: UInt64s) -> UInt64s:
    """From (n,) keys to (rounds, n)."""
    steps = np.arange(_ROUNDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(keys + steps[:, None], np.uint64(0))


def _feistel(values: UInt64s, bits: int, round_keys: UInt64s) -> UInt64s:
    """XOR a hash of one half into the other, by turns; each round undoes itself, so the whole is a bijection."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for index, key in enumerate(round_keys):
        if index % 2:
            low ^= _mix(high, key) & low_mask
        else:
            high ^= _mix(low, key) & high_mask
    return (high << low_bits) | low


def _mix(values: UInt64s, key: UInt64s | np.uint64) -> UInt64s:
    """Hash 64-bit words under a key: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), vectorised."""
    words = values + key
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _mix_int(word: int) -> int:
    """The same hash of one Python integer."""
    word &= _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)


def _epoch_key(seed: int, epoch: int) -> int:
    return _mix_int(_mix_int(seed + 0x9E3779B97F4A7C15) ^ _mix_int(epoch + 0xD1B54A32D192ED03))
