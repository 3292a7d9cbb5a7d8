"""Every write to `jobs`: one verb for each arrow of core/states.py.

Each verb works inside the caller's transaction and answers what is to be told once that has
committed (`Effects`). Verbs of a worker carry the lease token; a job that no longer has it was
lost to somebody else and is left alone (the verb says which).
"""

from jobsvc.store.verbs.changing import (
    Answers,
    Wanted,
    cancel,
    cancel_many,
    delete,
    delete_many,
    retry,
    retry_many,
    update,
)
from jobsvc.store.verbs.claiming import ClaimResult, claim
from jobsvc.store.verbs.running import finish, leased, renew, report
from jobsvc.store.verbs.submitting import Answer, Submitted, preview, submit
from jobsvc.store.verbs.upkeep import expire, promote, purge, reap, reap_workers

__all__ = [
    "Answer",
    "Answers",
    "ClaimResult",
    "Submitted",
    "Wanted",
    "cancel",
    "cancel_many",
    "claim",
    "delete",
    "delete_many",
    "expire",
    "finish",
    "leased",
    "preview",
    "promote",
    "purge",
    "reap",
    "reap_workers",
    "renew",
    "report",
    "retry",
    "retry_many",
    "submit",
    "update",
]
