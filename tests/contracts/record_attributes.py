"""A mypy plugin that prints every attribute access as `ATTRIBUTE module.Class.name path:line`."""

from mypy.plugin import AttributeContext, Plugin


class RecordAttributes(Plugin):
    def get_attribute_hook(self, fullname: str):
        def record(ctx: AttributeContext):
            print(f"ATTRIBUTE {fullname} {ctx.api.path}:{ctx.context.line}")
            return ctx.default_attr_type

        return record if fullname.startswith("open_lm.") else None


def plugin(version: str) -> type[Plugin]:
    return RecordAttributes
