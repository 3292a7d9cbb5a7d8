"""What knows how PostgreSQL and SQLite differ."""
