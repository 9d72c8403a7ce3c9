"""What can be removed from a model with what, or why not; and what a method would do.

The package is not called ``explain``: a module of that name would take the place of the public function of that name.
"""

from lightning_prune.explanation.answer import Explanation
from lightning_prune.explanation.ask import explain
from lightning_prune.explanation.rows import GroupRow, Row

__all__ = ["Explanation", "GroupRow", "Row", "explain"]
