"""Runs fits in processes of their own, forked after the imports: some are killed, some are ranks of a group.

Started once as a script; for every path of a JSON list of jobs that it reads, it writes their exit codes as a line. Each job is ``{"call": name of
a function here, "with": its arguments, "env": variables, "beside": whether the next job starts before this one has ended}``. What the jobs of a
list print goes to the same path with the suffix ``.text``.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lit import LitNet, Points, loader, trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import DataLoader, Subset
from toys import kind_of, make

from lightning_prune import methods
from lightning_prune.probe import Probe
from lightning_prune.structure.carrier import plan_of

LIMIT = 100  # seconds after which a job counts as hanging


class Lines(Logger):
    """A logger that a kill cannot take anything from: one line of JSON per call, flushed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    name = version = property(lambda self: "lines")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **{k: float(v).hex() for k, v in sorted(metrics.items())}}) + "\n")


class Killer(Callback):
    """Kills its process when ``at`` optimizer steps have been taken; keeps the optimizer states of a fit that ends."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.at is not None and trainer.global_step >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.states = [optimizer.state_dict() for optimizer in trainer.optimizers]


def fit(
    folder: str,
    method: str,
    out: str | None = None,
    kill_at: int | None = None,
    resume: str | None = None,
    epochs: int = 4,
    seed: int | None = 1,
    net: dict[str, Any] | None = None,
    count: int = 64,
    batch_size: int = 16,
    interleave: int = 0,
    model: Any = None,
    method_options: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Fit, perhaps to be killed; write what came out to ``out``.

    With ``interleave`` a single process sees, batch by batch, what two ranks with batches of that size see together.
    """
    if seed is not None:
        pl.seed_everything(seed)
    model = model or LitNet(**(net or {}))
    killer = Killer(kill_at)
    saver = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1)
    run = trainer(
        folder,
        max_epochs=epochs,
        callbacks=[make(method, **(method_options or {})), killer, saver],
        enable_checkpointing=True,
        logger=Lines(Path(folder) / "lines.jsonl"),
        **options,
    )
    data = loader(count, batch_size)
    if interleave:
        data = DataLoader(Points(count), batch_size=batch_size)
    elif run.world_size > 1:
        data = DataLoader(Subset(Points(count), range(run.global_rank, count, run.world_size)), batch_size=batch_size)
    run.fit(model, data, loader(16, seed=1), ckpt_path=resume)
    if out is not None:
        result = {"weights": model.state_dict(), "plan": plan_of(model).to_json(), "optimizers": killer.states}
        torch.save(result, out.format(rank=run.global_rank))


def fit_of_another_width_on_rank_1(**arguments: Any) -> None:
    """Fit a model whose last layer is wider on rank 1."""
    model = LitNet()
    if os.environ["RANK"] == "1":
        model.net[10] = torch.nn.Linear(32, 5)
    fit(model=model, **arguments)


def fit_with_another_option_on_rank_1(method: str, **arguments: Any) -> None:
    """Fit with a callback that is configured otherwise on rank 1."""
    option = {"ToyMask": {"sparsity": 0.4}}.get(method, {"exclude": "net.10"})
    fit(method=method, method_options=option if os.environ["RANK"] == "1" else None, **arguments)


def reduce(folder: str, out: str, **options: Any) -> None:
    """Write what the probe of a fit makes of a tensor that is another one on every rank: its mean and its maximum."""

    class Asking(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            probe, sign = Probe.of_trainer(trainer, pl_module), 1 - 2 * trainer.global_rank
            answers = [ask(torch.tensor([3.0, -1.0]) * sign).tolist() for ask in (probe.mean, probe.maximum)]
            Path(out.format(rank=trainer.global_rank)).write_text(json.dumps(answers))

    trainer(folder, callbacks=[Asking()], max_steps=1, **options).fit(LitNet(), loader())


def fit_with_collectives_counted(method: str, sizes: str, **arguments: Any) -> None:
    """Fit, and write the number of entries of every all-reduce that the choice of weights took to ``sizes``."""
    kind, reduce, found = getattr(methods, kind_of(method)), dist.all_reduce, []
    choose = kind.choose_weights

    def counted(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
        found.append(tensor.numel())
        return reduce(tensor, *rest, **options)

    def choosing(*given: Any) -> Any:
        dist.all_reduce = counted
        try:
            return choose(*given)
        finally:
            dist.all_reduce = reduce

    kind.choose_weights = choosing  # of this process alone
    fit(method=method, **arguments)
    Path(sizes.format(rank=os.environ["RANK"])).write_text(json.dumps(found))


def run(path: Path) -> list[int | None]:
    """Run a list of jobs; return their exit codes."""
    jobs = json.loads(path.read_text())
    codes: list[int | None] = [None] * len(jobs)
    running: dict[int, int] = {}
    with path.with_suffix(".text").open("ab") as text:
        for index, job in enumerate(jobs):
            running[_start(job, text.fileno())] = index
            if not job.get("beside"):
                _wait(running, codes)
    return codes


def _start(job: dict[str, Any], text: int) -> int:
    child = os.fork()
    if child:
        return child
    for stream in (1, 2):
        os.dup2(text, stream)
    code = 1
    try:
        os.environ.update(job.get("env", {}))
        globals()[job["call"]](**job["with"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # the child ends here whatever happens; the parent reads the code, the test the output
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(running: dict[int, int], codes: list[int | None]) -> None:
    deadline = time.monotonic() + LIMIT
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            for hanging in running:
                os.kill(hanging, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(Path(line.strip()))), flush=True)
