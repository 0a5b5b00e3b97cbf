"""A run that is stopped, in whatever way, and called again ends as if nothing had happened."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_run
from training_run import CONFIG, STEPS

from course_lib import training

HERE = Path(__file__).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without interruption: model and history."""
    return training_run.run(tmp_path_factory.mktemp("whole"), checkpoint=None)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def start(folder, *options):
    command = [sys.executable, str(HERE / "training_run.py"), str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV)


def stop_after(process, step, number):
    """Send the signal while step `step` is being drawn."""
    for line in process.stdout:
        if line.strip() == f"step {step}":
            time.sleep(0.05)
            process.send_signal(number)
            break
    process.wait(60)
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_run_goes_on_to_the_very_same_weights(tmp_path, whole, number):
    stop_after(start(tmp_path, "--slow"), 7, number)
    assert not (tmp_path / "weights.pt").exists()
    assert (tmp_path / "run.ckpt").exists()
    again = start(tmp_path)
    again.communicate(timeout=60)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert same_weights(weights, whole[0].state_dict())


def test_ctrl_c_keeps_the_step_that_was_under_way(tmp_path):
    stop_after(start(tmp_path, "--slow"), 4, signal.SIGINT)
    _, history = training_run.run(tmp_path)
    assert history.step == list(range(1, STEPS + 1))
    assert history.seconds == sorted(history.seconds)


def test_the_history_goes_on_where_it_stood(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        training_run.run(tmp_path, watch=interrupt_at(6))
    model, history = training_run.run(tmp_path)
    assert history.loss == whole[1].loss
    assert same_weights(model.state_dict(), whole[0].state_dict())


def interrupt_at(step):
    def watch(history):
        if history.step[-1] == step:
            signal.raise_signal(signal.SIGINT)

    return watch


def test_a_finished_run_is_not_run_again(tmp_path, whole):
    training_run.run(tmp_path)
    before = (tmp_path / "run.ckpt").read_bytes()
    model, history = training_run.run(tmp_path)
    assert (tmp_path / "run.ckpt").read_bytes() == before
    assert history.loss == whole[1].loss
    assert same_weights(model.state_dict(), whole[0].state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_every_optimizer_goes_on_to_the_very_same_weights(tmp_path, optimizer):
    straight, _ = training_run.run(tmp_path, optimizer=optimizer, checkpoint=None)
    with pytest.raises(KeyboardInterrupt):
        training_run.run(tmp_path, optimizer=optimizer, watch=interrupt_at(6))
    resumed, _ = training_run.run(tmp_path, optimizer=optimizer)
    assert same_weights(straight.state_dict(), resumed.state_dict())


# -- what cannot be gone on from -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 2e-2}, r"lr was 0\.01 and is 0\.02"),
        ({"steps": 10}, "steps was 12 and is 10"),
        ({"schedule": "linear"}, "schedule was 'cosine' and is 'linear'"),
        ({"optimizer": "sgd"}, "optimizer was 'adamw' and is 'sgd'"),
        ({"config": replace(CONFIG, d_model=32)}, "model was 'Decoder with"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path, options, message):
    training_run.run(tmp_path)
    before = (tmp_path / "run.ckpt").read_bytes()
    with pytest.raises(training.CheckpointError, match=message):
        training_run.run(tmp_path, **options)
    assert (tmp_path / "run.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"x" + raw[1:]]
)
def test_a_torn_checkpoint_is_said_to_be_torn_and_kept(tmp_path, spoil):
    training_run.run(tmp_path)
    path = tmp_path / "run.ckpt"
    path.write_bytes(spoil(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(training.CheckpointError, match="is torn or is no checkpoint"):
        training_run.run(tmp_path)
    assert path.read_bytes() == before


def test_nothing_but_the_checkpoint_and_the_log_is_left_behind(tmp_path):
    training_run.run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "run.ckpt"]


# -- log and watch -------------------------------------------------------------------------------


def test_the_log_holds_every_step(tmp_path, whole):
    training_run.run(tmp_path)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in rows] == whole[1].loss


def test_a_log_of_another_kind_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"log must end in .csv or .json, got 'log.txt'"):
        training_run.run(tmp_path, log=tmp_path / "log.txt")
    assert list(tmp_path.iterdir()) == []


def test_whoever_watches_sees_the_history_at_each_evaluation(tmp_path):
    seen = []
    training_run.run(tmp_path, watch=lambda history: seen.append(history.step[-1]))
    assert seen == [3, 6, 9, 12]


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_result_of_one(tmp_path, processes):
    """Three processes get unequal shares of a batch of 8."""
    script = HERE / "training_ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(script), str(tmp_path)],
        check=True, timeout=120, env=ENV, capture_output=True,
    )  # fmt: skip
    plain = replace(CONFIG, dropout=0.0, bias=False)  # AdamW blows up the noise of a key's bias
    one, history = training_run.run(tmp_path / "one", config=plain, checkpoint=None, log=None)
    several = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(several[name], weight, atol=2e-5, rtol=1e-4)
    losses = torch.load(tmp_path / "losses.pt", weights_only=True)
    torch.testing.assert_close(losses, torch.tensor(history.loss), atol=1e-5, rtol=1e-5)
