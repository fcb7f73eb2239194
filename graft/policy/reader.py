"""A policy's text (YAML) -> `Policy`, with every error at its line and field.

Three steps. graft/policy/document.py makes plain values and remembers the line of each. Pydantic models look at
one endpoint or one rule at a time, so that a broken one does not hide what is wrong with the next. At last
graft/policy/validator.py asks whether the rules that are sound fit together.

Only this module imports pydantic: it takes long, and `graft run` with flags needs none of it.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationError
from pydantic import ValidationInfo as Info
from pydantic_core import ErrorDetails, PydanticCustomError

from graft.errors import NotFoundError, UsageError
from graft.model.address import (
    BindPattern,
    Prefix,
    SocketAddress,
    parse_bind_pattern,
    parse_port_range,
    parse_prefix,
    shown,
)
from graft.model.endpoint import (
    ANY_PROTOCOL,
    MAX_POLICY_NAME,
    Endpoint,
    Protocol,
    check_dual_stack,
    parse_endpoint_address,
    parse_name,
    parse_netns,
    parse_protocol,
)
from graft.model.ports import PortRange
from graft.policy.compiler import RuleSet, compile_policy
from graft.policy.document import Document, FieldPath, Value, format_path, read_document
from graft.policy.limits import FEWER_RULES, MAX_BYTES, MAX_RULES
from graft.policy.model import Default, EgressRule, IngressRule, Policy, PolicyError, Problem, Verdict
from graft.policy.validator import check_rules, no_endpoint

_FIELD = "field"
_NO_VALUE = "leave the key out, or give it a value"
_KINDS = {str: "text", bool: "true or false", list: "a list", dict: "a mapping", type(None): "nothing"}


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of a text: a policy and its entries, or the reasons why not.

    ``ruleset`` is None too where it was not known which endpoints there are.
    """

    policy: Policy | None
    ruleset: RuleSet | None
    problems: tuple[Problem, ...]


