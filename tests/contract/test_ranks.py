"""Two processes of a gloo group: same plan and weights on both, equal to one process on all of the data; what cannot work is refused."""

import json
import socket
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lit import LitNet, loader, trainer
from toys import NAMES, make

from lightning_prune.errors import TrainerError
from lightning_prune.structure.carrier import attach
from lightning_prune.structure.plan import Plan


def ranks(folder: Any, **arguments: Any) -> list[dict[str, Any]]:
    """Return the jobs of two ranks that find each other by the variables of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = arguments.pop("call", "fit")
    jobs = []
    for rank in range(2):
        env = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "GROUP_RANK": 0,
            "MASTER_PORT": port,
        }
        env |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "contract"}
        options = {
            "folder": str(folder),
            "strategy": "ddp",
            "devices": 2,
            "use_distributed_sampler": False,
            **arguments,
        }
        env_text = {key: str(value) for key, value in env.items()}
        jobs.append({"call": call, "with": options, "env": env_text, "beside": rank == 0})
    return jobs


def built(result: dict[str, Any]) -> LitNet:
    """Return the model that a job wrote."""
    model = LitNet(norm="running_mean" in " ".join(result["weights"]))
    plan = Plan.from_json(result["plan"])
    plan.build(model)
    attach(model, plan)
    model.to(next(iter(result["weights"].values())).dtype).load_state_dict(result["weights"])
    return model.eval()


@pytest.mark.parametrize("method", NAMES)
def test_unseeded_ranks_end_with_the_same_plan_and_weights(run_jobs, tmp_path, method):
    codes, text = run_jobs(ranks(tmp_path, method=method, seed=None, epochs=2, out=str(tmp_path / "rank{rank}.pt")))
    assert codes == [0, 0], text
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one["plan"] == two["plan"]
    assert json.loads(one["plan"])["steps"]
    buffers = (
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )  # DDP leaves those of batch normalization to each rank
    differ = [
        n
        for n, value in one["weights"].items()
        if not n.endswith(buffers) and not torch.equal(value, two["weights"][n])
    ]
    assert not differ


# Directions of nearly equal curvature turn into each other at a breath, too, and some are kept of which the data say nothing, but random inputs do;
# a fit by alternating least squares stops at another place.
EIGENVECTORS = {"KFE": 1e-6, "KFE-gradually": 1e-4, "KFE-official": 1e-4, "KFE-separable": 1e-4}


@pytest.mark.parametrize("method", NAMES)
@torch.no_grad()
def test_two_ranks_equal_one_process_on_all_of_the_data(run_jobs, tmp_path, method):
    common = {"method": method, "epochs": 2, "net": {"norm": False}, "precision": "64-true"}
    both = ranks(tmp_path, out=str(tmp_path / "rank{rank}.pt"), batch_size=8, **common)
    single = {
        "call": "fit",
        "with": {"folder": str(tmp_path), "out": str(tmp_path / "one.pt"), "batch_size": 16, "interleave": 8, **common},
    }
    codes, text = run_jobs([*both, single])
    assert codes == [0, 0, 0], text
    two, one = (torch.load(tmp_path / name, weights_only=True) for name in ("rank0.pt", "one.pt"))
    steps = [json.loads(result["plan"])["steps"] for result in (one, two)]
    assert steps[0] == steps[1]  # masks bit for bit, too
    # Functions are compared, not factors: two singular vectors of nearly equal values turn into each other at a breath.
    x = torch.randn(64, 1, 8, 8, dtype=torch.float64)
    outputs = [built(result)(x) for result in (one, two)]
    within = EIGENVECTORS.get(method, 1e-8)
    torch.testing.assert_close(*outputs, rtol=within, atol=within)
    assert outputs[0].std() > 0.1


def test_the_probe_takes_the_mean_and_the_maximum_over_ranks(run_jobs, tmp_path):
    codes, text = run_jobs(ranks(tmp_path, call="reduce", out=str(tmp_path / "rank{rank}.json")))
    assert codes == [0, 0], text
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [[0, 0], [3, 1]]


@pytest.mark.parametrize(("method", "count"), [("GraSP", 2), ("SNIP", 1), ("Magnitude-weights", 0)])
def test_choosing_weights_takes_so_many_collectives(run_jobs, tmp_path, method, count):
    sizes = str(tmp_path / "rank{rank}.json")
    codes, text = run_jobs(ranks(tmp_path, method=method, call="fit_with_collectives_counted", epochs=1, sizes=sizes))
    assert codes == [0, 0], text
    weights = sum(p.numel() for p in LitNet().parameters() if p.ndim >= 2)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [weights] * count


@pytest.mark.parametrize("method", NAMES)
def test_ranks_that_construct_different_models_are_told_on_every_rank(run_jobs, tmp_path, method):
    codes, text = run_jobs(ranks(tmp_path, method=method, call="fit_of_another_width_on_rank_1"))
    assert all(code not in (0, -9) for code in codes), text
    assert text.count("Rank 1 holds another structure than rank 0") >= 2


@pytest.mark.parametrize("method", NAMES)
def test_ranks_that_are_configured_differently_are_told_on_every_rank(run_jobs, tmp_path, method):
    codes, text = run_jobs(ranks(tmp_path, method=method, call="fit_with_another_option_on_rank_1"))
    assert all(code not in (0, -9) for code in codes), text
    assert text.count("Rank 1 holds another set of compressing callbacks or options than rank 0") >= 2


@pytest.mark.parametrize(
    ("method", "strategy"), [*[(name, "ddp_fork") for name in NAMES], (NAMES[0], "ddp_spawn")]
)  # a spawned process imports everything anew
def test_spawn_and_fork_are_refused_with_the_remedy(method, strategy, tmp_path):
    run = trainer(tmp_path, callbacks=[make(method)], strategy=strategy, devices=1)
    with pytest.raises(Exception, match=r"spawn or fork.*Use strategy='ddp'"):
        run.fit(LitNet(), loader())


@pytest.mark.parametrize("method", NAMES)
def test_sharded_strategies_are_refused_with_the_reason(method, tmp_path):
    run = trainer(tmp_path, callbacks=[make(method)], strategy=pl.strategies.ModelParallelStrategy(), devices=1)
    with pytest.raises(TrainerError, match="shards parameters"):
        run.callbacks[0].setup(run, LitNet(), "fit")
