"""Settings: flag over environment over file over default."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from authsvc.model import AuthMethod, GrantType
from authsvc.oauth.spiffe import check_trust_domain, parse, parse_workload
from authsvc_client.core.markers import STALENESS_S_MAX, STALENESS_S_MIN

_FILE_SUFFIX = "_FILE"
Port = Annotated[int, Field(ge=0, le=65535)]


def default_state_dir() -> Path:
    """Where a server without configuration keeps what it needs."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "authsvc"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Database(_Section):
    """Where the truth is."""

    url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL: `postgresql+asyncpg://…` or `sqlite+aiosqlite:///…`;"
        " unset: `authsvc.db` in the state directory",
    )
    synchronous: bool = Field(
        False, description="vouches that a failover of the database loses no commit"
    )


class Redis(_Section):
    """What makes workers hear of each other sooner; everything works without it."""

    url: SecretStr | None = Field(
        None,
        description="`redis://`, `rediss://` (TLS) `[user:password@]host:port/db`,"
        " `unix:///path?db=0`, `redis+sentinel://host:port,host:port/service`,"
        " `redis+cluster://host:port,host:port`, these two with `rediss` also; unset: no Redis",
    )
    password: SecretStr | None = Field(None, description="password, where the URL has none")
    password_file: Path | None = Field(
        None, description="file with it, read again for each new connection"
    )
    sentinel_password: SecretStr | None = Field(None, description="password of the Sentinels")
    ca: Path | None = Field(
        None, description="PEM CAs of its certificate; unset: those of the system"
    )
    certificate: Path | None = Field(None, description="PEM chain to show to it")
    key: Path | None = Field(None, description="PEM private key of that")
    budget_ms: float = Field(
        50.0, gt=0, le=5000, description="longest time that a call waits for it, milliseconds"
    )

    @field_validator("url")
    @classmethod
    def _scheme(cls, value: SecretStr | None) -> SecretStr | None:
        schemes = ("redis", "redis+sentinel", "redis+cluster")
        known = {"unix", *schemes, *(name.replace("redis", "rediss") for name in schemes)}
        if value is not None and value.get_secret_value().partition("://")[0] not in known:
            raise ValueError(f"its scheme is none of {', '.join(sorted(known))}")
        return value

    @model_validator(mode="after")
    def _pairs(self) -> "Redis":
        if (self.certificate is None) is not (self.key is None):
            raise ValueError("certificate and key belong together")
        if self.password is not None and self.password_file is not None:
            raise ValueError("password and password_file exclude each other")
        return self


class Tls(_Section):
    """Certificates of the listeners; of the first three all or none."""

    certificate: Path | None = Field(
        None, description="PEM chain of the server; unset: made in the state directory"
    )
    key: Path | None = Field(None, description="PEM private key of it")
    client_ca: Path | None = Field(None, description="PEM CAs that client certificates come from")
    bundles: dict[str, Path] = Field(
        default_factory=dict,
        max_length=64,
        description="outside trust domain -> file with its SPIFFE bundle, or with PEM CAs; it alone"
        " vouches for SPIFFE IDs there (JSON in the environment)",
    )
    reload_s: float = Field(
        5.0, gt=0, description="how often the files are looked at for a change, seconds"
    )

    @model_validator(mode="after")
    def _whole(self) -> "Tls":
        given = [self.certificate, self.key, self.client_ca]
        if any(given) and not all(given):
            raise ValueError("certificate, key and client_ca belong together")
        return self

    @field_validator("bundles")
    @classmethod
    def _bundles(cls, value: dict[str, Path]) -> dict[str, Path]:
        for trust_domain in value:
            check_trust_domain(trust_domain)
        return value


class Grants(_Section):
    """How long grants live."""

    lifetime_days: float = Field(30.0, gt=0, le=400, description="longest life of a grant, days")
    idle_days: float = Field(
        7.0, gt=0, le=400, description="longest time between two uses of its refresh token, days"
    )
    password: bool = Field(
        False,
        description="let first parties log people in by the password grant, which RFC 9700 advises"
        " against",
    )


class Keys(_Section):
    """Signing keys and their rotation."""

    algorithm: Literal["ES256", "RS256", "PS256", "EdDSA"] = Field(
        "ES256", description="of the next signing key: ES256, RS256, PS256 or EdDSA"
    )
    rotate_days: float = Field(
        30.0,
        ge=0,
        le=400,
        description="how long a signing key signs, days; 0: until told otherwise",
    )
    publish_ahead_h: float = Field(
        24.0, ge=1, le=720, description="how long before that the next key is published, hours"
    )

    max_age_s: int = Field(
        300, ge=1, le=86400, description="how long callers may keep the key set, seconds"
    )

    @model_validator(mode="after")
    def _in_time(self) -> "Keys":
        if 0 < self.rotate_days * 24 < self.publish_ahead_h:
            raise ValueError("publish_ahead_h is longer than rotate_days")
        return self


