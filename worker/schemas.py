"""The JSON Schema that is announced of a model: what the model takes is valid by it, and what it
cannot take is not, as far as JSON Schema can say it. Imported where there is a model alone."""

from __future__ import annotations

import copy
import json
import math
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema, to_jsonable_python

from jobsvc.core.schemas import tellable
from worker import patterns

_Function = (
    core_schema.BeforeValidatorFunctionSchema
    | core_schema.WrapValidatorFunctionSchema
    | core_schema.PlainValidatorFunctionSchema
)


def payload_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Raises whatever Pydantic raises for a model without a schema."""
    schema: dict[str, Any] = tellable(model.model_json_schema(schema_generator=_PayloadSchema))
    return schema


class _PayloadSchema(GenerateJsonSchema):
    """Pydantic's own describes the payload best; some of that refuses what the model takes."""

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        found = super().str_schema(schema)
        if (pattern := schema.get("pattern")) is not None:
            translated = self._pattern(pattern, schema.get("regex_engine"))
            found.pop("pattern", None)
            if translated is not None:
                found["pattern"] = translated
        # These look at what is left of it then.
        if schema.get("strip_whitespace", self._config.str_strip_whitespace):
            found.pop("maxLength", None)
            found.pop("pattern", None)
        return found

    def _pattern(self, pattern: Any, engine: patterns.Engine | None) -> str | None:
        if isinstance(pattern, str):
            return patterns.to_ecma(pattern, engine or self._config.regex_engine)
        if pattern.flags & ~_UNICODE or not isinstance(pattern.pattern, str):
            return None
        return patterns.to_ecma(pattern.pattern, "python-re")

    def bytes_schema(self, schema: core_schema.BytesSchema) -> JsonSchemaValue:
        found = super().bytes_schema(schema)
        found.pop("minLength", None)  # of bytes: fewer characters may have as many
        return found

    def _common_set_schema(
        self, schema: core_schema.SetSchema | core_schema.FrozenSetSchema
    ) -> JsonSchemaValue:
        found = super()._common_set_schema(schema)
        for keyword in ("uniqueItems", "maxItems"):  # what is there twice counts once
            found.pop(keyword, None)
        return found

    def enum_schema(self, schema: core_schema.EnumSchema) -> JsonSchemaValue:
        found = super().enum_schema(schema)
        # Code of its own may know more values; that of flags does.
        if any("_missing_" in vars(each) for each in schema["cls"].__mro__ if each is not Enum):
            found.pop("enum", None)
            found.pop("type", None)
        return found

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        found = super().tagged_union_schema(schema)
        if callable(schema["discriminator"]):  # it takes one of those that fit, of several too
            found["anyOf"] = found.pop("oneOf")
        return found

    def encode_default(self, dft: Any) -> Any:
        """NaN, which is left out later, for one that Pydantic would tell as null."""
        exact = to_jsonable_python(dft, inf_nan_mode="constants", serialize_unknown=True)
        try:
            json.dumps(exact, allow_nan=False)
        except ValueError:
            return math.nan
        return super().encode_default(dft)

    # What comes before a model's own code is that code's to read.

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        return {} if _takes_anything(schema) else super().function_before_schema(schema)

    def function_wrap_schema(
        self, schema: core_schema.WrapValidatorFunctionSchema
    ) -> JsonSchemaValue:
        return {} if _takes_anything(schema) else super().function_wrap_schema(schema)

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        return {} if _takes_anything(schema) else super().function_plain_schema(schema)

    def model_fields_schema(self, schema: core_schema.ModelFieldsSchema) -> JsonSchemaValue:
        found = super().model_fields_schema(schema)
        by_name = self._config.validate_by_name or self._config.populate_by_name
        for name, field in schema["fields"].items():
            paths = _paths(name, field.get("validation_alias"))
            if by_name:
                paths.append([name])
            if paths not in ([[name]], [paths[0][:1]]):
                _take_by_any(found, name, paths)
        return found


_UNICODE = 32  # re.UNICODE, which each pattern of text has


def _takes_anything(schema: _Function) -> bool:
    if schema.get("json_schema_input_schema"):
        return False
    return not schema["function"]["function"].__module__.startswith("pydantic.")


def _paths(name: str, alias: Any) -> list[list[Any]]:
    """Where a field is looked for: each path begins with a member of the object."""
    if not alias:
        return [[name]]
    if isinstance(alias, str):
        return [[alias]]
    return list(alias) if isinstance(alias[0], list) else [alias]


def _take_by_any(schema: JsonSchemaValue, name: str, paths: list[list[Any]]) -> None:
    """Let the field be given by any of the paths, none of which is required then."""
    properties = schema["properties"]
    names = [path[0] for path in paths]
    shown = next((each for each in (*names, name) if each in properties), None)
    for path in paths:
        known = properties.get(shown, {}) if len(path) == 1 else {}
        properties.setdefault(path[0], copy.deepcopy(known))
    required = [each for each in schema.get("required", ()) if each not in (*names, name)]
    schema.pop("required", None)
    if required:
        schema["required"] = required
