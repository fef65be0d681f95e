"""The key-value cache of all positions read so far, so that every token passes through the decoder
once.
"""

from collections.abc import Sequence
from typing import Self

import torch


class KeyValueCache:
    """A forward pass first calls `append_attributes`, then `update` once in every layer.

    capacity: the initial number of positions; reading more doubles the buffers.
    """

    def __init__(self, capacity: int = 256) -> None:
        self.length = 0
        """The number of positions read so far, including the positions of the current pass once
        their attributes are appended.
        """
        self._capacity = capacity
        self._attributes: torch.Tensor | None = None
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    @classmethod
    def joined(cls, caches: Sequence["KeyValueCache"], capacity: int) -> Self:
        """A copy of caches of one row each as the rows of one cache with room for `capacity`
        positions. Shorter rows are padded on the left, with attribute class 0.

        A cache that occurs several times is copied in one step.
        """
        joined = cls(max(capacity, *(cache.length for cache in caches)))
        joined.length = max(cache.length for cache in caches)
        rows_of: dict[int, list[int]] = {}
        for row, cache in enumerate(caches):
            rows_of.setdefault(id(cache), []).append(row)

        def join(buffers: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
            shape = [len(caches), *buffers[0].shape[1:]]
            shape[dim] = joined._capacity
            whole = buffers[0].new_zeros(shape)
            for rows in rows_of.values():
                length = caches[rows[0]].length
                place = whole.narrow(dim, joined.length - length, length)
                place[rows] = buffers[rows[0]].narrow(dim, 0, length)
            return whole

        first = caches[0]
        if first._attributes is not None:
            joined._attributes = join([c._attributes for c in caches], dim=1)  # type: ignore
        joined._keys = {n: join([c._keys[n] for c in caches], dim=2) for n in first._keys}
        joined._values = {n: join([c._values[n] for c in caches], dim=2) for n in first._values}
        return joined

    def append_attributes(self, attributes_BL: torch.Tensor) -> torch.Tensor:
        """Append the attribute classes of the L tokens of this pass, and return those of all
        positions, (B, length).
        """
        self.length += attributes_BL.shape[1]
        if self.length > self._capacity:
            self._capacity = max(self.length, 2 * self._capacity)
        self._attributes = self._write(self._attributes, attributes_BL, dim=1)
        return self.attributes

    @property
    def attributes(self) -> torch.Tensor:
        """The attribute classes of all positions, (B, length)."""
        assert self._attributes is not None, "nothing has been read yet"
        return self._attributes[:, : self.length]

    def update(
        self, layer: int, keys_BHLD: torch.Tensor, values_BHLD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one layer's keys and values of the L tokens, and return views of those of all
        positions, (B, H, length, D).
        """
        self._keys[layer] = self._write(self._keys.get(layer), keys_BHLD, dim=2)
        self._values[layer] = self._write(self._values.get(layer), values_BHLD, dim=2)
        return self.of_layer(layer)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's keys and values of all positions, (B, H, length, D)."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def select(self, rows_b: torch.Tensor) -> None:
        """Keep only these rows of the batch (indices), in this order."""
        if self._attributes is not None:
            self._attributes = self._attributes[rows_b.to(self._attributes.device)]
        for buffers in (self._keys, self._values):
            for layer, buffer in buffers.items():
                buffers[layer] = buffer[rows_b.to(buffer.device)]

    @property
    def bytes(self) -> int:
        """The memory of the keys and values of the positions read so far."""
        return sum(
            buffer[:, :, : self.length].numel() * buffer.element_size()
            for buffers in (self._keys, self._values)
            for buffer in buffers.values()
        )

    def _write(self, buffer: torch.Tensor | None, new: torch.Tensor, dim: int) -> torch.Tensor:
        """Append `new` to the content of `buffer` along `dim`, in a larger buffer if it does not
        fit.
        """
        start = self.length - new.shape[dim]
        if buffer is None or buffer.shape[dim] < self.length:
            shape = list(new.shape)
            shape[dim] = self._capacity
            larger = new.new_zeros(shape)
            if buffer is not None:
                larger.narrow(dim, 0, start).copy_(buffer.narrow(dim, 0, start))
            buffer = larger
        buffer.narrow(dim, start, new.shape[dim]).copy_(new)
        return buffer


class SharedPast:
    """What one row has read, as the past of `rows` rows. What these append is not kept, so that the
    past is never copied for each of them, except within a layer.
    """

    def __init__(self, past: KeyValueCache, rows: int) -> None:
        self._past = past
        self._rows = rows
        self._read = past.length
        self.length = past.length

    def append_attributes(self, attributes_BL: torch.Tensor) -> torch.Tensor:
        self.length = self._read + attributes_BL.shape[1]
        past_1L = self._past.attributes
        return torch.cat([past_1L.expand(self._rows, -1), attributes_BL], dim=1)

    def update(
        self, layer: int, keys_BHLD: torch.Tensor, values_BHLD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past = (x.expand(self._rows, -1, -1, -1) for x in self._past.of_layer(layer))
        keys, values = (
            torch.cat(pair, dim=2) for pair in zip(past, (keys_BHLD, values_BHLD), strict=True)
        )
        return keys, values
