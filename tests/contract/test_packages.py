"""Every exported method under ``pytorch_lightning`` and ``lightning.pytorch``, both installed or one alone, in the Trainer and in LightningCLI."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import lit
import pytest
import toys
import yaml

from lightning_prune import _lightning, methods
from lightning_prune.errors import ModelError
from lightning_prune.structure.carrier import plan_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [name for name in _lightning.PACKAGES if importlib.util.find_spec(name.partition(".")[0]) is not None]
QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
# Lightning 2.6 calls jsonargparse in ways that a later jsonargparse does not like.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
both = pytest.mark.skipif(len(PACKAGES) == 1, reason="one package is hidden")
every = pytest.mark.parametrize("name", toys.NAMES)


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI warns of arguments there
    return importlib.import_module(request.param)


def net(package):
    class Net(lit.LitMixin, package.LightningModule):
        def train_dataloader(self):
            return lit.loader()

    return Net


def run_cli(package, *arguments, **options):
    """Run LightningCLI as a user's script would that has imported our methods; return what it made."""
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    quiet = {"trainer_defaults": QUIET, "save_config_callback": None, "seed_everything_default": False}
    subcommand = ["fit"] if options.get("run", True) else []
    return cli(net(package), args=[*subcommand, *arguments], **(quiet | options))


def ours(cli):
    (method,) = [callback for callback in cli.trainer.callbacks if hasattr(callback, "plan")]
    return method


def usual(name):
    """The options of the tests' method that are not its defaults."""
    method = toys.make(name)
    parameters = inspect.signature(type(method)).parameters
    return {key: value for key, value in method.options().items() if value != parameters[key].default}


def options(name):
    texts = {
        key: yaml.safe_dump(value, default_flow_style=True).partition("\n")[0] for key, value in usual(name).items()
    }
    return [f"--trainer.callbacks.{key}={text}" for key, text in texts.items()]


def homes(name):
    """How a method may be written on a command line: its name, and the paths that users import it from."""
    kind = toys.kind_of(name)
    folders = ["toys"] if kind == "ToyMask" else ["lightning_prune", "lightning_prune.methods"]
    return [kind, *(f"{folder}.{kind}" for folder in folders)]


def asked(stages):
    """Who made the plan, without how far a schedule came in the few epochs of a test."""
    return [(s.method, {key: value for key, value in s.options.items() if key != "progress"}) for s in stages]


@every
def test_fits_in_the_trainer(name, package, tmp_path):
    model, method = net(package)(), toys.make(name)
    lit.trainer(tmp_path, package, callbacks=[method]).fit(model)
    assert plan_of(model).steps
    assert asked(plan_of(model).stages) == asked([method.stage()])
    assert isinstance(method, package.Callback)
    assert _lightning.package_of(model) is package
    assert _lightning.package_of(type(model)) is package


@every
def test_named_on_the_command_line(name, package):
    expected = toys.make(name)
    for home in homes(name):
        cli = run_cli(package, f"--trainer.callbacks+={home}", *options(name), run=False)
        assert ours(cli).options() == expected.options()
    cli.trainer.fit(cli.model)
    assert asked(plan_of(cli.model).stages) == asked([expected.stage()])


@every
def test_configured_by_a_file(name, package, tmp_path):
    entry = {"class_path": homes(name)[-1], "init_args": usual(name) | {"exclude": ["net.8"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"lr": 0.01}, "trainer": {"callbacks": [entry]}}))
    cli = run_cli(package, "--config", str(tmp_path / "config.yaml"))
    assert ours(cli).options() == toys.make(name, exclude=["net.8"]).options()
    assert plan_of(cli.model).steps


