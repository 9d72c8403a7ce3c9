"""Drop-ins: a module of another class takes the place of a module, with everything that belongs to it."""

from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def twin(module: nn.Module, cls: type[_Module]) -> _Module:
    """Make a ``cls`` of everything that ``module`` holds: the same parameters, buffers, modules and attributes.

    Hooks stay in the same dictionaries, by which their handles know them; what a module is made of gets its own.
    """
    made = cls.__new__(cls)
    vars(made).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(made)[name] = vars(module)[name].copy()
    return made


def why_not_called(module: nn.Module) -> str | None:
    """Say why a drop-in would not be called as ``module`` is, as a phrase without full stop; None if it would."""
    replaced = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    if replaced:
        return f"its {replaced[0]} was replaced on this instance"
    if module._compiled_call_impl is not None:
        return "it was compiled in place: compile the model after it has become smaller"
    if any(getattr(hook, "with_module", False) for hook in module._load_state_dict_pre_hooks.values()):
        return "it has a load_state_dict pre-hook, which torch binds to this very module: remove the hook first"
    return None
