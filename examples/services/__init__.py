"""Two services of a company, to show what it takes to be protected by authsvc."""
