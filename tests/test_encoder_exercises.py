"""The exercises of chapter 08: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib import layers, masks
from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "08_encoder"
    least_held_apart = (200, 30)

    @classmethod
    def most_numbers(cls, id):
        return 16 if id == "encoder_block" else 12  # six matrices


def said(id, function):
    return judge(find(id), function).lines


def test_the_chapter_leads_from_hidden_words_to_a_classifier():
    ids = [exercise.id for exercise in chapter_exercises("08_encoder")]
    want = ["mask_tokens", "masked_accuracy", "mean_pool", "encoder_block", "classify_loss"]
    assert ids == want


# --- our answers are what course_lib and PyTorch do ----------------------------------------------


@pytest.mark.parametrize("lengths", [None, [3, 1], [0, 2]])
def test_the_block_is_an_encoder_layer_of_course_lib(lengths):
    layer = layers.EncoderLayer(
        4, 1, 5, norm_affine=False, activation="relu", bias=False, backend="reference"
    )
    attention, network = layer.attention, layer.feed_forward
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    weights = [linear.weight.T for linear in (*linears, network.up, network.down)]
    mask = None if lengths is None else masks.padding(lengths)
    real = None if mask is None else mask.dense(1, 3)[:, 0, 0]
    got = find("encoder_block").reference(x, *weights, padding=real)
    torch.testing.assert_close(got, layer(x, mask))


def test_cross_entropy_leaves_out_what_mask_tokens_does_not_ask():
    tokens, noise = torch.tensor([[3, 1, 2]]), torch.tensor([[0.9, 0.0, 0.9]])
    _, targets = find("mask_tokens").reference(tokens, noise, noise, tokens, 0)
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    want = F.cross_entropy(logits[:, 1], tokens[:, 1])
    torch.testing.assert_close(F.cross_entropy(logits.mT, targets), want)


# --- famous traps ---------------------------------------------------------------------------------


def test_a_kept_token_that_is_not_asked_for_is_told_so():
    def mask_tokens(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
        chosen = noise < rate
        replaced = torch.where(kinds < 0.8, mask_id, random_tokens)
        inputs = torch.where(chosen & (kinds < 0.9), replaced, tokens)
        return inputs, torch.where(inputs != tokens, tokens, -100)

    lines = said("mask_tokens", mask_tokens)
    assert lines[0] == (
        "✗ mask_tokens: “every chosen token is a target, also one that stays in the input” does "
        "not hold."
    )
    assert lines[1].startswith(
        "Your result equals the masking with targets wherever the input was changed. "
    )
    assert lines[2] == "Which positions does the model have to answer for?"


def test_masks_overwritten_by_the_second_step_are_told_so():
    def mask_tokens(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
        chosen = noise < rate
        inputs = torch.where(chosen & (kinds < 0.8), mask_id, tokens)
        inputs = torch.where(chosen & (kinds < 0.9), random_tokens, inputs)
        return inputs, torch.where(chosen, tokens, -100)

    lines = said("mask_tokens", mask_tokens)
    assert lines[0] == (
        "✗ mask_tokens: “a chosen token below 0.8 is masked, below 0.9 random, above that it "
        "stays” does not hold."
    )
    want = "Your result equals the masking with the masks overwritten by random tokens. "
    assert lines[1] == want + "kinds < 0.9 holds below 0.8 too, and that step comes last."


def test_targets_read_from_the_overwritten_tokens_are_told_so():
    def mask_tokens(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
        chosen = noise < rate
        tokens[chosen & (kinds < 0.8)] = mask_id
        return tokens, tokens.masked_fill(~chosen, -100)

    assert judge(find("mask_tokens"), mask_tokens).mistake == "input changed in place"


def test_an_answer_in_numpy_is_accepted_where_there_is_no_gradient():
    def masked_accuracy(logits, targets):
        counted = (targets != -100).numpy()
        right = (logits.numpy().argmax(-1) == targets.numpy()) & counted
        return torch.tensor(right.sum() / max(counted.sum(), 1), dtype=logits.dtype)

    assert judge(find("masked_accuracy"), masked_accuracy).passed


def test_a_mean_over_positions_that_were_not_asked_is_told_so():
    lines = said("masked_accuracy", lambda x, t: (x.argmax(-1) == t).to(x.dtype).mean())
    assert lines == (
        "✗ masked_accuracy: “a target of -100 is neither right nor wrong” does not hold.",
        "Your result equals the accuracy over all positions, with -100 counted as wrong. No guess "
        "is ever -100, so every position without a target is a miss.",
        "Over which positions is the mean taken?",
    )


def test_padding_in_the_divisor_is_told_so():
    def mean_pool(hidden, lengths):
        real = torch.arange(hidden.shape[1]) < lengths[:, None]
        return (hidden * real[..., None]).mean(1)

    lines = said("mean_pool", mean_pool)
    assert lines[0] == (
        "✗ mean_pool: “two real tokens of three give the mean of these two” does not hold."
    )
    assert lines[1].startswith("Your result equals the mean divided by n. ")


def block_seen(view):
    """An encoder block whose mask is view(padding)."""

    def encoder_block(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
        z = F.layer_norm(x, x.shape[-1:])
        mask = view(torch.ones(x.shape[:2], dtype=torch.bool) if padding is None else padding)
        mask = mask.expand(-1, x.shape[1], x.shape[1])
        heads = F.scaled_dot_product_attention(z @ w_q, z @ w_k, z @ w_v, attn_mask=mask)
        x = x + heads.nan_to_num(0.0) @ w_o
        return x + F.relu(F.layer_norm(x, x.shape[-1:]) @ w_up) @ w_down

    return encoder_block


def test_an_encoder_block_that_cannot_look_ahead_is_told_so():
    lines = said(
        "encoder_block", block_seen(lambda p: p[:, None].expand(-1, p.shape[1], -1).tril())
    )
    assert lines == (
        "✗ encoder_block: “the first token reads the last one” does not hold.",
        "Your result equals an encoder block with a causal mask too. No token sees a later one: "
        "that is a decoder.",
        "May a token of an encoder attend to a later one?",
    )


def test_padding_along_the_queries_is_told_so():
    lines = said("encoder_block", block_seen(lambda p: p[:, :, None]))
    assert lines[0] == "✗ encoder_block: “a padded token cannot change a real one” does not hold."
    assert lines[1].startswith(
        "Your result equals an encoder block with the padding along the queries. "
    )


def test_post_norm_is_told_so():
    def encoder_block(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
        mask = None if padding is None else padding[:, None].expand(-1, x.shape[1], -1)
        heads = F.scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v, attn_mask=mask)
        x = F.layer_norm(x + heads.nan_to_num(0.0) @ w_o, x.shape[-1:])
        return F.layer_norm(x + F.relu(x @ w_up) @ w_down, x.shape[-1:])

    lines = said("encoder_block", encoder_block)
    assert lines[0] == (
        "✗ encoder_block: “with w_o = 0 and w_down = 0 the block gives x back” does not hold."
    )
    assert lines[1].startswith("Your result equals an encoder block with post-norm. ")


def test_smoothing_among_the_wrong_classes_only_is_told_so():
    def classify_loss(hidden, w, labels, smoothing=0.0):
        log_p = F.log_softmax(hidden @ w, dim=-1)
        q = torch.full_like(log_p, smoothing / (w.shape[1] - 1))
        q[torch.arange(len(labels)), labels] = 1 - smoothing
        return -(q * log_p).sum(-1).mean()

    lines = said("classify_loss", classify_loss)
    assert lines[0] == (
        "✗ classify_loss: “with a smoothing of 1 the labels have no effect” does not hold."
    )
    want = "Your result equals the loss with ε shared out among the wrong classes only. "
    assert lines[1].startswith(want)


def test_softmax_before_cross_entropy_is_told_so():
    def classify_loss(hidden, w, labels, smoothing=0.0):
        p = torch.softmax(hidden @ w, dim=-1)
        return F.cross_entropy(p, labels, label_smoothing=smoothing)

    lines = said("classify_loss", classify_loss)
    assert lines[0] == (
        "✗ classify_loss: “without smoothing it is -log p of the label” does not hold."
    )
    assert lines[1].startswith("Your result equals the loss with softmax applied twice. ")
