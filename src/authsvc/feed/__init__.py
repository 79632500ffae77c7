"""How a change reaches everybody (docs/decisions/0003)."""
