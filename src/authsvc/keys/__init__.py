"""Signing keys, tokens as bytes, secrets."""
