"""authsvc: the token service that backend services use among themselves."""

# `authsvc.v1` (the option that users' generated code imports) ships in the client's wheel.
__path__ = __import__("pkgutil").extend_path(__path__, __name__)
