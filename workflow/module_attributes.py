"""A plugin of mypy: what a torch module gets from `__getattr__` may be anything.

torch declares it as `Tensor | Module`. That is a guess: `layer.in_features` is a number, and
`layer.bias` may be None. Attributes that torch declares one by one keep their types.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type


def anything(context: AttributeContext) -> Type:
    """Any in the place of torch's guess."""
    found = get_proper_type(context.default_attr_type)
    guessed = isinstance(found, UnionType) and len(found.items) == 2
    return AnyType(TypeOfAny.special_form) if guessed else context.default_attr_type


class ModuleAttributes(Plugin):
    """Knows the attributes of `torch.nn.Module`, and of no other class."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """What gives an attribute its type."""
        return anything if fullname.startswith("torch.nn.modules.module.Module.") else None


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return ModuleAttributes
