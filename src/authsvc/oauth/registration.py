"""What a registration asks for, beside what clients may have without remark."""

from dataclasses import dataclass, replace

from authsvc.model import (
    SCOPE_ADMIN,
    SCOPE_REGISTER,
    AuthMethod,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
)

_ALWAYS_REMARKED = frozenset({SCOPE_ADMIN, SCOPE_REGISTER})


@dataclass(frozen=True, slots=True)
class RegistrationPolicy:
    """What a client may ask for without remark."""

    scopes: frozenset[str]
    grant_types: frozenset[GrantType]
    auth_methods: frozenset[AuthMethod]
    approve: bool = False
    """What stays within is approved at once."""
    pending_s: float = 14 * 24 * 3600.0
    """How long a registration waits for its review."""
    pending_per_registrant: int = 16


def as_of(client: Client, now: float, pending_s: float) -> Client:
    """The client with the state that it has by time, whether or not its row was moved yet."""
    waited = client.state is ClientState.PENDING and client.update_time + pending_s <= now
    ends = client.approval_expire_time
    ended = client.state is ClientState.APPROVED and ends is not None and ends <= now
    return replace(client, state=ClientState.EXPIRED) if waited or ended else client


def beyond(metadata: ClientMetadata, policy: RegistrationPolicy) -> tuple[str, ...]:
    """The difference that a reviewer looks at, one line each; empty where there is none."""
    found = [f"scope {scope}" for scope in metadata.scopes - (policy.scopes - _ALWAYS_REMARKED)]
    found += [f"grant {_name(grant)}" for grant in metadata.grant_types - policy.grant_types]
    methods = metadata.auth_methods - policy.auth_methods
    found += [f"authentication {_name(method)}" for method in methods]
    found += [f"validates {audience}" for audience in metadata.validates]
    found += ["first party"] * metadata.first_party
    return tuple(sorted(found))


def grows(old: ClientMetadata, new: ClientMetadata) -> bool:
    """Whether it asks for more than it was reviewed for: rights, or other ways to prove itself."""
    if any(after - before for before, after in _sets(old, new)):
        return True
    is_looser = old.bound_access_tokens and not new.bound_access_tokens
    is_looser = is_looser or (new.first_party and not old.first_party)
    return is_looser or (old.may_act, *_proofs(old)) != (new.may_act, *_proofs(new))


def shrinks(old: ClientMetadata, new: ClientMetadata) -> bool:
    """Whether something is taken from it that its living tokens may rest on."""
    if any(before - after for before, after in _sets(old, new)):
        return True
    is_stricter = new.bound_access_tokens and not old.bound_access_tokens
    is_stricter = is_stricter or (old.first_party and not new.first_party)
    return is_stricter or (old.may_act, *_proofs(old)) != (new.may_act, *_proofs(new))


def _sets(
    old: ClientMetadata, new: ClientMetadata
) -> tuple[tuple[frozenset[object], frozenset[object]], ...]:
    return tuple(
        (frozenset(getattr(old, name)), frozenset(getattr(new, name)))
        for name in ("scopes", "grant_types", "auth_methods", "validates")
    )


def _proofs(metadata: ClientMetadata) -> tuple[object, ...]:
    return metadata.identity, metadata.jwks


def _name(member: GrantType | AuthMethod) -> str:
    return member.name.lower()
