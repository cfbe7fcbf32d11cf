"""How a run goes, from the command to its last file. (What methods are made of is beside it, in common/.)

1. config    the command line becomes the method's Config, a RunConfig with settings of its own
2. hosts     the processes of a run on several machines join
3. devices   XLA gets its devices, and seeds and their batches are laid out over as many of them as divide the work
4. size      --dry-run says how large the run would be, and ends here
5. files     the run takes its folder, which no other may have: a new one, or with --resume one with a run to go on from
6. programs  make_train(config), vmapped over seeds, becomes three compiled programs: start, chunk of updates, evaluation
7. loop      chunk after chunk: rows of metrics.csv, pictures and films of evaluations, a checkpoint written beside the training
8. stop      a signal ends it after the current chunk, saved; what cannot go on ends with one line and code 1
9. files     at the end figures and summary.json are written, the table is printed, and all that the run took is given back

sweep does this for a grid of settings; trackers send the metrics elsewhere too.
"""

from common.runs.command import cli
from common.runs.config import Fault, RunConfig, UsageError, require, require_multiple, require_range
from common.runs.devices import shard_batch
from common.runs.loop import run
from common.runs.programs import Train, if_needed, nothing_like, prepared, train_fn

__all__ = [
    "Fault", "RunConfig", "Train", "UsageError", "cli", "if_needed", "nothing_like", "prepared", "require", "require_multiple",
    "require_range", "run", "shard_batch", "train_fn",
]  # fmt: skip
