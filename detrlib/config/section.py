"""What all sections of settings have in common: they are frozen, and take values as people write them."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _one_value_is_a_list_of_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Where a list may stand, `encoder_self` means [encoder_self], and `2,3,4` means [2, 3, 4]."""
        kind = cls.model_fields[info.field_name].annotation
        of_any_length = any(get_args(part)[1:] == (...,) for part in (kind, *get_args(kind)))
        if of_any_length and isinstance(value, str | int) and not isinstance(value, bool):
            return tuple(part.strip() for part in str(value).split(","))
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`train.micro_batch: true` was meant to be something else than 1."""
        kind = cls.model_fields[info.field_name].annotation
        kinds = {getattr(part, "__origin__", part) for part in (kind, *get_args(kind))}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("expected a number")
        return value
