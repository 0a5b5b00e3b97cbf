"""The exercises of chapter 13: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib import masks
from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge
from course_lib.layers.recurrent_memory import compress, extend_memory, split_memory

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "13_recurrent_memory"
    least_held_apart = (300, 55)


def said(id, function):
    return judge(find(id), function).lines


def normal(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def test_the_chapter_leads_from_the_memory_to_what_compression_loses():
    ids = [exercise.id for exercise in chapter_exercises("13_recurrent_memory")]
    assert ids == [
        "extend_memory",
        "memory_scores",
        "relative_shift",
        "compress",
        "update_memories",
        "reconstruction_loss",
    ]


# --- our answers are what course_lib does ---------------------------------------------------------


@pytest.mark.parametrize("length", [0, 2, 4, 9])
def test_the_memory_is_that_of_the_library(length):
    hidden, memory = normal(0, (2, 2, 3), (2, 3, 3))
    got = find("extend_memory").reference(hidden, memory, length)
    torch.testing.assert_close(got, extend_memory(hidden, memory, length))


@pytest.mark.parametrize("m", [0, 1, 4])
def test_what_memory_scores_hides_is_what_masks_causal_hides(m):
    q, k = normal(1, (1, 1, 3, 2), (1, 1, m + 3, 2))
    hidden = find("memory_scores").reference(q, k, 0.5) == -torch.inf
    assert torch.equal(~hidden, masks.causal().dense(3, m + 3))


def test_the_shift_brings_each_product_to_its_own_distance():
    q, r = normal(2, (1, 2, 3, 4), (5, 4))
    got = find("relative_shift").reference(q @ r.flip(0).T)
    distance = (torch.arange(3)[:, None] + 2 - torch.arange(5)).clamp(min=0)  # (n_q, n_k)
    want = torch.einsum("bhid, ijd -> bhij", q, r[distance]).tril(2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rate", [1, 2, 3, 6])
def test_the_compression_is_that_of_the_library(rate):
    (old,) = normal(3, (2, 6, 3))
    torch.testing.assert_close(find("compress").reference(old, rate), compress(old, rate))


@pytest.mark.parametrize(("memory_length", "compressed_length"), [(4, 2), (0, 9), (6, 0), (8, 1)])
def test_two_memories_are_kept_as_the_library_keeps_them(memory_length, compressed_length):
    hidden, memory, compressed = normal(4, (2, 2, 3), (2, 4, 3), (2, 2, 3))
    old, recent = split_memory(extend_memory(hidden, memory, 6), memory_length, 2)
    coarse = extend_memory(compress(old, 2), compressed, compressed_length)
    got = find("update_memories").reference(
        hidden, memory, compressed, memory_length, compressed_length, 2
    )
    torch.testing.assert_close(got, (recent, coarse))


# --- famous traps ---------------------------------------------------------------------------------


def test_a_memory_kept_whole_by_the_slice_from_minus_0_is_told_so():
    lines = said("extend_memory", lambda h, m, n: torch.cat([m, h], 1)[:, -n:].detach())
    assert lines == (
        "✗ extend_memory: “with a length of 0 nothing is left” does not hold.",
        "Your result equals everything where length is 0. `[:, -length:]` is `[:, -0:]` there, and "
        "that is the whole.",
        "What does `x[:, -0:]` give?",
    )


def test_a_memory_that_is_not_detached_is_told_which_inputs_the_gradient_reaches():
    def forgetful(hidden, memory, length):
        both = torch.cat([memory, hidden], 1)
        return both[:, max(both.shape[1] - length, 0) :]

    assert said("extend_memory", forgetful) == (
        "✗ extend_memory: “no gradient flows through what is remembered” does not hold.",
        "For hidden (2, 2, 2), memory (2, 3, 2), length = 4: a gradient reaches `hidden` and "
        "`memory`.",
    )


def test_hidden_detached_in_place_is_told_so():
    def in_place(hidden, memory, length):
        both = torch.cat([memory.detach(), hidden.detach_()], 1)
        return both[:, max(both.shape[1] - length, 0) :]

    lines = said("extend_memory", in_place)
    assert lines[0] == "✗ extend_memory: “hidden itself keeps its gradient” does not hold."
    assert lines[1].endswith("after the call `hidden` itself can have no gradient any more.")


def test_a_triangle_aligned_at_the_top_left_is_told_so():
    def memory_scores(q, k, scale):
        scores = q @ k.mT * scale
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)

    lines = said("memory_scores", memory_scores)
    assert lines[0] == "✗ memory_scores: “every query sees the whole memory” does not hold."
    assert lines[1].startswith("Your result equals the scores aligned at the top left.")


def test_numbers_left_ahead_by_the_padded_view_are_told_so():
    def relative_shift(x):
        batch, heads, n_q, n_k = x.shape
        return F.pad(x, (1, 0)).view(batch, heads, n_k + 1, n_q)[:, :, 1:].reshape(x.shape)

    lines = said("relative_shift", relative_shift)
    assert lines[0] == "✗ relative_shift: “a key ahead of the query gets 0” does not hold."
    assert lines[1].startswith(
        "Your result equals the scores with what the padded view leaves ahead."
    )


def test_a_shift_that_forgets_the_memory_is_told_so():
    def relative_shift(x):
        n_q, n_k = x.shape[-2:]
        distance = torch.arange(n_q)[:, None] - torch.arange(n_k)
        column = n_k - 1 - distance.clamp(min=0)
        return x.gather(-1, column.expand_as(x)).masked_fill(distance < 0, 0.0)

    lines = said("relative_shift", relative_shift)
    assert lines[0] == "✗ relative_shift: “the last query's row stays as it is” does not hold."
    assert lines[1].startswith(
        "Your result equals the scores for the distance i - j, without the memory."
    )


def test_a_split_in_the_wrong_order_is_told_so():
    lines = said("compress", lambda x, r: x.reshape(len(x), r, -1, x.shape[2]).mean(1))
    assert lines[0] == "✗ compress: “neighbours become their mean” does not hold."
    assert lines[1].startswith("Your result equals the mean of every (m / rate)-th vector.")


def test_a_compression_of_what_comes_in_is_told_so():
    def update_memories(hidden, memory, compressed, length, compressed_length, rate):
        new = hidden.unflatten(1, (-1, rate)).mean(2)
        recent = torch.cat([memory, hidden], 1)
        recent = recent[:, max(recent.shape[1] - length, 0) :]
        coarse = torch.cat([compressed, new], 1)
        return recent.detach(), coarse[:, max(coarse.shape[1] - compressed_length, 0) :].detach()

    lines = said("update_memories", update_memories)
    assert any("an update in which hidden is compressed." in line for line in lines)


def test_a_gradient_that_reaches_the_layer_is_told_so_and_not_called_lost():
    def reconstruction_loss(hidden, old, compressed, w_q, w_k, w_v):
        look, query = F.scaled_dot_product_attention, hidden @ w_q
        want = look(query, old @ w_k, old @ w_v).detach()
        return F.mse_loss(look(query, compressed @ w_k, compressed @ w_v), want)

    lines = said("reconstruction_loss", reconstruction_loss)
    assert len(lines) == 2
    assert lines[0] == (
        "✗ reconstruction_loss: “no gradient reaches anything but compressed” does not hold."
    )
    assert lines[1].endswith("a gradient also reaches `hidden`, `w_q`, `w_k` and `w_v`.")


def test_a_loss_without_any_gradient_is_called_detached():
    loss = torch.no_grad()(find("reconstruction_loss").reference)
    verdict = judge(find("reconstruction_loss"), loss)
    assert verdict.mistake == "detached gradient"
    assert verdict.lines[0] == (
        "✗ reconstruction_loss: “a gradient reaches compressed” does not hold."
    )
