"""The order of training."""

from collections import Counter

import numpy as np
import pytest

from training.data.sampler import OpenSource, RankBatches, Sampler, permute, share_out


def source(count, ratio=1.0, kind="default", seed=0):
    lengths = np.random.default_rng(seed).integers(10, 4000, count).astype(np.int32)
    return OpenSource("", ratio, kind, lengths=lengths)


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 1000, 65537])
def test_permute_is_a_permutation(size):
    first, second = (permute(np.arange(size), size, key) for key in ((0, 1), (0, 2)))
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 100:
        assert (first != second).mean() > 0.9
        assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.2


def test_permute_needs_no_neighbours():
    """Any part of a permutation can be computed alone, in any order."""
    whole = permute(np.arange(1000), 1000, (7,))
    assert (permute(np.array([999, 3, 500]), 1000, (7,)) == whole[[999, 3, 500]]).all()


def test_an_epoch_takes_each_sample_once_and_another_epoch_another_order():
    sampler = Sampler([source(64), source(32, seed=1)], 8, seed=0)
    first, second = list(sampler.epoch(0)), list(sampler.epoch(1))
    assert len(first) == len(sampler) == 12
    assert Counter(number for step in first for number in step) == Counter(number for step in second for number in step)
    assert max(Counter(number for step in first for number in step).values()) == 1
    assert first != second
    assert first == list(Sampler([source(64), source(32, seed=1)], 8, seed=0).epoch(0))
    assert first != list(Sampler([source(64), source(32, seed=1)], 8, seed=1).epoch(0))


def test_ratios_draw_anew_each_epoch():
    sampler = Sampler([source(1000, 0.3), source(100, 2.5)], 10, seed=0)
    epochs = [Counter(number for step in sampler.epoch(epoch) for number in step) for epoch in range(2)]
    for drawn in epochs:
        assert sum(count for number, count in drawn.items() if number < 1000) == 300
        repeats = [count for number, count in drawn.items() if number >= 1000]
        assert sum(repeats) == 250 and set(repeats) == {2, 3} and len(repeats) == 100
    assert {number for number in epochs[0] if number < 1000} != {number for number in epochs[1] if number < 1000}


def test_types_are_never_mixed():
    sampler = Sampler([source(100, kind="a"), source(100, kind="b", seed=1), source(60, kind="a", seed=2)], 8, seed=0)
    kinds = [{"b" if 100 <= number < 200 else "a" for number in step} for step in sampler.epoch(0)]
    assert all(len(kind) == 1 for kind in kinds)
    assert [{sampler.types[number]} for number in sampler.order(0)] == kinds
    assert Counter(kind.pop() for kind in kinds) == {"a": 20, "b": 12}


def test_steps_hold_similar_lengths_within_windows():
    one = source(4096)
    sampler = Sampler([one], 16, seed=0, window=1024)
    spread = [np.ptp([one.lengths[number] for number in step]) for step in sampler.epoch(0)]
    assert np.mean(spread) < 150  # of 4000; a random sixteen spread over more than 3000
    firsts = [one.lengths[step[0]] for step in sampler.epoch(0)]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.3, "steps themselves come in random order"


