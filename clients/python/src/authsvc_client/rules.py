"""What a service's own proto asks of its callers: the option `(authsvc.v1.require)`, prepared."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.unknown_fields import UnknownFieldSet

from .core.step_up import NO_STEP_UP, StepUp, is_acr
from .staleness import CLOSED, WhenStale
from .v1.annotations_pb2 import Require, require

SCOPES_MAX = 64
PERMISSIONS_MAX = 64
ACR_VALUES_MAX = 16
AUDIENCE_CHARS_MAX = 512
_scope = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}").fullmatch  # RFC 6749 section 3.3
_permission = re.compile(r"[A-Za-z0-9._:/-]{1,128}").fullmatch


class RuleRefused(ValueError):
    """A method's rule is missing or cannot be enforced, so its service must not start."""

    def __init__(self, method: str, field: str, problem: str) -> None:
        super().__init__(f"{method}: {field}: {problem}")
        self.method = method
        """Full name, `package.Service.Method`."""
        self.field = field
        """Field of the option; `(authsvc.v1.require)` where it is the option itself."""
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Rule:
    """What a caller of one method must show."""

    scopes: frozenset[str]
    audience: str
    require_bound: bool
    public: bool
    permissions: frozenset[str] = frozenset()
    step_up: StepUp = NO_STEP_UP
    when_stale: WhenStale | None = None
    """None leaves it to the validator."""


def rules_of(
    services: Iterable[ServiceDescriptor],
    audience: str,
    when_stale: Mapping[str, WhenStale] = MappingProxyType({}),
) -> Mapping[str, Rule]:
    """One rule for each method, by its path `/package.Service/Method`; raises RuleRefused.

    `audience` is for the methods that name none, `when_stale` by path or by scope: a path goes
    before scopes, and of several scopes the strictest counts.
    """
    rules = {
        f"/{service.full_name}/{method.name}": _rule_of(method, audience)
        for service in services
        for method in service.methods
    }
    named = {*rules, *(scope for rule in rules.values() for scope in rule.scopes)}
    for name in when_stale.keys() - named:
        raise RuleRefused(name, "when_stale", "is neither the path of a method nor a scope of one")
    return {path: _when_stale(path, rule, when_stale) for path, rule in rules.items()}


def _when_stale(path: str, rule: Rule, found: Mapping[str, WhenStale]) -> Rule:
    if path in found:
        return replace(rule, when_stale=found[path])
    if not rule.scopes & found.keys():
        return rule
    return replace(
        rule, when_stale=reduce(WhenStale.stricter, (found.get(s, CLOSED) for s in rule.scopes))
    )


def _rule_of(method: MethodDescriptor, audience: str) -> Rule:
    options = method.GetOptions()
    if not options.HasExtension(require):
        raise RuleRefused(method.full_name, "(authsvc.v1.require)", "the method has no rule")
    rule = options.Extensions[require]
    _require_enforceable(method.full_name, rule)
    max_age_s = rule.max_age.seconds if rule.HasField("max_age") else None
    return Rule(
        frozenset(rule.scopes),
        rule.audience or audience,
        rule.mtls,
        rule.public,
        frozenset(rule.permissions),
        StepUp(tuple(rule.acr), max_age_s) if rule.acr or max_age_s is not None else NO_STEP_UP,
    )


def _require_enforceable(method: str, rule: Require) -> None:
    fields = {field.name for field, _ in rule.ListFields()}
    if unknown := UnknownFieldSet(rule):
        number = str(unknown[0].field_number)
        raise RuleRefused(method, number, "this version does not know the field of that number")
    if rule.public and len(fields) > 1:
        others = ", ".join(sorted(fields - {"public"}))
        raise RuleRefused(method, "public", f"excludes {others}")
    if len(rule.scopes) > SCOPES_MAX or not all(map(_scope, rule.scopes)):
        raise RuleRefused(method, "scopes", f"at most {SCOPES_MAX}, each of RFC 6749 section 3.3")
    if len(rule.permissions) > PERMISSIONS_MAX or not all(map(_permission, rule.permissions)):
        problem = f"at most {PERMISSIONS_MAX}, each 1 to 128 characters of A-Z a-z 0-9 . _ : / -"
        raise RuleRefused(method, "permissions", problem)
    if len(rule.acr) > ACR_VALUES_MAX or not all(map(is_acr, rule.acr)):
        problem = f"at most {ACR_VALUES_MAX}, each 1 to 128 characters without space and quotes"
        raise RuleRefused(method, "acr", problem)
    if rule.max_age.nanos or rule.max_age.seconds < 0:
        raise RuleRefused(method, "max_age", "is not a whole number of seconds")
    if len(rule.audience) > AUDIENCE_CHARS_MAX:
        raise RuleRefused(method, "audience", f"at most {AUDIENCE_CHARS_MAX} characters")
