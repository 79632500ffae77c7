"""Redis: there, fast enough, and safe to use?"""

from authsvc import config
from authsvc.cache.redis_examine import RedisServer, addresses, examined
from authsvc.clock import Clock
from authsvc.doctor.finding import Report, cause, root
from authsvc.doctor.ports import is_loopback

OLDEST = (6, 2)
ADVICE = {
    "AuthenticationError": "check user and password: redis.url, redis.password_file",
    "NoPermissionError": "let this user PING, INFO, PUBLISH and SUBSCRIBE (ACL SETUSER)",
    "FileNotFoundError": "check redis.password_file, redis.ca, redis.certificate and redis.key",
    "SSLCertVerificationError": "name the CA of its certificate: redis.ca",
    "gaierror": "check the host in redis.url",
}
"""What to do, by the type of the cause."""
AWAY = "is it running there, with TLS as redis.url says? authsvc works without it, only later"


async def look(settings: config.Redis, report: Report, clock: Clock) -> None:
    """The Redis of the settings."""
    if settings.url is None:
        found = "no Redis: workers hear of each other once a second"
        report.skipped("reachable", "redis.url", found)
        return
    url = settings.url.get_secret_value()
    try:
        hosts = addresses(settings)
    except ValueError as error:
        report.problem("url", "redis.url", str(error), "write it as docs/configuration.md says")
        return
    where = ", ".join(hosts)
    _protection(url, settings, hosts, where, report)
    try:
        async with examined(settings, clock) as server:
            latency = await server.latency_s() * 1000
            servers = await server.servers()
    except Exception as error:
        advice = ADVICE.get(type(root(error)).__name__, AWAY)
        report.problem("reachable", where, f"no answer ({cause(error)})", advice)
        return
    found = f"answers in {latency:.1f} ms, budget {settings.budget_ms:g} ms"
    if latency > settings.budget_ms:
        advice = "take one that is nearer, or raise redis.budget_ms: it is not used like this"
        report.problem("reachable", where, found, advice)
    else:
        report.ok("reachable", where, found)
    _version(servers, where, report)
    _memory(servers, where, report)


def _protection(
    url: str, settings: config.Redis, hosts: list[str], where: str, report: Report
) -> None:
    if url.startswith("unix") or all(map(is_loopback, hosts)):
        report.ok("protection", where, "on this machine")
        return
    has_password = settings.password or settings.password_file or "@" in url
    lacks = ([] if has_password else ["password"]) + ([] if url.startswith("rediss") else ["TLS"])
    if lacks:
        advice = "set a password (redis.password_file), and use rediss:// with redis.ca"
        report.warning(
            "protection", where, f"over the network without {' and '.join(lacks)}", advice
        )
    else:
        report.ok("protection", where, "TLS and a password")


def _version(servers: list[RedisServer], where: str, report: Report) -> None:
    told = ", ".join(sorted({".".join(map(str, server.version)) for server in servers}))
    if min(server.version for server in servers) < OLDEST:
        advice = f"take Redis {'.'.join(map(str, OLDEST))} or newer"
        report.problem("version", where, f"Redis {told}", advice)
    elif any(server.is_replica for server in servers):
        report.problem("version", where, "a replica: it takes no writes", "name the master")
    else:
        report.ok("version", where, f"Redis {told}")


def _memory(servers: list[RedisServer], where: str, report: Report) -> None:
    policies = ", ".join(sorted({server.policy for server in servers}))
    if any(server.maxmemory and server.policy == "noeviction" for server in servers):
        found = "maxmemory with noeviction: once it is full it takes nothing more"
        advice = "CONFIG SET maxmemory-policy allkeys-lru: nothing in it is the truth"
        report.warning("maxmemory-policy", where, found, advice)
    elif all(server.maxmemory for server in servers):
        report.ok("maxmemory-policy", where, policies)
    else:
        report.ok("maxmemory-policy", where, f"no maxmemory ({policies})")
