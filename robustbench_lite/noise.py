"""Random numbers that depend on what they are for, and on nothing else: not on the batch, the order or the device."""

import hashlib
import math

import torch
from torch import Tensor

_GAMMA = (
    -0x61C8864680B583EB
)  # splitmix64 (Steele, Lea & Flood, 2014): 0x9E3779B97F4A7C15 and the two multipliers, signed
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _scramble(z: Tensor) -> Tensor:
    """Works in place."""
    z = z.bitwise_xor_(_shift(z, 30)).mul_(_MIX[0])
    z = z.bitwise_xor_(_shift(z, 27)).mul_(_MIX[1])
    return z.bitwise_xor_(_shift(z, 31))


class Noise:
    """A stream of random numbers for each row, keyed by (seed, row of the data set, path of names).

    ``rows`` is (B,) int64. The same key gives the same numbers, however often it is asked: take another path
    (``noise.at("restart", 2)``) to get others. Every method takes a batch ``like`` (B, ...) for shape, type and device.
    """

    def __init__(self, seed: int, rows: Tensor, path: tuple[str | int, ...] = ()) -> None:
        self.seed, self.rows, self.path = seed, rows, path

    def at(self, *path: str | int) -> "Noise":
        """Another stream for the same rows."""
        return Noise(self.seed, self.rows, self.path + path)

    def over(self, rows: Tensor) -> "Noise":
        """The same stream for other rows of the data set."""
        return Noise(self.seed, rows, self.path)

    def padded(self, missing: int) -> "Noise":
        """The same with the last row ``missing`` times more."""
        return self.over(torch.cat([self.rows, self.rows[-1:].expand(missing)]))

    def __getitem__(self, mask: Tensor | slice) -> "Noise":
        return self.over(self.rows[mask.to(self.rows.device) if isinstance(mask, Tensor) else mask])

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1)."""
        count = math.prod(like.shape[1:])
        if like.dtype == torch.float64:
            return self._bits(like, count).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53).view(like.shape)
        bits = self._bits(like, -(-count // 2))
        halves = torch.cat([_shift(bits, 40), bits.bitwise_and_((1 << 24) - 1)], 1)[:, :count]
        return halves.to(like.dtype).mul_(2.0**-24).reshape(like.shape)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal (Box & Muller, 1958: two numbers from the two halves of one word)."""
        count = math.prod(like.shape[1:])
        bits = self._bits(like, -(-count // 2))
        real = torch.float64 if like.dtype == torch.float64 else torch.float32
        high, low = ((half.to(real) + 0.5) * 2.0**-32 for half in (_shift(bits, 32), bits & 0xFFFFFFFF))
        radius, angle = (-2 * high.log()).sqrt(), 2 * math.pi * low
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
        return both.to(like.dtype).reshape(like.shape)

    def signs(self, like: Tensor) -> Tensor:
        """-1 or 1, evenly."""
        return (1 - 2 * _shift(self._bits(like, math.prod(like.shape[1:])), 63)).to(like.dtype).view(like.shape)

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Whole numbers in [0, high), int64."""
        unit = _shift(self._bits(like, math.prod(like.shape[1:])), 11).double() * 2.0**-53
        return (unit * high).long().view(like.shape)

    def permutation(self, like: Tensor) -> Tensor:
        """A random order of each row's entries: int64, each of 0 .. n-1 once."""
        return self._bits(like, math.prod(like.shape[1:])).argsort(1).view(like.shape)

    def _bits(self, like: Tensor, count: int) -> Tensor:
        """(B, count) int64, every bit random."""
        if like.shape[0] != len(self.rows):
            raise ValueError(f"noise for {len(self.rows)} rows was asked for a batch of {like.shape[0]}")
        digest = hashlib.blake2b(repr((self.seed, self.path)).encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        start = _scramble(_scramble(self.rows.to(like.device) * _GAMMA + key) + _GAMMA)
        return _scramble(start.unsqueeze(1) + torch.arange(1, count + 1, device=like.device) * _GAMMA)
