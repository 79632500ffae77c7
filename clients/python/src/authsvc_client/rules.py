"""What a service's own proto asks of its callers: the option `(authsvc.v1.require)`, prepared."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.unknown_fields import UnknownFieldSet

from .v1.annotations_pb2 import Require, require

ENFORCED = frozenset({"scopes", "audience", "mtls", "public"})
"""Fields that an interceptor of this version enforces; any other refuses to start."""

SCOPES_MAX = 64
AUDIENCE_CHARS_MAX = 512
_scope = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}").fullmatch  # RFC 6749 section 3.3


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


def rules_of(services: Iterable[ServiceDescriptor], audience: str) -> Mapping[str, Rule]:
    """One rule for each method, by its path `/package.Service/Method`; raises RuleRefused.

    `audience` is for the methods that name none.
    """
    return {
        f"/{service.full_name}/{method.name}": _rule_of(method, audience)
        for service in services
        for method in service.methods
    }


def _rule_of(method: MethodDescriptor, audience: str) -> Rule:
    options = method.GetOptions()
    if not options.HasExtension(require):
        raise RuleRefused(method.full_name, "(authsvc.v1.require)", "the method has no rule")
    rule = options.Extensions[require]
    _require_enforceable(method.full_name, rule)
    return Rule(frozenset(rule.scopes), rule.audience or audience, rule.mtls, rule.public)


def _require_enforceable(method: str, rule: Require) -> None:
    fields = {field.name for field, _ in rule.ListFields()}
    for field in sorted(fields - ENFORCED):
        raise RuleRefused(method, field, "this version cannot enforce it")
    if unknown := UnknownFieldSet(rule):
        number = str(unknown[0].field_number)
        raise RuleRefused(method, number, "this version does not know the field of that number")
    if rule.public and len(fields) > 1:
        others = ", ".join(sorted(fields - {"public"}))
        raise RuleRefused(method, "public", f"excludes {others}")
    if len(rule.scopes) > SCOPES_MAX or not all(map(_scope, rule.scopes)):
        raise RuleRefused(method, "scopes", f"at most {SCOPES_MAX}, each of RFC 6749 section 3.3")
    if len(rule.audience) > AUDIENCE_CHARS_MAX:
        raise RuleRefused(method, "audience", f"at most {AUDIENCE_CHARS_MAX} characters")
