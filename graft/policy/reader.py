"""A policy's text (YAML) -> `Policy`, with every error at its line and field.

Three steps. graft/policy/document.py makes plain values and remembers the line of each. Then each endpoint and each
rule is read by itself (graft/policy/fields.py), so that an invalid one does not hide the errors of the next. Last,
graft/policy/validator.py checks whether the valid rules fit their endpoints and each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from graft.errors import UsageError
from graft.model.address import parse_bind_pattern, parse_port_range, parse_prefix
from graft.model.endpoint import (
    ANY_PROTOCOL,
    MAX_POLICY_NAME,
    Endpoint,
    check_dual_stack,
    check_multicast,
    check_no_owner,
    check_unix_options,
    in_order,
    parse_egress_protocol,
    parse_endpoint_address,
    parse_group,
    parse_name,
    parse_netns,
    parse_protocol,
    unix_endpoint,
)
from graft.model.unix_socket import DEFAULT_MODE, UnixSocket, is_unix, parse_mode, parse_owner, parse_path
from graft.policy.compiler import RuleSet, compile_policy
from graft.policy.document import Document, FieldPath, Value, format_path, read_document
from graft.policy.fields import Fields, choice
from graft.policy.limits import FEWER_RULES, MAX_RULES
from graft.policy.model import Default, EgressRule, IngressRule, Policy, PolicyError, Problem, UnixRule, Verdict
from graft.policy.validator import check_rules, endpoint_not_found

T = TypeVar("T")

_SWITCH_HINT = "true, or leave it out"
_parse_action = choice({"deny": Verdict.DENY, "container": Verdict.CONTAINER})
_parse_default = choice({"container": Default.CONTAINER, "deny": Default.DENY})


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The policy in a text and its entries, or the reasons why there is none.

    ``ruleset`` is None too where it was not known which endpoints there are.
    """

    policy: Policy | None
    ruleset: RuleSet | None
    problems: tuple[Problem, ...]


def check_policy(text: str, known_endpoints: Mapping[str, Endpoint] | None) -> CheckResult:
    """Read, check and compile the policy in ``text``. Problems come in the order of their lines.

    ``known_endpoints`` are those that exist besides the ones it declares. With None they are not known, and a rule may
    name an endpoint that the policy does not declare.
    """
    document = read_document(text)
    if document.value is None and document.problems:
        return CheckResult(None, None, tuple(document.problems))
    return check_document(document, known_endpoints)


def check_document(document: Document, known_endpoints: Mapping[str, Endpoint] | None) -> CheckResult:
    """`check_policy` of values that were read before."""
    policy = _PolicyReader(document, known_endpoints).read()
    ruleset = None
    if not document.problems and known_endpoints is not None:
        try:
            ruleset = compile_policy(policy, known_endpoints)
        except UsageError as error:
            document.report((), error.message.removeprefix("policy: "), error.hint)
    if document.problems:
        return CheckResult(None, None, _in_order(document.problems))
    return CheckResult(policy, ruleset, ())


def _in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """By line, and each only once: `default: x` stands for two fields with the same problem."""
    return tuple(sorted(set(problems), key=lambda problem: (problem.line or 0, problem.field, problem.message)))


def load_policy(text: str, source_name: str, known_endpoints: Mapping[str, Endpoint] | None = None) -> Policy:
    """The policy in ``text`` (YAML); ``source_name`` is what errors call it.

    With ``known_endpoints`` None, endpoints that the policy does not declare are not checked: `compile_policy` does
    that. Raises PolicyError with every problem.
    """
    result = check_policy(text, known_endpoints)
    if result.policy is None:
        raise PolicyError(source_name, result.problems)
    return result.policy


