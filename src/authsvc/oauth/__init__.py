"""Pure rules of issuing: no I/O, no clock, no async."""