def read_policy(path: Path, plain_only: bool = False) -> str:
    """The text of a policy file. Raises NotFoundError or UsageError, also for what is too big or not UTF-8.

    ``plain_only``: not of a pipe or a device, for a path that an image may have named.
    """
    try:
        with _open_plain(path) if plain_only else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"policy: there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"policy: {path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise UsageError(f"policy: {shown(str(path))} is not a path") from None
    return decode_policy(data, str(path))


def _open_plain(path: Path) -> BinaryIO:
    """``path``, opened for reading only once it is known to be a file: to open a device may do something already."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"policy: {path} is no plain file")
        return open(f"/proc/self/fd/{fd}", "rb")
    finally:
        os.close(fd)


def decode_policy(data: bytes, source: str) -> str:
    """The text in ``data``, what was read of ``source``. Raises UsageError for what is too big or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise UsageError(f"policy: {source} is too big", f"at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"policy: {source} is not UTF-8 text") from None


def examine_policy(text: str, known_endpoints: Mapping[str, Endpoint] | None) -> Examined:
    """Read, check and compile the policy in ``text``.

    ``known_endpoints`` are those that exist besides the ones it declares; with None they are not known,
    and a rule that names such a one is taken on trust.
    """
    document = read_document(text)
    if document.value is None and document.problems:
        return Examined(None, None, tuple(document.problems))
    examination = _Examination(document, known_endpoints)
    policy = examination.policy()
    problems = examination.problems
    ruleset = None
    if not problems and known_endpoints is not None:
        try:
            ruleset = compile_policy(policy, known_endpoints)
        except UsageError as error:
            problems.append(document.problem((), _without_field(error, "policy"), error.hint))
    if problems:
        in_order = sorted(set(problems), key=lambda problem: (problem.line or 0, problem.field))
        return Examined(None, None, tuple(in_order))
    return Examined(policy, ruleset, ())


def load_policy(text: str, source_name: str, known_endpoints: Mapping[str, Endpoint] | None = None) -> Policy:
    """The policy that ``text`` (YAML) holds; ``source_name`` is what errors call it.

    With ``known_endpoints`` None, endpoints that the policy does not declare are taken on trust:
    `compile_policy` asks again. Raises PolicyError with every problem.
    """
    examined = examine_policy(text, known_endpoints)
    if examined.policy is None or examined.problems:
        raise PolicyError(source_name, examined.problems)
    return examined.policy


def check_policy(text: str, known_endpoints: Mapping[str, Endpoint]) -> list[Problem]:
    """Everything that is wrong with the policy in ``text``, by line; an empty list if it can be applied."""
    return list(examine_policy(text, known_endpoints).problems)


def _without_field(error: UsageError, field: str) -> str:
    return error.message.removeprefix(f"{field}: ")


T = TypeVar("T")


def _text(parse: Callable[[str, str], T]) -> PlainValidator:
    """A field whose text ``parse(text, field)`` takes; its UsageError becomes the field's error."""

    def validate(value: Value) -> T:
        if not isinstance(value, str):
            hint = "in quotes, if it is meant as text" if isinstance(value, bool) else "a single value"
            raise _wrong_type(value, "text", hint)
        try:
            return parse(value, _FIELD)
        except UsageError as error:
            raise _custom(_without_field(error, _FIELD), error.hint) from None

    return PlainValidator(validate)


def _custom(message: str, hint: str | None) -> PydanticCustomError:
    return PydanticCustomError("graft", "{message}", {"message": message, "hint": hint})


def _wrong_type(value: Value, expected: str, hint: str | None = None) -> PydanticCustomError:
    if value is None:
        hint = _NO_VALUE
    return _custom(_type_error(value, expected), hint)


def _type_error(value: Value, expected: str) -> str:
    return "there is no value" if value is None else f"must be {expected}, not {_KINDS[type(value)]}"


def _of_type(kind: type, hint: str | None = None) -> PlainValidator:
    def validate(value: Value) -> Value:
        if not isinstance(value, kind):
            raise _wrong_type(value, _KINDS[kind], hint)
        return value

    return PlainValidator(validate)


def _choice(choices: Mapping[str, T]) -> PlainValidator:
    def parse(text: str, field: str) -> T:
        if text not in choices:
            raise UsageError(f"{field}: {shown(text)} is not possible here", " or ".join(choices))
        return choices[text]

    return _text(parse)


def _existing_endpoint(name: str, info: Info) -> str:
    names: Collection[str] | None = info.context
    if names is not None and name not in names:
        raise _custom(*no_endpoint(name))
    return name


def _not_empty(ports: list[PortRange] | None) -> list[PortRange] | None:
    if ports == []:
        raise _custom("the list is empty", "leave ports out to mean every port")
    return ports


def _listed(value: Value) -> Value:
    if not isinstance(value, list):
        raise _wrong_type(value, _KINDS[list], "such as [80, 443, 8000-8099]")
    return value


def _long_endpoint(value: Value) -> Value:
    return {"address": value} if isinstance(value, str) else value


def _long_default(value: Value) -> Value:
    return {"bind": value, "connect": value} if isinstance(value, str) else value


_Name = Annotated[str, _text(lambda text, field: parse_name(text, field, MAX_POLICY_NAME))]
_DEFAULTS = _choice({"container": Default.CONTAINER, "deny": Default.DENY})
_DefaultField = Annotated[Default, _DEFAULTS]
_Switch = Annotated[bool, _of_type(bool, "true, or leave it out")]
_Port = Annotated[PortRange, _text(parse_port_range)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class _PolicyModel(_Model):
    """The keys of a policy. What its sections hold is looked at piece by piece."""

    name: _Name
    open: _Switch = False
    endpoints: Annotated[Any, _of_type(dict, "NAME: ADDR:PORT")] = None
    ingress: Annotated[Any, _of_type(list, "of rules, each with bind: and endpoint:")] = None
    egress: Annotated[Any, _of_type(list, "of rules, each with to: and endpoint: or action:")] = None
    default: Any = None


class _EndpointModel(_Model):
    address: Annotated[SocketAddress, _text(parse_endpoint_address)]
    protocol: Annotated[Protocol, _text(parse_protocol)] = ANY_PROTOCOL
    netns: Annotated[str | None, _text(parse_netns)] = None
    open: _Switch = False
    dual_stack: _Switch = False


class _IngressModel(_Model):
    bind: Annotated[BindPattern, _text(parse_bind_pattern)]
    endpoint: Annotated[str, _text(parse_name), AfterValidator(_existing_endpoint)]
    protocol: Annotated[Protocol | None, _text(parse_protocol)] = None


class _EgressModel(_Model):
    to: Annotated[Prefix, _text(parse_prefix)]
    ports: Annotated[list[_Port] | None, BeforeValidator(_listed), AfterValidator(_not_empty)] = None
    protocol: Annotated[Protocol | None, _text(parse_protocol)] = None
    endpoint: Annotated[str | None, _text(parse_name), AfterValidator(_existing_endpoint)] = None
    action: Annotated[Verdict | None, _choice({"deny": Verdict.DENY, "container": Verdict.CONTAINER})] = None


class _DefaultModel(_Model):
    bind: _DefaultField = Default.CONTAINER
    connect: _DefaultField = Default.CONTAINER
    other: Annotated[Default | None, _DEFAULTS] = None


M = TypeVar("M", bound=_Model)


class _Examination:
    """Walks one document and gathers its problems."""

    def __init__(self, document: Document, known: Mapping[str, Endpoint] | None) -> None:
        self.problems = list(document.problems)
        self._document = document
        self._known = known
        self._existing = self._names()
        self._lines = {format_path(path): line for path, line in document.lines.items()}

    def policy(self) -> Policy:
        """The policy as far as it could be read: the whole of it only if ``problems`` is empty afterwards."""
        whole = self._validate(_PolicyModel, (), self._document.value)
        default = self._default()
        policy = Policy(
            name=whole.name if whole else "policy",
            endpoints=self._endpoints(),
            ingress=self._ingress(),
            egress=self._egress(),
            bind_default=default.bind,
            connect_default=default.connect,
            open=whole.open if whole else False,
            other_default=default.other,
        )
        self.problems += [self._placed(problem) for problem in check_rules(policy, policy.resolve(self._known or {}))]
        return policy

    def _default(self) -> _DefaultModel:
        value = self._section("default")
        if not isinstance(self._document.value, dict) or "default" not in self._document.value:
            return _DefaultModel()
        return self._validate(_DefaultModel, ("default",), _long_default(value)) or _DefaultModel()

    def _endpoints(self) -> tuple[Endpoint, ...]:
        section = self._section("endpoints")
        endpoints = []
        for name, value in self._first(section.items() if isinstance(section, dict) else (), "endpoints"):
            model = self._validate(_EndpointModel, ("endpoints", name), _long_endpoint(value))
            if self._named(name) and model:
                address, port = model.address.ip, model.address.port
                self._check_dual_stack(name, model)
                endpoints.append(
                    Endpoint(name, address, port, model.protocol, model.netns, model.open, model.dual_stack)
                )
        return tuple(endpoints)

    def _check_dual_stack(self, name: str, model: _EndpointModel) -> None:
        try:
            check_dual_stack(model.dual_stack, model.address, _FIELD)
        except UsageError as error:
            self._report(("endpoints", name, "dual_stack"), _without_field(error, _FIELD), error.hint)

    def _named(self, name: str) -> bool:
        try:
            parse_name(name, _FIELD)
        except UsageError as error:
            self._report(("endpoints", name), _without_field(error, _FIELD), error.hint)
            return False
        return True

    def _ingress(self) -> tuple[IngressRule, ...]:
        rules = []
        for path, value in self._rules("ingress"):
            if model := self._validate(_IngressModel, path, value):
                field, line = format_path(path), self._document.lines[path]
                rules.append(IngressRule(model.bind, model.endpoint, model.protocol, field, line))
        return tuple(rules)

    def _egress(self) -> tuple[EgressRule, ...]:
        rules = []
        for path, value in self._rules("egress"):
            decided = self._decides(path, value)
            model = self._validate(_EgressModel, path, value)
            if model and decided:
                ports = None if model.ports is None else tuple(model.ports)
                verdict = model.action or Verdict.GRANT
                field, line = format_path(path), self._document.lines[path]
                rules.append(EgressRule(model.to, verdict, model.endpoint, ports, model.protocol, field, line))
        return tuple(rules)

    def _decides(self, path: FieldPath, rule: Value) -> bool:
        """Whether an egress rule has either an endpoint or an action."""
        if not isinstance(rule, dict):
            return False
        if "endpoint" in rule and "action" in rule:
            self._report((*path, "action"), "a rule has an endpoint or an action, not both", "leave one of them out")
        elif "endpoint" not in rule and "action" not in rule:
            hint = "endpoint: NAME, action: deny or action: container"
            self._report(path, "the rule has neither endpoint nor action", hint)
        return ("endpoint" in rule) != ("action" in rule)

    def _rules(self, key: str) -> Iterator[tuple[FieldPath, Value]]:
        section = self._section(key)
        for index, value in self._first(enumerate(section) if isinstance(section, list) else (), key):
            yield (key, index), value

    def _first(self, items: Iterable[T], key: str) -> list[T]:
        """As many of ``items`` as a section may hold."""
        kept = list(islice(items, MAX_RULES + 1))
        if len(kept) > MAX_RULES:
            self._report((key,), f"more than {MAX_RULES} of them", FEWER_RULES)
        return kept[:MAX_RULES]

    def _section(self, key: str) -> Value:
        return self._document.at((key,))

    def _names(self) -> Collection[str] | None:
        """Every name that a rule may use; those of broken endpoints too, which have an error already."""
        declared = self._section("endpoints")
        return None if self._known is None else {*self._known, *(declared if isinstance(declared, dict) else ())}

    def _validate(self, model: type[M], path: FieldPath, value: Value) -> M | None:
        try:
            return model.model_validate(value, context=self._existing)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                self._report((*path, *details["loc"]), *_explain(details, model))
            return None

    def _report(self, path: FieldPath, message: str, hint: str | None = None) -> None:
        self.problems.append(self._document.problem(path, message, hint))

    def _placed(self, problem: Problem) -> Problem:
        """``problem`` of a rule, at the line of the field that it names."""
        return replace(problem, line=self._lines.get(problem.field, problem.line))


def _explain(details: ErrorDetails, model: type[_Model]) -> tuple[str, str | None]:
    """Message and hint for an error of pydantic's. The models allow only these kinds."""
    kind = details["type"]
    if kind == "graft":
        return details["ctx"]["message"], details["ctx"]["hint"]
    if kind == "missing":
        return "the key is missing", _EXAMPLES.get(str(details["loc"][-1]))
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(details["loc"][-1]), model.model_fields, 1)
        return "unknown key", f"did you mean {near[0]}?" if near else f"one of {', '.join(model.model_fields)}"
    if kind in ("model_type", "model_attributes_type"):
        hint = _NO_VALUE if details["input"] is None else f"of {', '.join(model.model_fields)}"
        return _type_error(details["input"], "a mapping"), hint
    return details["msg"], None


_EXAMPLES = {
    "name": "name: nginx",
    "address": "address: 0.0.0.0:8080",
    "bind": "bind: 0.0.0.0:80",
    "endpoint": "endpoint: NAME",
    "to": "to: 10.0.0.0/8",
}
"""What a missing key could look like."""