class Passwords(_Section):
    """How passwords of people are hashed (argon2id, RFC 9106), and which are taken."""

    memory_kib: int = Field(65536, ge=64, le=2**22, description="memory of one hash, KiB")
    passes: int = Field(3, ge=1, le=100, description="passes over it")
    threads: int = Field(
        0,
        ge=0,
        le=256,
        description="hashes at once in a worker; 0: half its share of the processors",
    )
    queue: int = Field(
        32, ge=0, le=10_000, description="passwords that may wait for that; more are refused"
    )
    min_chars: int = Field(12, ge=8, le=64, description="least length of a new one, characters")


class Registration(_Section):
    """What a registration may ask for without remark to its reviewer."""

    scopes: tuple[str, ...] = Field(
        (), description="scopes (lists: JSON in the environment); never `admin` and `register`"
    )
    grant_types: tuple[str, ...] = Field(("client_credentials",), description="grants")
    auth_methods: tuple[str, ...] = Field(
        ("tls_client_auth", "private_key_jwt"), description="client authentication methods"
    )
    approve: bool = Field(False, description="approve at once what asks for nothing else")
    pending_days: float = Field(
        14.0, gt=0, le=365, description="how long a registration waits for its review, days"
    )
    pending_per_registrant: int = Field(
        16, ge=1, description="registrations of one registrant that may wait for review"
    )

    @field_validator("grant_types", "auth_methods")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        members = GrantType if info.field_name == "grant_types" else AuthMethod
        known = [name.lower() for name in members.__members__]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return value


class Limits(_Section):
    """Calls that one caller may make in a minute, whatever worker takes them; 0: no limit."""

    tokens: int = Field(
        0, ge=0, le=10**6, description="IssueToken and RefreshToken calls a minute; 0: no limit"
    )
    revocations: int = Field(
        6000, ge=0, le=10**6, description="RevokeToken and RevocationService calls a minute"
    )
    registrations: int = Field(600, ge=0, le=10**6, description="RegisterClient calls a minute")
    administration: int = Field(
        12_000, ge=0, le=10**6, description="calls a minute of what else administrators do"
    )
    refused: int = Field(
        600, ge=0, le=10**6, description="calls a minute that fail for want of the right caller"
    )
    burst_s: float = Field(
        60.0, gt=0, le=3600, description="how much of each may come at once, seconds"
    )


class Housekeeping(_Section):
    """What a worker does beside its calls."""

    interval_s: float = Field(
        60.0, ge=1, le=3600, description="time between two runs of its chores, seconds"
    )
    audit_days: float = Field(400.0, ge=1, le=36500, description="how long the audit is kept, days")


class Listen(_Section):
    """Addresses; port 0 lets the kernel choose."""

    host: str = Field("127.0.0.1", description="address of the gRPC port")
    port: Port = Field(7443, description="gRPC over mTLS")
    tls_only: bool = Field(
        False, description="listen for callers without a certificate as well, on a port of its own"
    )
    tls_host: str = Field("127.0.0.1", description="address of the port without certificates")
    tls_port: Port = Field(7444, description="gRPC over TLS without client certificates")
    metrics_host: str = Field("127.0.0.1", description="address of the metrics port")
    metrics_port: Port = Field(7490, description="/metrics, /livez and /readyz over HTTP")
    health_host: str = Field("127.0.0.1", description="address of the health port")
    health_port: Port = Field(7491, description="gRPC health without TLS")


