"""Streams that go on from batch to batch, and the task of recall."""

from itertools import islice, pairwise

import pytest
import torch

from course_lib import data, training

IDS = torch.arange(100)


def streams(**changes):
    return list(data.stream_batches(IDS, **({"length": 8, "batch_size": 3} | changes)))


def recall(**changes):
    sizes = {"distance": 5, "batch_size": 64, "steps": 2, "generator": torch.Generator()}
    return list(data.recall_batches(**(sizes | changes)))


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 3, 40])
def test_each_row_goes_on_where_it_ended_in_the_batch_before(steps):
    batches = streams(steps=steps)
    for (_, targets), (inputs, _) in pairwise(batches):
        assert torch.equal(targets[:, -1], inputs[:, 0])
    assert len(batches) == (4 if steps is None else steps)


def test_targets_are_one_character_later_and_shapes_are_the_same_in_every_batch():
    for inputs, targets in streams(steps=40):
        assert inputs.shape == targets.shape == (3, 8)
        assert torch.equal(targets, (inputs + 1) % 100)  # IDS counts upwards, round a circle


def test_one_pass_reads_no_character_twice_and_crosses_no_seam():
    read = torch.cat([inputs.flatten() for inputs, _ in streams()])
    assert len(read.unique()) == len(read) == 3 * 32
    assert all((targets > inputs).all() for inputs, targets in streams())


def test_a_text_that_fits_exactly_is_read_whole():
    read = torch.cat(
        [inputs for inputs, _ in data.stream_batches(IDS[:97], length=8, batch_size=4)], 1
    )
    assert read.tolist() == torch.arange(96).view(4, 24).tolist()


def test_a_single_stream_reads_the_text_in_order():
    read = torch.cat([inputs for inputs, _ in streams(batch_size=1)], 1)
    assert torch.equal(read[0], torch.arange(96))


def test_streams_are_made_as_they_are_asked_for():
    endless = data.stream_batches(IDS, length=8, batch_size=3, steps=10**9)
    assert len(list(islice(endless, 5))) == 5


@pytest.mark.parametrize("name", ["length", "batch_size", "steps"])
def test_streams_refuse_a_size_below_one_at_the_call(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        data.stream_batches(IDS, **({"length": 8, "batch_size": 3} | {name: 0}))


def test_a_text_too_short_for_its_streams_is_refused_and_told_what_it_needs():
    with pytest.raises(ValueError, match=r"ids has 24 characters; .* need 25"):
        data.stream_batches(IDS[:24], length=8, batch_size=3)
    assert len(list(data.stream_batches(IDS[:25], length=8, batch_size=3))) == 1


# -- recall --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_pairs_are_shown_then_filler_then_a_key_whose_value_is_the_answer(pairs):
    for inputs, targets in recall(pairs=pairs):
        shown, filler, asked = inputs.split([2 * pairs, 5, 1], 1)
        keys, values = shown.unflatten(1, (pairs, 2)).unbind(2)
        assert ((keys >= 0) & (keys < 8) & (values >= 8) & (values < 16)).all()
        assert ((filler >= 16) & (filler < 24)).all()
        assert all(len(set(row)) == pairs for row in keys.tolist())
        assert ((keys == asked).sum(1) == 1).all()
        assert torch.equal(targets[:, -1], values[keys == asked])
        assert (targets[:, :-1] == training.loss.IGNORED).all()


def test_the_last_value_stands_as_far_back_as_was_asked():
    for distance in (0, 1, 7):
        inputs, _ = recall(distance=distance)[0]
        is_value = (inputs >= 8) & (inputs < 16)
        assert (is_value.nonzero()[:, 1] == inputs.shape[1] - 2 - distance).all()


def test_every_key_value_and_place_is_drawn():
    inputs, targets = recall(pairs=2, batch_size=2000, steps=1)[0]
    assert torch.equal(inputs.unique(), torch.arange(24))
    counts = torch.bincount(targets[:, -1] - 8, minlength=8) / 2000
    assert (counts - 1 / 8).abs().max() < 0.03
    first = (inputs[:, 0] == inputs[:, -1]).double().mean()
    assert abs(first - 0.5) < 0.05


def test_the_same_seed_gives_the_same_tasks_and_no_other_chance_is_touched():
    before = torch.get_rng_state()
    one, two, other = (
        recall(generator=torch.Generator().manual_seed(seed))[0][0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": -1}, "distance must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"pairs": 0}, "pairs must be at least 1"),
        ({"symbols": 0}, "symbols must be at least 1"),
        ({"pairs": 9}, "pairs=9 need as many keys, but symbols=8"),
    ],
)
def test_an_impossible_task_is_refused_at_the_call(change, message):
    sizes = {"distance": 5, "batch_size": 4, "steps": 1, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=message):
        data.recall_batches(**(sizes | change))
