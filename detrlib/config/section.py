"""What all sections of settings have in common: they are frozen, and take values as people write them."""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _one_value_is_a_list_of_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Where a list may stand, `encoder_self` means [encoder_self], and `2,3,4` means [2, 3, 4]; not a word, such as
        `auto`, that may stand there in its place.
        """
        kind = cls.model_fields[info.field_name].annotation
        choices = [kind] if get_origin(kind) is tuple else get_args(kind)
        choices = [getattr(one, "__origin__", one) if hasattr(one, "__metadata__") else one for one in choices]
        of_any_length = any(get_args(one)[1:] == (...,) for one in choices)
        in_its_place = any(value in get_args(one) for one in choices if get_origin(one) is Literal)
        if of_any_length and not in_its_place and isinstance(value, str | int) and not isinstance(value, bool):
            return tuple(part.strip() for part in str(value).split(","))
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`train.micro_batch: true` was meant to be something else than 1; nor is it one in a list."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        among = value if isinstance(value, list | tuple) else [value]
        if bool not in kinds and kinds & {int, float} and any(isinstance(one, bool) for one in among):
            raise ValueError("expected a number")
        return value


def _kinds(annotation: Any) -> set:
    """The types that a value, or an entry of it, may be of."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))
