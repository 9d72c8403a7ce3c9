"""Training on a GPU: skipped without CUDA."""

import pytest
import torch
from lit import LitNet, loader, trainer
from toys import NAMES, make

from lightning_prune import TRP, load_from_checkpoint
from lightning_prune.structure.carrier import plan_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_on_the_gpu_is_compressed_and_comes_back_on_the_cpu(name, precision, tmp_path):
    model = LitNet()
    run = trainer(tmp_path, callbacks=[make(name)], accelerator="gpu", precision=precision)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(LitNet, tmp_path / "small.ckpt").eval()
    assert plan_of(again).steps
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(again(x), model.cpu().eval()(x), rtol=1e-5, atol=1e-5)


def test_the_penalty_goes_on_after_a_resume_on_the_gpu(tmp_path):
    def method():
        return TRP(energy=0.3, align=1, every_n_steps=100, nuclear=1e-3)

    first = trainer(tmp_path, callbacks=[method()], accelerator="gpu", max_epochs=1, enable_checkpointing=True)
    first.fit(LitNet(), loader())
    resumed = trainer(tmp_path, callbacks=[method()], accelerator="gpu", max_epochs=2)
    resumed.fit(LitNet(), loader(), ckpt_path=first.checkpoint_callback.best_model_path)
    assert resumed.global_step == 8
