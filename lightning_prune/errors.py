"""Everything a user can cause, as one tree; whatever else is raised is a mistake of ours.

LightningPruneError
├── OptionError        an argument or a value of a recipe is of the wrong type, name or range
│   └── RecipeError    the recipe file itself: missing, not YAML, unknown keys
├── ModelError         the model cannot be run, traced or changed as asked
├── TrainerError       this Trainer cannot do it: strategy, launcher, stage
├── BudgetError        a bound that cannot be met; names the layers that bind
├── PlanError          a plan that is broken or belongs to another model
├── CheckpointError    a checkpoint that is missing, truncated, foreign or unsafe
└── ExportError        an ONNX file or runtime: missing, truncated, wrong inputs, wrong outputs
    └── RuntimeMissingError    no onnxruntime, two of them, or not the provider asked for

Messages say which object, what came, what is allowed and what to do. The command line prints them on one line and exits with 2.
"""


class LightningPruneError(Exception):
    """Root of all errors that a user can cause."""


class OptionError(LightningPruneError, ValueError):
    """An argument of the wrong type, name or range."""


class RecipeError(OptionError):
    """A recipe that is missing, is not safe YAML, or holds keys nobody reads."""


class ModelError(LightningPruneError, ValueError):
    """A model that cannot be run, traced or changed as asked."""


class TrainerError(LightningPruneError, RuntimeError):
    """A Trainer whose strategy, launcher or stage rules the request out."""


class BudgetError(LightningPruneError, ValueError):
    """A budget that cannot be met."""


class PlanError(LightningPruneError, ValueError):
    """A plan that is broken or was made for another model."""


class CheckpointError(LightningPruneError, RuntimeError):
    """A checkpoint that is missing, truncated, foreign or unsafe."""


class ExportError(LightningPruneError, RuntimeError):
    """An ONNX file that cannot be written, read or trusted."""


class RuntimeMissingError(ExportError):
    """No usable onnxruntime, or not the execution provider that was asked for."""