@pytest.mark.parametrize("start", [1, 7, 63, 64, 65, 149])
def test_an_epoch_goes_on_from_any_step(start):
    sampler = Sampler([source(1000), source(500, 0.4, "b")], 8, seed=3, window=128)
    assert list(sampler.epoch(2, start)) == list(sampler.epoch(2))[start:]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_processes_and_accumulation_only_share_a_step_out(world, accumulation):
    sampler = Sampler([source(100)], 16, seed=0)
    ranks = [list(RankBatches(sampler, 2, accumulation, rank, world, (0, 3))) for rank in range(world)]
    found = [
        sorted(number for rank in ranks for batch in rank[i : i + accumulation] for number in batch)
        for i in range(0, len(ranks[0]), accumulation)
    ]
    assert found == [sorted(step) for epoch, start in ((0, 3), (1, 0)) for step in sampler.epoch(epoch, start)]
    assert all(len(batch) == 16 // world // accumulation for rank in ranks for batch in rank)


def test_what_does_not_fill_a_step_is_left_out():
    assert len(Sampler([source(7)], 8, seed=0)) == 0
    assert len(Sampler([source(15, kind="a"), source(7, kind="b")], 8, seed=0)) == 1


def test_a_large_record_starts_at_once():
    """An epoch of 20 million samples is entered in the middle without a table of it."""
    lengths = np.broadcast_to(np.int32(100), 20_000_000)
    sampler = Sampler([OpenSource("", lengths=lengths)], 128, seed=0)
    assert len(next(sampler.epoch(0, 100_000))) == 128


def test_dropped_conditions_depend_on_sample_and_epoch_alone():
    sampler = Sampler([OpenSource("", lengths=np.arange(4000) % 7)], 8, seed=3)
    plain, dropped = [list(RankBatches(sampler, 2, 1, 0, 1, (0, 0), condition_dropout=share)) for share in (0.0, 0.1)]
    assert [[-1 - n if n < 0 else n for n in batch] for batch in dropped] == plain
    epochs = [np.concatenate(dropped[:500]), np.concatenate(dropped[500:])]
    first, second = ({-1 - n for n in epoch if n < 0} for epoch in epochs)
    assert 300 < len(first) < 500 and first != second
    others = [list(RankBatches(sampler, 2, 2, rank, 2, (0, 0), condition_dropout=0.1)) for rank in range(2)]
    assert sorted(n for rank in others for batch in rank for n in batch) == sorted(n for b in dropped for n in b)


def mixed(count=512):
    """Long and short samples whose continuous tokens do not go by their discrete ones."""
    random = np.random.default_rng(0)
    images = random.choice([0, 730, 2200, 3700], count)
    lengths = np.where(images > 0, 1150, random.integers(30, 1500, count)).astype(np.int32)
    return OpenSource("", lengths=lengths, continuous=images.__getitem__)


@pytest.mark.parametrize(("world", "budget"), [(1, 9000), (4, 9000), (8, 5000), (16, 1000)])
def test_a_budget_of_tokens_is_kept_and_every_sample_comes_once(world, budget):
    sampler = Sampler([mixed(), source(64, kind="text")], 64, seed=0)
    ranks = [list(RankBatches(sampler, 1, 1, rank, world, (0, 0), budget=budget).steps()) for rank in range(world)]
    for number, samples in enumerate(sampler.epoch(0)):
        batches = [rank[number] for rank in ranks]
        assert len({len(of_rank) for of_rank in batches}) == 1, "every process makes as many collective calls"
        assert sorted(sample for of_rank in batches for batch in of_rank for sample in batch) == sorted(samples)
        for batch in (batch for of_rank in batches for batch in of_rank):
            assert sampler.tokens(np.array(batch)).sum() <= budget or len(batch) == 1
    flat = list(RankBatches(sampler, 1, 1, 0, world, (0, 0), budget=budget))
    assert flat == [batch for step in ranks[0] for batch in step]
    middle = list(RankBatches(sampler, 1, 1, 0, world, (0, 5), budget=budget).steps())
    assert middle == ranks[0][5:]


def test_a_budget_makes_as_few_batches_as_it_can():
    assert share_out(np.array([5, 5, 5, 5]), 2, 10) == [[[1, 3], [0, 2]]]
    assert share_out(np.array([50, 1, 1, 1]), 1, 10) == [[[0]], [[1, 2, 3]]]
    cut = OpenSource("", lengths=np.array([4000, 10]), continuous=np.array([100, 0]).__getitem__)
    assert cut.tokens(np.array([0, 1]), 1000).tolist() == [1100, 10]


def test_processes_take_about_as_long_where_images_make_the_length():
    """What the slowest process of each batch computes, over what all of them do."""
    known = mixed(4096)
    slowest = {}
    for name, one in {"discrete": OpenSource("", lengths=known.lengths), "all": known}.items():
        ranks = [list(RankBatches(Sampler([one], 128, 0), 1, 4, rank, 8, (0, 0))) for rank in range(8)]
        loads = np.array([[known.tokens(np.array(batch)).sum() for batch in of_rank] for of_rank in ranks])
        slowest[name] = loads.max(0).sum() / loads.mean(0).sum()
    assert slowest["discrete"] > 1.2 and slowest["all"] < 1.05
