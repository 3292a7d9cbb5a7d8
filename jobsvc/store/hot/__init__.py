"""The plain case, one statement each: one round trip where a verb takes six.

A job is plain where no limit, unique key, concurrency key or pause has a say, and nothing is to be
decided that the statement's own conditions do not decide. What a statement does not take it leaves
as it was, and is then for the verb (`jobsvc.store.verbs`), whose law these statements repeat. They
are of PostgreSQL alone; on SQLite they take nothing.

Rows go in as one JSON document, which costs the driver one string to quote; bytes lie in it as
base64.
"""

from jobsvc.store.hot.claiming import claim
from jobsvc.store.hot.finishing import succeed
from jobsvc.store.hot.publishing import forget_published
from jobsvc.store.hot.submitting import SUBMIT, PlainJobs, submit, submit_all

__all__ = ["SUBMIT", "PlainJobs", "claim", "forget_published", "submit", "submit_all", "succeed"]
