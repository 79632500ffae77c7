"""Speed against its budgets: `python -m benches [names…]` (docs/performance.md says how)."""