@every
def test_a_saved_configuration_gives_the_same_again(name, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a logger LightningCLI saves there
    saver = importlib.import_module(f"{package.__name__}.cli").SaveConfigCallback
    first = run_cli(package, f"--trainer.callbacks+={homes(name)[-1]}", *options(name), save_config_callback=saver)
    second = run_cli(package, "--config", str(next(tmp_path.rglob("config.yaml"))))
    assert ours(first).options() == ours(second).options() == toys.make(name).options()


@every
@pytest.mark.parametrize("where", ["class", "path", "argument"])
def test_a_typo_is_named_in_the_last_lines(name, where, package, capsys):
    kind = toys.kind_of(name)
    typo = {"class": f"{kind}x", "path": f"{homes(name)[-1]}x", "argument": kind}[where]
    extra = ["--trainer.callbacks.includde=net.3"] if where == "argument" else []
    with pytest.raises(SystemExit) as caught:
        run_cli(package, f"--trainer.callbacks+={typo}", *extra)
    assert caught.value.code == 2
    last = capsys.readouterr().err.rstrip().splitlines()[-8:]
    assert any(("includde" if extra else typo.rpartition(".")[2]) in line for line in last)
    assert max(map(len, last)) < 200
    assert not any("Traceback" in line for line in last)


def test_what_is_no_lightning_module_is_refused_by_name(package):
    with pytest.raises(ModelError, match=r"builtins\.dict is no LightningModule"):
        _lightning.package_of(dict)
    assert not _lightning.is_lightning_module({})
    assert _lightning.is_lightning_module(net(package))


@both
def test_without_any_package_the_remedy_is_said(monkeypatch):
    for name in ("pytorch_lightning", "lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install pytorch-lightning"):
        _lightning._installed()


@both
def test_a_folder_that_is_called_lightning_is_no_package(tmp_path, monkeypatch):
    """As in a project that keeps its own code in ``lightning/`` and has only pytorch_lightning installed."""
    folder = ModuleType("lightning")
    folder.__path__ = [str(tmp_path)]
    folder.__spec__ = importlib.machinery.ModuleSpec("lightning", None, is_package=True)
    monkeypatch.setitem(sys.modules, "lightning", folder)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    assert [found.__name__ for found in _lightning._installed()] == ["pytorch_lightning"]


# Runs in a process of its own where one package cannot be imported, as if it were not installed; then runs some of the tests above there:
# that every method fits in its Trainer and is configured by its command line.
ALONE = """
import importlib, sys
hidden, package, folder = sys.argv[1:]
sys.argv[1:] = []
sys.modules[hidden] = None
kept = importlib.import_module(package)
sys.modules["pytorch_lightning"] = kept
import lit  # whose own module is of pytorch_lightning
sys.modules[hidden] = None
class Net(lit.LitMixin, kept.LightningModule):
    pass
assert "lightning_prune.methods" not in sys.modules
cli = importlib.import_module(package + ".cli").LightningCLI
arguments = ["--trainer.callbacks+=lightning_prune.TRP", "--trainer.callbacks.flops=0.5", "--trainer.logger=false"]
made = cli(Net, args=arguments, run=False, save_config_callback=None, seed_everything_default=False)
assert [c.flops for c in made.trainer.callbacks if type(c).__name__ == "TRP"] == [0.5]
from lightning_prune import demo
from lightning_prune._lightning import package_of
assert package_of(demo.DigitsNet) is kept
import pytest
code = pytest.main([*FILES, "-q", "-k", "fits_in_the_trainer or configured_by_a_file", "-p", "no:cacheprovider", "--basetemp", folder])
assert not [name for name, module in sys.modules.items() if module and name.partition(".")[0] == hidden]
sys.exit(code)
"""


@both
@pytest.mark.parametrize(
    ("hidden", "left"), [("lightning", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
)
def test_one_package_alone(hidden, left, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = ALONE.replace("*FILES", repr(str(Path(__file__))))
    command = [sys.executable, "-c", code, hidden, left, str(tmp_path / "inner")]
    done = subprocess.run(command, check=False, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) == 2 * len(toys.NAMES)


def test_every_method_is_a_public_name():
    import lightning_prune

    assert set(methods.__all__) <= set(lightning_prune.__all__)
