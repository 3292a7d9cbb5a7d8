"""The one truth: tables, transactions, every write (transitions, registry) and every read
(queries). Nothing above this package speaks SQL."""
