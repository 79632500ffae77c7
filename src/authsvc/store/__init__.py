"""Where clients, resources, keys and the feed are kept."""

from authsvc.store.port import Store
from authsvc.store.sql import Database
from authsvc.store.sql_audit import SqlAudit
from authsvc.store.sql_clients import SqlClients
from authsvc.store.sql_feed import SqlFeed
from authsvc.store.sql_grants import SqlAssertions, SqlGrants
from authsvc.store.sql_initial_access import SqlInitialAccessTokens
from authsvc.store.sql_keys import SqlKeys
from authsvc.store.sql_leases import SqlLeases
from authsvc.store.sql_resources import SqlResources
from authsvc.store.sql_revocations import SqlRevocations
from authsvc.store.sql_roles import SqlRoles
from authsvc.store.sql_sessions import SqlSessions
from authsvc.store.sql_sweeps import AUDIT_S, SqlSweeps
from authsvc.store.sql_tokens import SqlApiKeys, SqlTokens
from authsvc.store.sql_users import SqlFailures, SqlUsers


def sql_store(database: Database, *, audit_s: float = AUDIT_S) -> Store:
    """The store on a database whose schema is current; audit rows go after `audit_s`."""
    return Store(
        clients=SqlClients(database),
        initial_access_tokens=SqlInitialAccessTokens(database),
        resources=SqlResources(database),
        roles=SqlRoles(database),
        keys=SqlKeys(database),
        feed=SqlFeed(database),
        leases=SqlLeases(database),
        grants=SqlGrants(database),
        sessions=SqlSessions(database),
        assertions=SqlAssertions(database),
        tokens=SqlTokens(database),
        api_keys=SqlApiKeys(database),
        users=SqlUsers(database),
        failures=SqlFailures(database),
        revocations=SqlRevocations(database),
        sweeps=SqlSweeps(database, audit_s),
        audit=SqlAudit(database),
    )