class _PolicyReader:
    """Makes a policy of a document, and reports to the document what is wrong with it."""

    def __init__(self, document: Document, known: Mapping[str, Endpoint] | None) -> None:
        self._document = document
        self._known = known
        self._names: Collection[str] | None = None
        if known is not None:  # the names of invalid endpoints too: those have an error already
            declared = document.at(("endpoints",))
            self._names = {*known, *(declared if isinstance(declared, dict) else ())}

    def read(self) -> Policy:
        """The policy as far as it is valid: all of it only if the document has no problems afterwards."""
        keys = ("name", "open", "endpoints", "ingress", "egress", "default")
        fields = Fields(self._document, (), self._document.value, keys)
        name = fields.required("name", lambda text, field: parse_name(text, field, MAX_POLICY_NAME))
        is_open = fields.of_type("open", bool, _SWITCH_HINT)
        endpoints = fields.of_type("endpoints", dict, "NAME: ADDR:PORT") or {}
        ingress = fields.of_type("ingress", list, "of rules, each with bind: and endpoint:") or []
        egress = fields.of_type("egress", list, "of rules, each with to: and endpoint: or action:") or []
        bind_default, connect_default, other_default = self._defaults()
        policy = Policy(
            name=name or "policy",
            endpoints=tuple(self._endpoints(endpoints)),
            ingress=tuple(self._ingress_rules(ingress)),
            unix_ingress=tuple(self._unix_rules(ingress)),
            egress=tuple(self._egress_rules(egress)),
            bind_default=bind_default,
            connect_default=connect_default,
            open=bool(is_open),
            other_default=other_default,
        )
        self._check_rules(policy)
        return policy

    def _defaults(self) -> tuple[Default, Default, Default | None]:
        """Of binds, of connects, of sockets that no rule can match."""
        path = ("default",)
        if path not in self._document.lines:
            return Default.CONTAINER, Default.CONTAINER, None
        value = self._document.at(path)
        long_form: Value = {"bind": value, "connect": value} if isinstance(value, str) else value
        fields = Fields(self._document, path, long_form, ("bind", "connect", "other"))
        bind = fields.text("bind", _parse_default)
        connect = fields.text("connect", _parse_default)
        return bind or Default.CONTAINER, connect or Default.CONTAINER, fields.text("other", _parse_default)

    def _endpoints(self, section: dict[str, Value]) -> Iterator[Endpoint]:
        for name, value in self._within_limit(section.items(), "endpoints"):
            yield from read_endpoint(self._document, ("endpoints", name), name, value)

    def _ingress_rules(self, section: list[Value]) -> Iterator[IngressRule]:
        for index, value in self._within_limit(enumerate(section), "ingress"):
            if isinstance(value, dict) and _is_unix(value.get("bind")):
                continue
            path = ("ingress", index)
            fields = Fields(self._document, path, value, ("bind", "endpoint", "protocol"))
            bind = fields.required("bind", parse_bind_pattern)
            endpoint = fields.required("endpoint", self._parse_endpoint_name)
            protocols = fields.text("protocol", parse_protocol)
            if bind is not None and endpoint is not None and fields.valid:
                yield IngressRule(bind, endpoint, protocols, format_path(path), self._document.lines[path])

    def _unix_rules(self, section: list[Value]) -> Iterator[UnixRule]:
        for index, value in islice(enumerate(section), MAX_RULES):
            if not (isinstance(value, dict) and _is_unix(value.get("bind"))):
                continue
            path = ("ingress", index)
            fields = Fields(self._document, path, value, ("bind", "endpoint"))
            bind = fields.required("bind", parse_path)
            endpoint = fields.required("endpoint", self._parse_endpoint_name)
            if bind is not None and endpoint is not None and fields.valid:
                yield UnixRule(bind, endpoint, format_path(path), self._document.lines[path])

    def _egress_rules(self, section: list[Value]) -> Iterator[EgressRule]:
        for index, value in self._within_limit(enumerate(section), "egress"):
            path = ("egress", index)
            fields = Fields(self._document, path, value, ("to", "ports", "protocol", "endpoint", "action"))
            if isinstance(value, dict):
                _check_one_outcome(fields, value)
            to = fields.required("to", parse_prefix)
            ports = fields.texts("ports", parse_port_range, "such as [80, 443, 8000-8099]")
            protocols = fields.text("protocol", parse_egress_protocol)
            endpoint = fields.text("endpoint", self._parse_endpoint_name)
            verdict = fields.text("action", _parse_action) or Verdict.GRANT
            if to is not None and fields.valid:
                line = self._document.lines[path]
                yield EgressRule(to, verdict, endpoint, ports, protocols, format_path(path), line)

    def _within_limit(self, items: Iterable[T], key: str) -> Iterator[T]:
        """As many of ``items`` as a section may have."""
        kept = list(islice(items, MAX_RULES + 1))
        if len(kept) > MAX_RULES:
            self._document.report((key,), f"more than {MAX_RULES} of them", FEWER_RULES)
        return islice(kept, MAX_RULES)

    def _parse_endpoint_name(self, text: str, field: str) -> str:
        name = parse_name(text, field)
        if self._names is not None and name not in self._names:
            message, hint = endpoint_not_found(name)
            raise UsageError(f"{field}: {message}", hint)
        return name

    def _check_rules(self, policy: Policy) -> None:
        problems = check_rules(policy, policy.resolve(self._known or {}))
        if problems:
            lines = {format_path(path): line for path, line in self._document.lines.items()}
            self._document.problems += [
                replace(problem, line=lines.get(problem.field, problem.line)) for problem in problems
            ]