class Settings(BaseSettings):
    """All settings of `authsvc serve`."""

    model_config = SettingsConfigDict(
        env_prefix="AUTHSVC_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    state_dir: Path = Field(
        default_factory=default_state_dir, description="directory for what has no setting"
    )
    issuer: str = Field(
        "https://authsvc.local", description="`iss` of all tokens, and authsvc as a resource"
    )
    trust_domain: str = Field("authsvc.local", description="SPIFFE trust domain of the own PKI")
    admins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="SPIFFE IDs of the first administrators (comma-separated in the environment);"
        " with the own PKI also `spiffe://<trust domain>/admin`",
    )
    admin_ca: str = Field(
        "",
        pattern="^([0-9a-f]{64})?$",
        description="CA that must have issued their certificates (hex SHA-256 of its"
        " SubjectPublicKeyInfo); unset: the listener's only client CA",
    )
    seal_keys: SecretStr | None = Field(
        None,
        description="keys that encrypt at rest, 64 hex digits each, comma-separated, the first"
        " encrypts; unset: made in the state directory",
    )
    refresh_keys: SecretStr | None = Field(
        None,
        description="HMAC keys of refresh tokens, 64 hex digits each, comma-separated, the first"
        " signs; unset: made in the state directory",
    )
    staleness_max_s: float = Field(
        120.0,
        ge=STALENESS_S_MIN,
        le=STALENESS_S_MAX,
        description="longest age of a confirmed state to judge by, seconds",
    )
    drain_s: float = Field(
        10.0, ge=0, description="time that calls under way have to end at SIGTERM, seconds"
    )
    instance: str = Field(
        "", max_length=128, description="name in each log line; empty: host name and process id"
    )
    workers: int = Field(
        1, ge=0, le=256, description="processes that serve, each on one core; 0: one per processor"
    )
    reflection: bool = Field(False, description="answer gRPC server reflection")
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    database: Database = Database()
    redis: Redis = Redis()
    tls: Tls = Tls()
    grants: Grants = Grants()
    passwords: Passwords = Passwords()
    registration: Registration = Registration()
    keys: Keys = Keys()
    limits: Limits = Limits()
    housekeeping: Housekeeping = Housekeeping()
    listen: Listen = Listen()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get(CONFIG_VARIABLE)
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = _with_files(env_settings.env_vars)
        toml = (TomlConfigSettingsSource(settings_cls, Path(file)),) if file else ()
        return (init_settings, env_settings, *toml)

    @field_validator("trust_domain")
    @classmethod
    def _trust_domain(cls, value: str) -> str:
        check_trust_domain(value)
        return value

    @field_validator("admins", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("admins")
    @classmethod
    def _admins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for spiffe_id in value:
            parse_workload(spiffe_id)
        return value

    @field_validator("tls")
    @classmethod
    def _tls(cls, value: Tls, info: ValidationInfo) -> Tls:
        own = info.data.get("trust_domain")
        if own in value.bundles:
            raise ValueError(f"bundles: {own} is the own trust domain")
        for spiffe_id in info.data.get("admins", ()):
            if parse(spiffe_id).trust_domain in value.bundles:
                raise ValueError(f"bundles: they make no administrators, as {spiffe_id} would be")
        return value

    @field_validator("issuer")
    @classmethod
    def _issuer(cls, value: str) -> str:
        # RFC 8414 section 2: https, without query and fragment.
        if not value.startswith("https://") or set("?# ") & set(value) or len(value) > 512:
            raise ValueError("is an https URL without query and fragment")
        return value

    @field_validator("seal_keys", "refresh_keys")
    @classmethod
    def _keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value


def parse_keys(text: str) -> tuple[bytes, ...]:
    """Keys from their setting; ValueError, without their text, where one is malformed."""
    keys = []
    for part in text.strip().split(","):
        try:
            key = bytes.fromhex(part.strip())
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ValueError("each key has 64 hexadecimal digits")
        keys.append(key)
    return tuple(keys)


CONFIG_VARIABLE = "AUTHSVC_CONFIG"
SECRET_VARIABLES = (
    "AUTHSVC_SEAL_KEYS",
    "AUTHSVC_REFRESH_KEYS",
    "AUTHSVC_DATABASE__URL",
    "AUTHSVC_REDIS__URL",
    "AUTHSVC_REDIS__SENTINEL_PASSWORD",
)


def _with_files(variables: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """The environment, in lower case, with the content of the files that it names."""
    found = dict(variables)
    for variable in map(str.lower, SECRET_VARIABLES):
        file = found.pop(variable + _FILE_SUFFIX.lower(), None)  # pydantic would not know it
        if file and not found.get(variable):
            found[variable] = Path(file).read_text(encoding="utf-8").strip()
    return found


def load(config: Path | None = None, **flags: Any) -> Settings:
    """Settings of this process; `AUTHSVC_…_FILE` names a file that holds a secret.

    `config` goes before `AUTHSVC_CONFIG`. ValueError (pydantic's) where a setting is malformed,
    OSError where a file cannot be read.
    """
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)
    if file := os.environ.get(CONFIG_VARIABLE):
        Path(file).read_bytes()  # pydantic passes over a file that is not there
    return Settings(**{name: value for name, value in flags.items() if value is not None})
