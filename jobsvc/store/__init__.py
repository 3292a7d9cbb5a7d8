"""The one truth. Nothing above this package speaks SQL.

`tables` and `rows` say what lies there; `database` runs transactions, `batch` changes many jobs
in one. `verbs` move jobs, `rules` decide which, `reads` only read; `dispatching`, `queues`,
`registry` and `schedules` keep what their names say; `dialects` knows PostgreSQL from SQLite.
"""