def read_endpoint(document: Document, path: FieldPath, name: str, value: Value) -> Iterator[Endpoint]:
    """The endpoint ``name`` of the ``value`` at ``path``, if it is valid: ``ADDR:PORT``, or a mapping with more."""
    long_form: Value = {"address": value} if isinstance(value, str) else value
    keys = ("address", "protocol", "netns", "open", "dual_stack", "multicast", "owner", "mode")
    fields = Fields(document, path, long_form, keys)
    if isinstance(long_form, dict) and _is_unix(long_form.get("address")):
        yield from _unix_endpoint(fields, name)
        return
    address = fields.required("address", parse_endpoint_address)
    protocols = fields.text("protocol", parse_protocol) or ANY_PROTOCOL
    netns = fields.text("netns", parse_netns)
    is_open = fields.of_type("open", bool, _SWITCH_HINT) or False
    dual_stack = fields.of_type("dual_stack", bool, _SWITCH_HINT) or False
    groups = fields.texts("multicast", parse_group, "such as [239.1.1.1]") or ()
    fields.check((), parse_name, name)
    if isinstance(long_form, dict):
        fields.check_all(check_no_owner, long_form.get("owner"), long_form.get("mode"))
    if address is not None and fields.valid:
        fields.check(("dual_stack",), check_dual_stack, dual_stack, address)
        fields.check(("multicast",), check_multicast, groups, address, protocols)
        yield Endpoint(
            name=name,
            address=address.ip,
            port=address.port,
            protocols=protocols,
            netns=netns,
            open=is_open,
            dual_stack=dual_stack,
            last_port=address.last_port,
            multicast=in_order(groups),
        )


def _is_unix(value: Value) -> bool:
    return isinstance(value, str) and is_unix(value)


def _unix_endpoint(fields: Fields, name: str) -> Iterator[Endpoint]:
    """The endpoint of a unix socket, if its fields are valid."""
    path = fields.required("address", parse_path)
    protocols = fields.text("protocol", parse_protocol) or ANY_PROTOCOL
    netns = fields.text("netns", parse_netns)
    is_open = fields.of_type("open", bool, _SWITCH_HINT) or False
    dual_stack = fields.of_type("dual_stack", bool, _SWITCH_HINT) or False
    groups = fields.texts("multicast", parse_group, "such as [239.1.1.1]") or ()
    owner = fields.text("owner", parse_owner)
    mode = fields.text("mode", parse_mode)
    fields.check((), parse_name, name)
    fields.check_all(check_unix_options, protocols, netns, dual_stack, groups)
    if path is not None and fields.valid:
        yield unix_endpoint(name, UnixSocket(path, owner, DEFAULT_MODE if mode is None else mode), is_open)


def _check_one_outcome(fields: Fields, rule: Mapping[str, Value]) -> None:
    """An egress rule has either an endpoint or an action."""
    if "endpoint" in rule and "action" in rule:
        fields.report(("action",), "a rule has an endpoint or an action, not both", "leave one of them out")
    elif "endpoint" not in rule and "action" not in rule:
        hint = "endpoint: NAME, action: deny or action: container"
        fields.report((), "the rule has neither endpoint nor action", hint)
