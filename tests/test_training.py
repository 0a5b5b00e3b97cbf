"""The training loop."""

import json
import sys

import pytest
import torch
from torch import nn

from course_lib import data, training
from course_lib.models import LSTMLanguageModel

LINE = torch.arange(8).repeat(20)  # 0 1 2 … 7 0 1 2 …: the next token is certain


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batches(steps, seed=0):
    return data.random_batches(
        LINE, length=6, batch_size=8, steps=steps, generator=torch.Generator().manual_seed(seed)
    )


def model(seed=0):
    torch.manual_seed(seed)
    return LSTMLanguageModel(vocab_size=8, d_model=8)


def fit(trained, steps=5, **options):
    defaults = {"steps": steps, "lr": 1e-2, "progress": False}
    return training.fit(trained, batches(steps), **defaults | options)


def test_training_lowers_the_loss_of_a_text_that_can_be_learned():
    history = fit(model(), steps=150, lr=3e-2)
    assert history.loss[0] > 1.5
    assert history.loss[-1] < 0.1


def test_the_first_loss_is_that_of_the_untrained_model_in_mean_nats_per_token():
    trained, (inputs, targets) = model(), next(batches(1))
    log_p = model()(inputs).log_softmax(-1)
    want = -log_p.gather(-1, targets[..., None]).mean().item()
    assert fit(trained, steps=1).loss[0] == pytest.approx(want, rel=1e-5)


def test_history_has_one_entry_per_step_and_time_that_grows():
    history = fit(model(), steps=7)
    assert history.step == [1, 2, 3, 4, 5, 6, 7]
    assert history.seconds == sorted(history.seconds)
    assert history.seconds[0] > 0
    assert {len(column) for column in history.to_dict().values()} == {7}


def test_history_goes_through_json():
    history = fit(model(), steps=2, validation=list(batches(1)))
    assert training.History(**json.loads(json.dumps(history.to_dict()))) == history


def test_the_same_seeds_give_the_same_losses():
    assert fit(model()).loss == fit(model()).loss


def test_evaluation_comes_every_so_often_and_after_the_last_step():
    history = fit(model(), steps=7, validation=list(batches(2, seed=1)), eval_every=3)
    measured = [step for step, loss in zip(history.step, history.eval_loss, strict=True) if loss]
    assert measured == [3, 6, 7]


def test_validation_is_measured_on_the_updated_model_in_evaluation_mode():
    torch.manual_seed(0)
    trained = LSTMLanguageModel(vocab_size=8, d_model=8, num_layers=2, dropout=0.5)
    validation = list(batches(2, seed=1))
    history = fit(trained, steps=3, validation=validation)
    assert history.eval_loss[-1] == pytest.approx(training.mean_loss(trained, validation))


def test_a_function_may_evaluate_instead():
    history = fit(model(), steps=2, evaluate=lambda trained: 42.0, eval_every=1)
    assert history.eval_loss == [42.0, 42.0]


def test_training_goes_on_in_training_mode_after_an_evaluation():
    trained, modes = model(), []
    trained.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    fit(trained, steps=2, validation=list(batches(1)), eval_every=1)
    assert modes == [True, False, True, False]


@pytest.mark.parametrize("training_mode", [True, False])
def test_the_model_is_left_in_the_mode_it_came_in(training_mode):
    trained = model().train(training_mode)
    fit(trained, steps=1, validation=list(batches(1)))
    assert trained.training is training_mode


def test_mean_loss_weighs_a_smaller_last_batch_by_its_size():
    (inputs, targets), trained = next(batches(1)), model()
    parts = [(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]
    whole = training.mean_loss(trained, [(inputs, targets)])
    assert training.mean_loss(trained, parts) == pytest.approx(whole, rel=1e-5)


def test_mean_loss_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batches is empty"):
        training.mean_loss(model(), [])


def test_targets_of_minus_100_do_not_count():
    logits, targets = torch.randn(2, 3, 8), torch.randint(8, (2, 3))
    ignored = targets.clone()
    ignored[:, :2] = -100
    want = training.next_token_loss(logits[:, 2:], targets[:, 2:])
    assert training.next_token_loss(logits, ignored).item() == pytest.approx(want.item())


def test_another_loss_and_another_optimizer_can_be_given():
    made = []

    def optimizer(parameters, lr):
        made.append(torch.optim.SGD(parameters, lr=lr, momentum=0.9))
        return made[0]

    history = fit(
        model(), steps=2, loss=lambda logits, _: logits.square().mean(), optimizer=optimizer
    )
    assert history.loss[0] < 0.5
    assert len(made) == 1


def test_clipping_bounds_the_update():
    moved = {}
    for clip in (1e-3, None):
        trained = model()
        before = nn.utils.parameters_to_vector(trained.parameters()).detach().clone()
        fit(trained, steps=1, lr=1.0, optimizer="sgd", schedule="constant", warmup=0, clip=clip)
        moved[clip] = (nn.utils.parameters_to_vector(trained.parameters()) - before).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[None] > 10 * moved[1e-3]


def test_the_learning_rate_warms_up_then_falls_along_a_cosine():
    factors = [training.learning_rate_factor(s, 12, 2, "cosine") for s in range(12)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[7] == pytest.approx(0.5)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.05


def test_the_learning_rate_reaches_the_optimizer():
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    fit(model(), steps=4, lr=0.5, optimizer=Spy, schedule="constant", warmup=1)
    assert seen == [0.25, 0.5, 0.5, 0.5]


def test_max_seconds_ends_training_early_and_still_evaluates():
    history = fit(model(), steps=1000, max_seconds=1e-9, validation=list(batches(1)))
    assert history.step == [1]
    assert history.eval_loss[0] is not None


def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_the_parameters():
    trained, count = model(), iter(range(10))

    def loss(logits, targets):
        return training.next_token_loss(logits, targets) * (float("nan") if next(count) == 2 else 1)

    with pytest.raises(FloatingPointError, match="nan at step 3"):
        fit(trained, loss=loss)
    assert all(p.isfinite().all() for p in trained.parameters())


def test_batches_that_end_too_early_are_reported():
    with pytest.raises(ValueError, match="batches ended after 2 of steps=5"):
        training.fit(model(), batches(2), steps=5, lr=1e-2, progress=False)


def test_an_endless_stream_of_batches_is_read_only_as_far_as_needed():
    stream = iter(list(batches(5)))
    training.fit(model(), stream, steps=3, lr=1e-2, progress=False)
    assert len(list(stream)) == 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"clip": -1.0}, "clip must be positive, got -1"),
        ({"max_seconds": 0.0}, "max_seconds must be positive"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"warmup": 6}, "warmup must lie between 0 and steps=5, got 6"),
        ({"schedule": "step"}, "schedule must be"),
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"validation": [], "evaluate": lambda _: 0.0}, "both given"),
    ],
)
def test_an_impossible_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        training.fit(model(), batches(5), **{"steps": 5, "lr": 0.1, "progress": False} | options)


def test_validation_that_could_be_read_only_once_is_refused():
    with pytest.raises(TypeError, match="validation is an iterator"):
        fit(model(), validation=batches(2))


def test_the_bar_shows_the_loss_on_stdout_and_nothing_on_stderr(capsys):
    pytest.importorskip("tqdm")
    fit(model(), progress=True)
    out, err = capsys.readouterr()
    assert "5/5" in out
    assert "loss" in out
    assert err == ""


def test_without_a_bar_nothing_is_printed(capsys):
    fit(model(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_training_works_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(fit(model(), progress=True).step) == 5
    assert capsys.readouterr().out == ""
