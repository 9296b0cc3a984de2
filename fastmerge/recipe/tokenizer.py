"""``tokenizer:``, ``tokenizer_source:`` and ``chat_template:`` as mergekit's recipes write them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastmerge.errors import RecipeError, brief, nearest
from fastmerge.recipe.located import placed
from fastmerge.recipe.reference import reference
from fastmerge.recipe.section import FaultError, Section, field, whole

_KINDS = ("model_token", "zero")


@dataclass(frozen=True)
class TokenSource:
    """Which row a token takes: of the token itself, of ``token``, or number ``token_id``, in
    ``model``; zeros where that is None.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None


def token_source(value: Any) -> TokenSource:
    """A model, ``{kind: model_token, model, token | token_id}`` or ``{kind: zero}``."""
    own = ("kind", "token", "token_id")
    if not isinstance(value, Mapping) or not any(key in value for key in own):
        return TokenSource(reference(value))
    kind = value.get("kind")
    if kind is None:
        raise FaultError("has no 'kind:'; write `kind: model_token` beside its token")
    if kind not in _KINDS:
        wanted = " or ".join(f"'{known}'" for known in _KINDS)
        raise FaultError(f"has the kind {brief(kind)}; use {wanted}")
    known = ("kind", "model", "token", "token_id") if kind == "model_token" else ("kind",)
    for name, given in value.items():
        if name not in known and given is not None:
            raise FaultError(f"has the key '{name}' that a {kind} does not; {nearest(name, known)}")
    if kind == "zero":
        return TokenSource()
    token, number = value.get("token"), value.get("token_id")
    if (token is None) == (number is None):
        raise FaultError("needs either 'token' or 'token_id'")
    if value.get("model") is None:
        raise FaultError("needs a 'model'")
    if token is not None and not isinstance(token, str):
        raise FaultError("has a token that is not text; quote it")
    if number is not None and (type(number) is not int or number < 0):
        raise FaultError("has a token_id that is no whole number of 0 or more")
    return TokenSource(reference(value["model"]), token, number)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise FaultError("must be true or false")
    return value


def _misspells(name: str, known: Collection[str]) -> bool:
    """More is taken for a misspelling here than elsewhere: what is left out is `union`."""
    return "did you mean" in nearest(name, known)


class TokenEntry(Section):
    """One token of ``tokens:``."""

    tolerant: ClassVar[bool] = True

    source: TokenSource | None = field(token_source, None)
    force: bool = field(_boolean, False)  # for every model, whether it has a row or not

    def misspells(self, name: str) -> bool:
        return _misspells(name, self.fields)


def _tokens(value: Any) -> Mapping[str, TokenEntry]:
    if not isinstance(value, Mapping):
        raise FaultError("must be a mapping of tokens")
    return {token: TokenEntry({} if entry is None else entry) for token, entry in value.items()}


def _source(value: Any) -> str:
    """A model by itself or, as mergekit had it until 2024, behind ``model:``."""
    return reference(value).removeprefix("model:")


class TokenizerSection(Section):
    """Whose tokenizer the output has, and where rows come from that a model lacks."""

    tolerant: ClassVar[bool] = True

    source: str = field(_source, "union")  # or base, or a model
    tokens: Mapping[str, TokenEntry] = field(_tokens, {})
    pad_to_multiple_of: int | None = field(whole(1, 1 << 20), None)

    def __init__(self, data: Any) -> None:
        if isinstance(data, str):
            raise FaultError(f"must be a mapping; write `tokenizer_source: {brief(data)[1:-1]}`")
        super().__init__(data)

    def misspells(self, name: str) -> bool:
        return name == "model" or _misspells(name, self.fields)

    def hint(self, name: str) -> str:
        return "write 'source:'" if name == "model" else super().hint(name)

    def belongs(self, name: str) -> str:
        return "it belongs at the top" if name == "chat_template" else ""

    @classmethod
    def of_source(cls, source: str, where: str) -> TokenizerSection:
        """What ``tokenizer_source:`` means."""
        return cls(placed(where, source=source))


_NONE = ("none", "null", "no", "false", "off")


def chat_template(value: Any) -> str:
    """``auto``, the name of a known template, or a template's own text, as one text."""
    if value is False or (isinstance(value, str) and value.strip().lower() in _NONE):
        raise FaultError(
            "has no word for none: left out, the donor's stays; for an output without one, delete "
            "chat_template.jinja, and the key in tokenizer_config.json, of the result"
        )
    if not isinstance(value, str) or not value.strip():
        raise FaultError("must be 'auto', a template's name or its Jinja text")
    return value


def check_template(name: str, known: Mapping[str, str], where: str) -> None:
    """Raises RecipeError for what is neither a known name nor Jinja."""
    if name != "auto" and name not in known and "{" not in name:
        raise RecipeError(
            f"{where}: chat_template '{name}' is no known name and no Jinja text; "
            f"{nearest(name, ['auto', *known])}"
        )
