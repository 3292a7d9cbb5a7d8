"""The store's suite: the same tests on SQLite, PostgreSQL 15 and PostgreSQL 18."""
