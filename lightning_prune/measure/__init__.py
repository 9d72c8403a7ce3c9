"""Questions about a model, answered with numbers and pictures; the model is left bit-identical."""

from lightning_prune.measure.prunability import Point, Prunability, prunability
from lightning_prune.measure.sensitivity import Curve, Sensitivity, sensitivity

__all__ = ["Curve", "Point", "Prunability", "Sensitivity", "prunability", "sensitivity"]
