"""Handling of options that all commands share."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["Command"]


class Command(TyperCommand):
    """A command that refuses an option given twice where it takes one value: the last would win without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            if parameter.param_type_name == "option" and not parameter.multiple and order.count(parameter) > 1:
                ctx.fail(f"{parameter.opts[0]} is given {order.count(parameter)} times, expected once")
        return super().parse_args(ctx, args)
