import torch

from icl_moe.inference.cache import KeyValueCache


def test_everything_read_comes_back_in_order_while_the_buffers_grow():
    cache, blocks = (
        KeyValueCache(capacity=3),
        [torch.randn(2, 4, length, 5) for length in (2, 1, 7, 1, 30)],
    )
    for number, block in enumerate(blocks, start=1):
        attributes = cache.append_attributes(torch.full((2, block.shape[2]), number))
        seen = torch.cat(blocks[:number], dim=2)
        assert cache.length == seen.shape[2]
        assert (
            attributes.tolist()
            == [[n for n, b in enumerate(blocks[:number], start=1) for _ in range(b.shape[2])]] * 2
        )
        for layer in (0, 3):
            keys, values = cache.update(layer, block + layer, -block)
            assert torch.equal(keys, torch.cat([b + layer for b in blocks[:number]], dim=2))
            assert torch.equal(values, -seen)


def test_appending_within_the_capacity_copies_nothing():
    cache = KeyValueCache(capacity=8)
    addresses = set()
    for _ in range(8):
        cache.append_attributes(torch.ones(1, 1))
        addresses.add(cache.update(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))[0].data_ptr())
    assert len(addresses) == 1


def test_selecting_rows_keeps_their_past():
    cache = KeyValueCache(capacity=4)
    cache.append_attributes(torch.tensor([[1, 1], [2, 2], [3, 3]]))
    rows = torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 1)
    cache.update(0, rows, rows)
    cache.select(torch.tensor([2, 0]))
    assert cache.append_attributes(torch.tensor([[3], [1]])).tolist() == [[3, 3, 3], [1, 1, 1]]
    keys, _ = cache.update(0, torch.tensor([2.0, 0.0]).reshape(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    assert keys[:, 0, :, 0].tolist() == [[2.0] * 3, [0.0] * 3]
