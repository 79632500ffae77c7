"""What is shared or kept in memory beside the database: fast, and never the truth."""
