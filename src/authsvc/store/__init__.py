"""Where clients, resources, keys and the feed are kept."""

from authsvc.store.port import Store
from authsvc.store.sql import Database
from authsvc.store.sql_clients import SqlClients
from authsvc.store.sql_feed import SqlFeed
from authsvc.store.sql_keys import SqlKeys
from authsvc.store.sql_resources import SqlResources


def sql_store(database: Database) -> Store:
    """The store on a database whose schema is current."""
    return Store(SqlClients(database), SqlResources(database), SqlKeys(database), SqlFeed(database))
