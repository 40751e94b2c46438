"""Who reads what: properties of the pure functions, for any number of samples, batch size and world size."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_gsl.data.order import epoch_order, num_steps, parts_of, rank_batches, rank_share, share, windowed_order

SAMPLES = st.integers(1, 200)
BATCH = st.integers(1, 40)
WORLD = st.integers(1, 9)


@given(num_samples=st.integers(0, 300), world_size=WORLD)
def test_shares_cut_a_batch_into_contiguous_parts_of_about_equal_size(num_samples: int, world_size: int) -> None:
    parts = [np.arange(num_samples)[share(num_samples, rank=r, world_size=world_size)] for r in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(num_samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(num_samples=st.integers(0, 300), world_size=WORLD, more=st.integers(0, 20))
def test_the_parts_of_a_step_are_the_same_for_every_world_size(num_samples: int, world_size: int, more: int) -> None:
    parts = world_size + more
    mine = [parts_of(rank=r, world_size=world_size, parts=parts) for r in range(world_size)]
    assert [number for numbers in mine for number in numbers] == list(range(parts))
    assert all(len(numbers) >= 1 for numbers in mine)
    assert max(map(len, mine)) - min(map(len, mine)) <= 1
    for r, numbers in enumerate(mine):
        samples = np.concatenate([np.arange(num_samples)[share(num_samples, rank=n, world_size=parts)] for n in numbers])
        np.testing.assert_array_equal(np.arange(num_samples)[rank_share(num_samples, rank=r, world_size=world_size, parts=parts)], samples)


@given(num_samples=SAMPLES, batch_size=BATCH, world_size=WORLD, epoch=st.integers(0, 3))
def test_training_gives_every_world_size_the_same_global_batches(
    num_samples: int, batch_size: int, world_size: int, epoch: int
) -> None:
    batch_size = max(batch_size, world_size)
    order = epoch_order(num_samples, seed=5, epoch=epoch, shuffle=True)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    alone = rank_batches(order, batch_size=batch_size, rank=0, world_size=1, drop_last=True)
    assert [len(batch) for batch in alone] == [batch_size] * (num_samples // batch_size)
    ranks = [
        rank_batches(order, batch_size=batch_size, rank=r, world_size=world_size, drop_last=True)
        for r in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([batches[step] for batches in ranks]), batch)


@given(num_samples=SAMPLES, batch_size=BATCH, world_size=WORLD)
def test_evaluation_visits_every_sample_once(num_samples: int, batch_size: int, world_size: int) -> None:
    batch_size = max(batch_size, world_size)
    order = epoch_order(num_samples, seed=0, epoch=0, shuffle=False)
    ranks = [
        rank_batches(order, batch_size=batch_size, rank=r, world_size=world_size, drop_last=False)
        for r in range(world_size)
    ]
    visited = np.concatenate([part for batches in ranks for part in batches])
    np.testing.assert_array_equal(np.sort(visited), np.arange(num_samples))
    for rank, batches in enumerate(ranks):
        full = share(batch_size, rank=rank, world_size=world_size)
        # The reader cuts the rank's order into runs of one length: only the last one may be shorter.
        assert all(len(part) == full.stop - full.start for part in batches[:-1])
        assert all(0 < len(part) <= full.stop - full.start for part in batches[-1:])


@given(num_samples=SAMPLES, batch_size=BATCH, world_size=WORLD, drop_last=st.booleans(), data=st.data())
def test_starting_inside_an_epoch_gives_its_tail(
    num_samples: int, batch_size: int, world_size: int, drop_last: bool, data: st.DataObject
) -> None:
    batch_size = max(batch_size, world_size)
    start = data.draw(st.integers(0, num_steps(num_samples, batch_size=batch_size, drop_last=drop_last)))
    rank = data.draw(st.integers(0, world_size - 1))
    order = epoch_order(num_samples, seed=1, epoch=2, shuffle=True)

    def batches(start_step: int) -> list[np.ndarray]:
        return rank_batches(
            order,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            start_step=start_step,
        )

    tail = batches(0)[start:]
    assert len(batches(start)) == len(tail)
    for got, wanted in zip(batches(start), tail, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_order_follows_seed_and_epoch() -> None:
    orders = [tuple(epoch_order(50, seed=s, epoch=e, shuffle=True)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3
    assert orders[0] == tuple(epoch_order(50, seed=0, epoch=0, shuffle=True))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30), pages_at_once=st.integers(1, 8), epoch=st.integers(0, 3))
def test_windows_hold_whole_pages_in_random_order(sizes: list[int], pages_at_once: int, epoch: int) -> None:
    pages = np.repeat(np.arange(len(sizes)) * 2 + 5, sizes)
    order, window = windowed_order(pages, seed=3, epoch=epoch, pages_at_once=pages_at_once)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(pages)))
    assert (np.diff(window) >= 0).all()
    held = [set(pages[order[window == number]]) for number in range(window[-1] + 1)]
    assert [len(each) for each in held] == [pages_at_once] * (len(sizes) // pages_at_once) + ([len(sizes) % pages_at_once] if len(sizes) % pages_at_once else [])
    assert sum(map(len, held)) == len(sizes)  # no page in two windows


def test_windowed_orders_are_uniform() -> None:
    """Of three pages of two samples, two at once: who comes first, and which pages share a window."""
    pages = np.repeat([0, 1, 2], 2)
    found = [windowed_order(pages, seed=1, epoch=epoch, pages_at_once=2)[0] for epoch in range(3000)]
    for counts in (np.bincount([order[0] for order in found]), np.bincount([order[-1] for order in found])):
        assert len(counts) == 6
        assert counts.min() > 420  # of 500; the deviation is 20
    neighbours = np.mean([order[0] // 2 == order[1] // 2 for order in found])
    assert abs(neighbours - 1 / 3) < 0.05  # shuffled over both pages, not one after the other
