"""From the text of `TrainingConfig.compression` to a codec.

    SPEC      = NAME [":" ARGUMENTS]
    NAME      = one of CODECS, or the import path "package.module:attribute"
    ARGUMENTS = ARGUMENT {"," ARGUMENT}
    ARGUMENT  = VALUE | KEY "=" VALUE
    VALUE     = an integer, a number, "on", "off", or a word

such as "topk:0.01", "topk:0.001,values=int8", "powersgd:2" or "my_codecs.sign:Sign:0.5".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from torchord.cache.errors import ConfigError, NotAllowed, RecipeError
from torchord.coordinator.compression.codec import Codec, Plain
from torchord.coordinator.compression.powersgd import PowerSGD
from torchord.coordinator.compression.quantized import bf16, fp16, int8, sign
from torchord.coordinator.compression.topk import TopK
from torchord.coordinator.spec.admission import Admission

CODECS: Mapping[str, Callable[..., Codec]] = {
    "none": Plain,
    "fp16": fp16,
    "bf16": bf16,
    "int8": int8,
    "sign": sign,
    "topk": TopK,
    "powersgd": PowerSGD,
}
"""The codecs that have a name of their own."""

Resolve = Callable[[str], Callable[..., Any]]


def parse(spec: str, *, resolve: Resolve | None = None) -> Codec:
    """Return the codec that a config names.

    Args:
        spec: see this module's grammar.
        resolve: "package.module:attribute" -> the callable there, which makes a codec of the
            arguments; on a worker `Admission(allowed).fetch`, so that a codec may come from
            where a recipe may. None: `Admission(None).fetch`, the allow-list's default.

    Raises:
        ConfigError: the codec is unknown, or an argument missing, superfluous or out of range.
        NotAllowed: this worker may not import the codec's module.

    Example:
        >>> parse("topk:0.01").stateful
        True
    """
    name, arguments = _split(spec)
    make = CODECS.get(name)
    if make is None:
        make = _imported(spec, name, resolve or Admission(None).fetch)
    return _made(spec, make, arguments)


CodecOf = Callable[[str], Codec]
"""From what a config or a record says of its compression to the codec; each is made once a process."""


def codecs_within(admission: Admission) -> CodecOf:
    """Return what finds a run's codecs: those of an import path come from where its recipe may.

    The function raises ConfigError and NotAllowed as `parse` does.
    """
    return partial(_made_once, admission=admission)


@lru_cache(maxsize=32)
def _made_once(spec: str, admission: Admission) -> Codec:
    return parse(spec, resolve=partial(admission.fetch, role="codec"))


def check(spec: str) -> None:
    """Validate a spec without importing anything: a named codec wholly, an import path by its form.

    Raises:
        ConfigError: as `parse` raises it.
    """
    name, arguments = _split(spec)
    if name in CODECS:
        _made(spec, CODECS[name], arguments)


def _split(spec: Any) -> tuple[str, str]:
    """Return name and arguments; the name of one of CODECS or an import path."""
    if not isinstance(spec, str):
        raise ConfigError(f"compression must be a string, not {spec!r}; {_known()}")
    name, _, arguments = spec.partition(":")
    if name in CODECS:
        if spec.endswith(":"):
            raise ConfigError(f"compression={spec!r} ends in a colon; write {name!r}, or arguments after it")
        return name, arguments
    attribute, _, rest = arguments.partition(":")
    parts = [*name.split("."), *attribute.split(".")]
    if attribute and all(part.isidentifier() for part in parts):
        return f"{name}:{attribute}", rest
    raise ConfigError(f"compression={spec!r} names no codec; {_known()}")


def _known() -> str:
    return (
        "known are 'none', 'fp16', 'bf16', 'int8', 'sign', 'topk:FRACTION' and 'powersgd:RANK', or give an "
        "import path 'package.module:attribute'"
    )


def _imported(spec: str, target: str, resolve: Resolve) -> Callable[..., Any]:
    try:
        return resolve(target)
    except NotAllowed:
        raise
    except RecipeError as error:
        raise ConfigError(f"compression={spec!r} cannot be imported: {error} ({_known()})") from error


def _made(spec: str, make: Callable[..., Any], arguments: str) -> Codec:
    args, kwargs = _arguments(spec, arguments)
    try:
        signature = inspect.signature(make)
    except ValueError:  # some built-in types have none
        signature = inspect.Signature([])
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        accepted = ", ".join(map(str, signature.parameters.values())) or "no arguments"
        raise ConfigError(f"compression={spec!r}: {error}; it takes {accepted}") from None
    try:
        codec = make(*args, **kwargs)
    except ConfigError as error:
        raise ConfigError(f"compression={spec!r}: {error}") from None
    if not isinstance(codec, Codec):
        raise ConfigError(
            f"compression={spec!r} made a {type(codec).__name__}, but must make a codec, with encode, decode "
            "and stateful; derive it from torchord.coordinator.compression.TensorCodec"
        )
    return codec


def _arguments(spec: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in text.split(",") if text else []:
        key, equals, value = argument.rpartition("=")
        if not value or (equals and not key.isidentifier()) or (not equals and kwargs):
            raise ConfigError(
                f"compression={spec!r}: cannot read {argument!r}; arguments are VALUE or KEY=VALUE, "
                "separated by commas, values first"
            )
        if key in kwargs:
            raise ConfigError(f"compression={spec!r}: {key!r} is given twice")
        if equals:
            kwargs[key] = _value(value)
        else:
            args.append(_value(value))
    return args, kwargs


def _value(text: str) -> Any:
    if text in ("on", "off"):
        return text == "on"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
