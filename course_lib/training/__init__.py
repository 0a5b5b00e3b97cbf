"""One training loop, small enough to read, for every model of the course.

`loop` holds `fit`; beside it stand the learning rate (`schedule`), the optimisers (`optimizers`,
`muon`), what is kept on disk (`checkpoint`) and several processes (`distributed`).
"""

from course_lib.training.checkpoint import CheckpointError
from course_lib.training.history import History
from course_lib.training.loop import Batch, fit
from course_lib.training.loss import mean_loss, next_token_loss
from course_lib.training.muon import Muon
from course_lib.training.schedule import learning_rate_factor

__all__ = [
    "Batch",
    "CheckpointError",
    "History",
    "Muon",
    "fit",
    "learning_rate_factor",
    "mean_loss",
    "next_token_loss",
]
