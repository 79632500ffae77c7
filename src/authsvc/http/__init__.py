"""The HTTP edge: metrics and probes; the OAuth endpoints will live here."""
